"""Bidirectional attention inside segments of a packed sequence, through the tiled kernel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from kernels._triton.attention import Shape, Tiles, attend, shape_for
from kernels._triton.launch import misfit
from kernels.attention_mask import BIDIRECTIONAL

MOST_ROWS, MOST_KEYS = 64, 32  # larger tiles spill: query, key and value strides differ here, each needs registers


def segment_shape(head_dim: int, longest: int, element_size: int) -> Shape:
    """Tile shape for segments of at most `longest` tokens."""
    shape = shape_for(1, head_dim, min(longest, MOST_ROWS), element_size)
    return dataclasses.replace(shape, keys=min(shape.keys, MOST_KEYS))


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: Sequence[tuple[int, int, int, int]], scale: float | None
) -> torch.Tensor:
    """q, k, v: [N, H, D]; runs: (first token, number of segments, tokens per segment, seen of those). Returns
    [N, H, D]. Raises ValueError when the shapes differ."""
    if not q.shape == k.shape == v.shape:
        raise misfit("varlen_attention", q=q, k=k, v=v)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    longest = max((length for _, _, length, _ in runs), default=0)
    shape = segment_shape(q.shape[-1], longest, q.element_size())
    plan = Tiles(tiles=_tiles(tuple(runs), shape.rows, q.device), table=None, block_q=shape.rows, longest=longest)
    return attend(q, k, v, plan, shape, page_size=0, mask=BIDIRECTIONAL, scale=scale, num_splits=1)


@functools.lru_cache(maxsize=32)
def _tiles(runs: tuple[tuple[int, int, int, int], ...], rows: int, device: torch.device) -> torch.Tensor:
    """Tiles [n, 5] of at most `rows` tokens. Kept for the layers to come: sending them waits for the device."""
    tiles = [
        (start + row, min(rows, length - row), row, seen, start)
        for first, count, length, seen in runs
        for start in range(first, first + count * length, length)
        for row in range(0, length, rows)
    ]
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 5).to(device)
