"""Rows through tables and pages to pages: each program moves one row, or one piece of a page."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels._triton.launch import ceil_div, next_power_of_2

PIECE = 4096  # elements of a page that one program copies


@triton.jit
def rows_kernel(
    pool_ptr, tables_ptr, streams_ptr, rows_ptr, other_ptr, places_ptr, table_stride, other_stride, block_size, width,
    STORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    row = tl.load(rows_ptr + item)
    stream = tl.load(streams_ptr + item).to(tl.int64)
    block = tl.load(tables_ptr + stream * table_stride + row // block_size).to(tl.int64)
    in_pool = pool_ptr + (block * block_size + row % block_size) * width + columns
    if STORE:
        value = tl.load(other_ptr + item * other_stride + columns, mask=inside)
        tl.store(in_pool, value.to(pool_ptr.dtype.element_ty), mask=inside)
    else:
        place = tl.load(places_ptr + item)
        value = tl.load(in_pool, mask=inside)
        tl.store(other_ptr + place * other_stride + columns, value.to(other_ptr.dtype.element_ty), mask=inside)


@triton.jit
def convert_kernel(
    source_ptr, source_ids_ptr, target_ptr, target_ids_ptr, source_block_stride, source_row_stride, source_head_stride,
    target_block_stride, target_row_stride, target_head_stride, source_size, target_size, first, num_heads, head_dim,
    HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    row = first + tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)[:, None]  # heads may lie a whole pool apart
    columns = tl.arange(0, DIM)[None, :]
    inside = (heads < num_heads) & (columns < head_dim)
    source = tl.load(source_ids_ptr + row // source_size).to(tl.int64) * source_block_stride
    source += (row % source_size) * source_row_stride
    target = tl.load(target_ids_ptr + row // target_size).to(tl.int64) * target_block_stride
    target += (row % target_size) * target_row_stride
    value = tl.load(source_ptr + source + heads * source_head_stride + columns, mask=inside)
    place = target_ptr + target + heads * target_head_stride + columns
    tl.store(place, value.to(target_ptr.dtype.element_ty), mask=inside)


@triton.jit
def copy_pages_kernel(cache_ptr, sources_ptr, targets_ptr, page_elements, PIECE: tl.constexpr):
    item = tl.program_id(0)
    source = tl.load(sources_ptr + item).to(tl.int64) * page_elements
    target = tl.load(targets_ptr + item).to(tl.int64) * page_elements
    places = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = places < page_elements
    tl.store(cache_ptr + target + places, tl.load(cache_ptr + source + places, mask=inside), mask=inside)


def place_rows(
    out: torch.Tensor,
    targets: torch.Tensor,
    pool: torch.Tensor,
    tables: torch.Tensor,
    streams: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """See kernels.blocks.place_rows. ValueError when out's columns are no neighbours."""
    if out.stride(1) != 1 and out.shape[1] > 1:
        raise ValueError(f"rows {tuple(out.shape)} with strides {out.stride()} cannot be written in place")
    _move_rows(pool, tables, streams, rows, out, targets, store=False)


def store_rows(
    pool: torch.Tensor, tables: torch.Tensor, streams: torch.Tensor, rows: torch.Tensor, values: torch.Tensor
) -> None:
    """See kernels.blocks.store_rows."""
    values = values if values.stride(1) == 1 else values.contiguous()
    _move_rows(pool, tables, streams, rows, values, rows, store=True)


def _move_rows(
    pool: torch.Tensor,
    tables: torch.Tensor,
    streams: torch.Tensor,
    rows: torch.Tensor,
    other: torch.Tensor,
    places: torch.Tensor,
    *,
    store: bool,
) -> None:
    width = pool.shape[-1]
    if not len(rows) or not width:
        return
    block = min(4096, next_power_of_2(width))
    rows_kernel[(len(rows), ceil_div(width, block))](
        pool, tables.contiguous(), streams.contiguous(), rows.contiguous(), other, places.contiguous(),
        tables.shape[1], other.stride(0), pool.shape[1], width, STORE=store, BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip


def convert(
    source: torch.Tensor,
    source_ids: torch.Tensor,
    target: torch.Tensor,
    target_ids: torch.Tensor,
    first: int,
    count: int,
) -> None:
    """See kernels.blocks.blocks_to_pages. ValueError when the last dimension of either is not contiguous."""
    num_heads, head_dim = source.shape[2:]
    if head_dim > 1 and not source.stride(3) == target.stride(3) == 1:
        raise ValueError(f"the last dimension must be contiguous: strides {source.stride()} and {target.stride()}")
    if not count or not num_heads or not head_dim:
        return
    columns = next_power_of_2(head_dim)
    heads = max(1, min(next_power_of_2(num_heads), 4096 // columns))
    convert_kernel[(count, ceil_div(num_heads, heads))](
        source, source_ids.contiguous(), target, target_ids.contiguous(), *source.stride()[:3], *target.stride()[:3],
        source.shape[1], target.shape[1], first, num_heads, head_dim, HEADS=heads, DIM=columns,
        num_warps=max(1, min(8, heads * columns // 256)),
    )  # fmt: skip


def copy_pages(cache: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """See kernels.blocks.copy_pages."""
    page_elements = cache[0].numel() if len(cache) else 0
    if not len(sources) or not page_elements:
        return
    copy_pages_kernel[(len(sources), ceil_div(page_elements, PIECE))](
        cache, sources.contiguous(), targets.contiguous(), page_elements, PIECE=PIECE, num_warps=8
    )
