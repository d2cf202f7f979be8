"""One attention kernel for paged and packed keys: tiles of queries, online softmax, keys optionally split and merged.

FlashAttention's recurrence (Dao, 2023) over a list of tiles. A tile is up to BLOCK_Q queries of one sequence; its rows
are queries x the query heads of one key head, so that grouped heads share every key that is loaded. With few tiles
(decode) the keys are split among programs, whose partial results are merged by their log-sum-exp (flash-decoding).
Positions beyond a tile's keys are never loaded, whatever memory holds there.

    tiles [n, 5] int32: first row in q · queries · position of the first query · keys · page-table row or first key row
"""

from __future__ import annotations

import dataclasses
import math

import torch
import triton
import triton.language as tl

from kernels._triton.launch import IS_INTERPRETED, ceil_div, next_power_of_2
from kernels.attention_mask import AttentionMask

TILE_COLUMNS = 5
MIN_ROWS = 16  # of a tensor-core product
MIN_SPLIT_KEYS = 256  # a shorter split costs more in merging than it gains in parallelism
MAX_SPLITS = 64
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, out_lse_ptr, partial_ptr, lse_ptr, tiles_ptr, table_ptr,
    q_row_stride, q_head_stride, k_row_stride, k_head_stride, v_row_stride, v_head_stride, table_stride,
    num_heads, head_dim, scale, softcap, split_keys,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, LSE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    first_row = tl.load(tiles_ptr + tile * 5).to(tl.int64)
    num_queries = tl.load(tiles_ptr + tile * 5 + 1)
    first_position = tl.load(tiles_ptr + tile * 5 + 2)
    num_keys = tl.load(tiles_ptr + tile * 5 + 3)
    place = tl.load(tiles_ptr + tile * 5 + 4).to(tl.int64)

    rows = tl.arange(0, ROWS)
    query = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    columns = tl.arange(0, DIM)
    is_row = query < num_queries
    is_column = columns < head_dim
    q_start = q_ptr + (first_row + query)[:, None] * q_row_stride + head[:, None] * q_head_stride
    q = tl.load(q_start + columns[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)

    begin = 0
    end = num_keys
    if BLOCK > 0:
        last = first_position + num_queries - 1
        end = tl.minimum(end, (last // BLOCK + 1) * BLOCK)
    if WINDOW > 0:
        end = tl.minimum(end, first_position + num_queries - 1 + WINDOW)
    if SPLIT:
        begin = tl.program_id(2) * split_keys
        end = tl.minimum(end, begin + split_keys)
    if WINDOW > 0:  # whole steps of KEYS before the first visible key are skipped
        begin = tl.maximum(begin, (tl.maximum(0, first_position - WINDOW + 1) // KEYS) * KEYS)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(begin, end, KEYS):
        position = start + tl.arange(0, KEYS)
        is_key = position < end
        if PAGE > 0:
            page = tl.load(table_ptr + place * table_stride + position // PAGE, mask=is_key, other=0).to(tl.int64)
            key_row = page * PAGE + position % PAGE
        else:
            key_row = place + position
        k_start = k_ptr + key_row[None, :] * k_row_stride + kv_head * k_head_stride
        k = tl.load(k_start + columns[:, None], mask=is_column[:, None] & is_key[None, :], other=0.0)
        v_start = v_ptr + key_row[:, None] * v_row_stride + kv_head * v_head_stride
        v = tl.load(v_start + columns[None, :], mask=is_key[:, None] & is_column[None, :], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, k, input_precision="tf32x3") * scale
        if SOFTCAP:
            small = tl.exp2(tl.abs(scores) * (-2.0 * LOG2_E / softcap))  # tanh of a positive number, without overflow
            size = softcap * (1.0 - small) / (1.0 + small)
            scores = tl.where(scores < 0, -size, size)
        asked = (first_position + query)[:, None]
        seen = is_key[None, :]
        if BLOCK > 0:
            seen = seen & (position[None, :] // BLOCK <= asked // BLOCK)
        if WINDOW > 0:
            seen = seen & (tl.abs(position[None, :] - asked) < WINDOW)
        scores = tl.where(seen, scores * LOG2_E, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        probabilities = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(best - safe)
        weight = weight * shrink + tl.sum(probabilities, axis=1)
        acc = acc * shrink[:, None] + tl.dot(probabilities.to(v.dtype), v, input_precision="tf32x3")
        best = higher

    weight = tl.where(best == float("-inf"), 1.0, weight)  # a row that saw no key in this split: 0, at -inf
    acc = acc / weight[:, None]
    if SPLIT:
        slot = (tile.to(tl.int64) * tl.num_programs(1) + kv_head) * tl.num_programs(2) + tl.program_id(2)
        tl.store(partial_ptr + (slot * ROWS + rows)[:, None] * DIM + columns[None, :], acc)
        tl.store(lse_ptr + slot * ROWS + rows, best + tl.log2(weight))
    else:
        heads = (first_row + query) * num_heads + head
        if LSE:
            tl.store(out_lse_ptr + heads, (best + tl.log2(weight)) / LOG2_E, mask=is_row)
        target = heads[:, None] * head_dim + columns[None, :]
        tl.store(out_ptr + target, acc.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def merge_kernel(
    partial_ptr, lse_ptr, out_ptr, out_lse_ptr, tiles_ptr, num_heads, head_dim, num_splits,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    query = row // GROUP
    if query < tl.load(tiles_ptr + tile * 5 + 1):
        columns = tl.arange(0, DIM)
        first = (tile.to(tl.int64) * tl.num_programs(1) + kv_head) * num_splits
        best = float("-inf")
        weight = 0.0
        acc = tl.zeros([DIM], tl.float32)
        for split in range(num_splits):
            lse = tl.load(lse_ptr + (first + split) * ROWS + row)
            higher = tl.maximum(best, lse)
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp2(best - safe)
            share = tl.exp2(lse - safe)
            acc = acc * shrink + share * tl.load(partial_ptr + ((first + split) * ROWS + row) * DIM + columns)
            weight = weight * shrink + share
            best = higher
        weight = tl.where(best == float("-inf"), 1.0, weight)
        target = (tl.load(tiles_ptr + tile * 5).to(tl.int64) + query) * num_heads + kv_head * GROUP + row % GROUP
        if LSE:
            tl.store(out_lse_ptr + target, (best + tl.log2(weight)) / LOG2_E)
        out = (acc / weight).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + target * head_dim + columns, out, mask=columns < head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """What all layers of a step share: tiles [n, 5] int32 and the page table [S, P] int32 on the device.

    block_q: queries per tile; longest: most keys of a tile.
    """

    tiles: torch.Tensor
    table: torch.Tensor | None
    block_q: int
    longest: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Constants of a compiled kernel: rows and keys of a tile, warps and stages."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# (bytes per element, padded head_dim) -> {rows: (keys, warps)}: the largest tiles that compile without
# spilling for sm_80, sm_90 and sm_100 (tests/kernels/test_compile.py). float32 products take three tf32 passes, which
# is what limits them.
_SHAPES: dict[tuple[int, int], dict[int, tuple[int, int]]] = {
    (2, 64): {16: (64, 4), 32: (64, 8), 64: (64, 8), 128: (64, 8)},
    (2, 128): {16: (32, 4), 32: (64, 8), 64: (64, 8), 128: (64, 8)},
    (2, 256): {16: (32, 8), 32: (32, 8), 64: (16, 8)},
    (4, 64): {16: (16, 8)},
    (4, 128): {16: (16, 4)},
}


def shape_for(heads_per_key: int, head_dim: int, longest_window: int, element_size: int) -> Shape:
    """Tile shape for windows of at most `longest_window` queries; heads as `dispatch.attention_twin` lets through."""
    shapes = _SHAPES[element_size, max(64, next_power_of_2(head_dim))]
    wanted = next_power_of_2(max(MIN_ROWS, heads_per_key * min(longest_window, 128)))
    rows = min(wanted, max(shapes))
    keys, num_warps = shapes[rows]
    return Shape(rows=max(rows, next_power_of_2(heads_per_key)), keys=keys, num_warps=num_warps, num_stages=2)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Tiles, shape: Shape, *, page_size: int,
    mask: AttentionMask, scale: float | None, softcap: float | None = None, lse: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of q [T, H, D] over k, v [rows, Hk, D] (paged when page_size > 0), as the tiles say: [T, H, D].

    lse: [T, H] float32, filled when given. num_splits: parts the keys of a tile are shared among; None chooses.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    num_tiles = plan.tiles.shape[0]
    if not num_tiles:
        return out
    splits = _num_splits(plan.longest, num_tiles * num_kv_heads, q.device) if num_splits is None else num_splits
    group, dim = num_heads // num_kv_heads, max(16, next_power_of_2(head_dim))
    partial, partial_lse = out, out
    if splits > 1:
        parts = num_tiles * num_kv_heads * splits * shape.rows
        partial = torch.empty(parts * dim, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(parts, dtype=torch.float32, device=q.device)
    table = plan.tiles if plan.table is None else plan.table
    split_keys = ceil_div(ceil_div(plan.longest, splits), shape.keys) * shape.keys
    out_lse = out if lse is None else lse
    attention_kernel[(num_tiles, num_kv_heads, splits)](
        q, k, v, out, out_lse, partial, partial_lse, plan.tiles, table, q.stride(0), q.stride(1), k.stride(0),
        k.stride(1), v.stride(0), v.stride(1), table.stride(0), num_heads, head_dim,
        1 / math.sqrt(head_dim) if scale is None else scale, 1.0 if softcap is None else softcap, split_keys,
        GROUP=group, ROWS=shape.rows, KEYS=shape.keys, DIM=dim, PAGE=page_size, BLOCK=mask.block_length,
        WINDOW=mask.window, SOFTCAP=softcap is not None, SPLIT=splits > 1, LSE=lse is not None,
        UPCAST=IS_INTERPRETED and q.dtype == torch.bfloat16, num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(num_tiles, num_kv_heads, plan.block_q * group)](
            partial, partial_lse, out, out_lse, plan.tiles, num_heads, head_dim, splits, GROUP=group, ROWS=shape.rows,
            DIM=dim, LSE=lse is not None, num_warps=1,
        )  # fmt: skip
    return out


def _num_splits(longest: int, num_programs: int, device: torch.device) -> int:
    """As many as fill the device twice, none shorter than MIN_SPLIT_KEYS."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(MAX_SPLITS, 2 * processors // num_programs, longest // MIN_SPLIT_KEYS))
