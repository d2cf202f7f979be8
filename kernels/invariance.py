"""Batch invariance: while it is switched on, a row's result has the same bits whatever rows are computed beside it.

Sums of floats depend on their order, and libraries choose the order by the shape of the whole. So products are made of
equal tiles of rows, the last filled up with zeros, every query of attention is answered alone, and ops with a C twin
take it at any size. `tile_rows` tries whether this machine treats all rows of a tile alike; where it does not, the
tiles are of one row. It costs time: each tile reads the weights anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F

TILE_ROWS = 16
_rows: ContextVar[int] = ContextVar("tile_rows", default=0)


@contextlib.contextmanager
def batch_invariant(rows: int) -> Iterator[None]:
    """Every op called inside is batch-invariant, with tiles of `rows` rows; 0 leaves everything as it is."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def is_batch_invariant() -> bool:
    return _rows.get() > 0


def in_tiles(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function` of x [T, K], which treats rows alike, applied to equal tiles of x: [T, N]."""
    rows, length = _rows.get(), x.shape[0]
    lacking = -length % rows
    padded = F.pad(x, (0, 0, 0, lacking)) if lacking else x
    if padded.shape[0] <= rows:
        return function(padded)[:length]
    return torch.cat([function(tile) for tile in torch.split(padded, rows)])[:length]


@torch.inference_mode()
def tile_rows(functions: Iterable[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]]) -> int:
    """Rows of a tile for these functions, each with a row [1, K] to try: TILE_ROWS where equal rows of a tile give
    equal bits in every place, else 1."""
    with batch_invariant(TILE_ROWS):
        for function, row in functions:
            answered = function(row.expand(TILE_ROWS, -1).contiguous())
            if not torch.equal(answered, answered[:1].expand_as(answered)):
                return 1
    return TILE_ROWS
