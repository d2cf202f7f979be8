"""Grouped matmul: a grid large enough for any division of the rows among experts; each program finds its own tile.

How many rows an expert has is known on the device only, so the host launches as many tiles as there could be (rows
over tile height, and one begun tile per expert) and a program beyond the last tile returns at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels._triton.launch import IS_INTERPRETED, ceil_div, next_power_of_2

COLUMNS, INPUTS = 64, 64


@triton.jit
def grouped_matmul_kernel(
    x_ptr, weight_ptr, offsets_ptr, tokens_ptr, out_ptr, x_stride, num_experts, num_columns, num_inputs,
    GATHER: tl.constexpr, UPCAST: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    experts = tl.arange(0, EXPERTS)
    begins = tl.load(offsets_ptr + experts, mask=experts < num_experts, other=0)
    ends = tl.load(offsets_ptr + experts + 1, mask=experts < num_experts, other=0)
    tiles = ((ends - begins + ROWS - 1) // ROWS).to(tl.int32)
    behind = tl.cumsum(tiles, axis=0)
    expert = tl.sum((behind <= tile).to(tl.int32), axis=0)
    if expert < num_experts:
        is_mine = experts == expert
        begin = tl.sum(tl.where(is_mine, begins, 0), axis=0)
        end = tl.sum(tl.where(is_mine, ends, 0), axis=0)
        before = tl.sum(tl.where(is_mine, behind - tiles, 0), axis=0)
        rows = begin + (tile - before) * ROWS + tl.arange(0, ROWS)
        is_row = rows < end
        source = tl.load(tokens_ptr + rows, mask=is_row, other=0) if GATHER else rows
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        is_column = columns < num_columns
        base = weight_ptr + expert.to(tl.int64) * num_columns * num_inputs
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, num_inputs, INPUTS):
            inputs = start + tl.arange(0, INPUTS)
            inside = inputs < num_inputs
            place = x_ptr + source[:, None] * x_stride + inputs[None, :]
            x = tl.load(place, mask=is_row[:, None] & inside[None, :], other=0.0)
            place = base + columns[None, :] * num_inputs + inputs[:, None]
            weight = tl.load(place, mask=is_column[None, :] & inside[:, None], other=0.0)
            if UPCAST:
                x = x.to(tl.float32)
                weight = weight.to(tl.float32)
            acc = tl.dot(x, weight, acc, input_precision="tf32x3")
        place = out_ptr + rows[:, None].to(tl.int64) * num_columns + columns[None, :]
        tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def combine_kernel(rows_ptr, places_ptr, weights_ptr, out_ptr, row_stride, top_k, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(top_k):
        place = tl.load(places_ptr + token * top_k + choice)
        weight = tl.load(weights_ptr + token * top_k + choice)
        total += weight * tl.load(rows_ptr + place * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def grouped_matmul(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, tokens: torch.Tensor | None
) -> torch.Tensor:
    """See kernels.experts.grouped_matmul."""
    num_experts, num_columns, num_inputs = weight.shape
    num_rows = x.shape[0] if tokens is None else tokens.shape[0]
    out = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, warps = tile(num_rows // num_experts, x.dtype)
    grid = ceil_div(num_columns, COLUMNS), ceil_div(num_rows, rows) + num_experts
    offsets = offsets.contiguous()
    grouped_matmul_kernel[grid](
        x, weight.contiguous(), offsets, offsets if tokens is None else tokens.contiguous(), out, x.stride(0),
        num_experts, num_columns, num_inputs, GATHER=tokens is not None,
        UPCAST=IS_INTERPRETED and x.dtype == torch.bfloat16, EXPERTS=next_power_of_2(num_experts), ROWS=rows,
        COLUMNS=COLUMNS, INPUTS=32 if x.dtype == torch.float32 else INPUTS, num_warps=warps,
    )  # fmt: skip
    return out


def tile(rows_per_expert: int, dtype: torch.dtype) -> tuple[int, int]:
    """(rows, warps) of a tile."""
    rows = min(32 if dtype == torch.float32 else 128, max(16, next_power_of_2(rows_per_expert)))
    return rows, 4 if rows < 64 else 8


def combine_experts(rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """See kernels.experts.combine_experts."""
    (num_tokens, top_k), width = places.shape, rows.shape[1]
    out = torch.empty(num_tokens, width, dtype=rows.dtype, device=rows.device)
    if out.numel():
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        block = min(2048, next_power_of_2(width))
        combine_kernel[(num_tokens, ceil_div(width, block))](
            rows, places.contiguous(), weights.float().contiguous(), out, rows.stride(0), top_k, width, BLOCK=block,
            num_warps=max(1, min(8, block // 256)),
        )  # fmt: skip
    return out
