"""Rows through block tables, transfer blocks to and from KV pages, and page copies.

A *block* is a run of rows of a pool [num_blocks, block_size, ...]; a block table lists the blocks of a stream in
order, so row `r` of a stream lies in block `table[r // block_size]` at `r % block_size`. Pages are the same for the
cache, with another size. Entries of a table beyond the rows asked for are never looked at, nor are rows of a block
that nobody asked for. Who owns which block is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.dispatch import twin
from kernels.put_rows import put_rows


def place_rows(
    out: torch.Tensor,
    targets: torch.Tensor,
    pool: torch.Tensor,
    tables: torch.Tensor,
    streams: torch.Tensor,
    rows: torch.Tensor,
) -> None:
    """Gather rows of several streams into model inputs: `out[targets[i]] = row rows[i] of stream streams[i]`.

    out: [T, D], rows plain; pool: [num_blocks, block_size, D] contiguous; tables: [S, B] integer. targets (distinct),
    streams, rows: [N] int64, all on out's device. The result is cast to out's dtype; other rows of `out` stay.
    """
    _check_streams("place_rows", targets, streams, rows)
    _check_pool("place_rows", pool, out)
    triton = twin("blocks", out)
    if triton is not None:
        triton.place_rows(out, targets, pool, tables, streams, rows)
        return
    flat = pool.view(-1, pool.shape[-1])
    put_rows(out, targets, flat.index_select(0, _slots(tables, streams, rows, pool.shape[1])))


def store_rows(
    pool: torch.Tensor, tables: torch.Tensor, streams: torch.Tensor, rows: torch.Tensor, values: torch.Tensor
) -> None:
    """Scatter values [N, D] into blocks: row `rows[i]` of stream `streams[i]` becomes `values[i]`, in pool's dtype.

    Shapes as in `place_rows`; (stream, row) pairs must be distinct, and blocks belong to one stream each.
    """
    _check_streams("store_rows", values, streams, rows)
    _check_pool("store_rows", pool, values)
    triton = twin("blocks", values)
    if triton is not None:
        triton.store_rows(pool, tables, streams, rows, values)
        return
    put_rows(pool.view(-1, pool.shape[-1]), _slots(tables, streams, rows, pool.shape[1]), values)


def blocks_to_pages(
    blocks: torch.Tensor, block_ids: torch.Tensor, cache: torch.Tensor, page_ids: torch.Tensor, first: int, count: int
) -> None:
    """Copy rows `first .. first + count - 1` of a stream from transfer blocks into the pages of a sequence.

    blocks: [num_blocks, block_size, Hk, D]; cache: [num_pages, page_size, Hk, D] contiguous. Blocks may have any
    strides (a permuted view of head-major blocks converts the layout); the last dimension is contiguous in both.
    block_ids, page_ids: [B], [P] int64, covering the rows from row 0 on. Cast to the cache's dtype.
    Raises ValueError when the shapes differ or the ids do not cover the rows.
    """
    _check_conversion("blocks_to_pages", blocks, block_ids, cache, page_ids, first, count)
    _convert(blocks, block_ids, cache, page_ids, first, count)


def pages_to_blocks(
    cache: torch.Tensor, page_ids: torch.Tensor, blocks: torch.Tensor, block_ids: torch.Tensor, first: int, count: int
) -> None:
    """The way back: copy rows `first .. first + count - 1` of a sequence from its pages into transfer blocks.

    Shapes and errors as in `blocks_to_pages`. Rows of the blocks beyond the last stay as they are.
    """
    _check_conversion("pages_to_blocks", blocks, block_ids, cache, page_ids, first, count)
    _convert(cache, page_ids, blocks, block_ids, first, count)


def copy_pages(caches: Sequence[torch.Tensor], sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copy whole pages inside each cache, for copy on write: page `targets[i]` becomes page `sources[i]`.

    caches: each [num_pages, ...] contiguous. sources, targets: [N] int64; targets are distinct and no source.
    """
    if sources.shape != targets.shape or sources.dim() != 1:
        raise ValueError(f"copy_pages: {tuple(sources.shape)} sources and {tuple(targets.shape)} targets")
    for cache in caches:
        if not cache.is_contiguous():
            raise ValueError(
                f"copy_pages: a cache {tuple(cache.shape)} with strides {cache.stride()} is not contiguous"
            )
        triton = twin("blocks", cache)
        if triton is not None:
            triton.copy_pages(cache, sources, targets)
        else:
            cache.index_copy_(0, targets, cache.index_select(0, sources))


def _slots(tables: torch.Tensor, streams: torch.Tensor, rows: torch.Tensor, block_size: int) -> torch.Tensor:
    return tables[streams, rows // block_size].to(torch.int64) * block_size + rows % block_size


def _convert(
    source: torch.Tensor,
    source_ids: torch.Tensor,
    target: torch.Tensor,
    target_ids: torch.Tensor,
    first: int,
    count: int,
) -> None:
    triton = twin("blocks", source)
    if triton is not None:
        triton.convert(source, source_ids, target, target_ids, first, count)
        return
    rows = torch.arange(first, first + count, device=source.device)
    if source.is_contiguous():
        values = source.flatten(0, 1).index_select(0, _slots_of(source_ids, rows, source.shape[1]))
    else:
        values = source[source_ids[rows // source.shape[1]], rows % source.shape[1]]
    if target.is_contiguous():
        put_rows(target.flatten(0, 1), _slots_of(target_ids, rows, target.shape[1]), values)
    else:
        target[target_ids[rows // target.shape[1]], rows % target.shape[1]] = values.to(target.dtype)


def _slots_of(ids: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
    return ids[rows // size] * size + rows % size


def _check_streams(op: str, first: torch.Tensor, streams: torch.Tensor, rows: torch.Tensor) -> None:
    if not first.shape[0] == streams.shape[0] == rows.shape[0]:
        raise ValueError(
            f"{op}: {first.shape[0]} targets or values, {streams.shape[0]} streams and {rows.shape[0]} rows"
        )


def _check_pool(op: str, pool: torch.Tensor, other: torch.Tensor) -> None:
    if pool.dim() != 3 or not pool.is_contiguous() or other.dim() != 2 or other.shape[1] != pool.shape[2]:
        raise ValueError(
            f"{op}: needs a contiguous pool [blocks, rows, width] and rows of its width, got {tuple(pool.shape)} with "
            f"strides {pool.stride()} and {tuple(other.shape)}"
        )


def _check_conversion(
    op: str,
    blocks: torch.Tensor,
    block_ids: torch.Tensor,
    cache: torch.Tensor,
    page_ids: torch.Tensor,
    first: int,
    count: int,
) -> None:
    if blocks.dim() != 4 or cache.dim() != 4 or blocks.shape[2:] != cache.shape[2:]:
        raise ValueError(f"{op}: blocks {tuple(blocks.shape)} and pages {tuple(cache.shape)} hold other heads")
    for name, ids, size in (("blocks", block_ids, blocks.shape[1]), ("pages", page_ids, cache.shape[1])):
        if first < 0 or count < 0 or ids.shape[0] * size < first + count:
            raise ValueError(f"{op}: {ids.shape[0]} {name} of {size} rows do not hold rows {first}..{first + count}")
