"""Attention of windows over a paged cache, through the tiled kernel. See kernels.paged_attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels._triton.attention import Shape, Tiles, attend, shape_for
from kernels._triton.launch import misfit
from kernels.attention_mask import CAUSAL, AttentionMask


def plan(
    page_table: torch.Tensor, query_lens: Sequence[int], kv_lens: Sequence[int], query_start: Sequence[int],
    shape: Shape, heads_per_key: int, device: torch.device,
) -> Tiles:  # fmt: skip
    """Tiles of one step, on the device."""
    block_q = max(1, shape.rows // heads_per_key)
    tiles = [
        (start + first, min(block_q, queries - first), kv - queries + first, kv, sequence)
        for sequence, (queries, kv, start) in enumerate(zip(query_lens, kv_lens, query_start, strict=True))
        for first in range(0, queries, block_q)
    ]
    return Tiles(
        tiles=torch.tensor(tiles, dtype=torch.int32).to(device, non_blocking=True),
        table=page_table.to(torch.int32).to(device, non_blocking=True),
        block_q=block_q,
        longest=max(kv_lens, default=0),
    )


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, tiles: Tiles, shape: Shape, scale: float | None,
    *, mask: AttentionMask = CAUSAL, softcap: float | None = None, lse: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """q: [T, H, D]; caches: [num_pages, page_size, Hk, D] contiguous; lse: [T, H] to fill. Returns [T, H, D]. Raises
    ValueError when these do not fit each other."""
    num_pages, page_size, num_kv_heads, head_dim = k_cache.shape
    fits = k_cache.shape == v_cache.shape and q.shape[2] == head_dim and q.shape[1] % num_kv_heads == 0
    if lse is not None:
        fits = fits and lse.shape == q.shape[:2] and lse.dtype == torch.float32 and lse.is_contiguous()
    if not fits:
        raise misfit("paged_attention", q=q, k_cache=k_cache, v_cache=v_cache, lse=lse)
    if q.stride(-1) != 1:
        q = q.contiguous()
    k, v = (cache.view(num_pages * page_size, num_kv_heads, head_dim) for cache in (k_cache, v_cache))
    return attend(
        q,
        k,
        v,
        tiles,
        shape,
        page_size=page_size,
        mask=mask,
        scale=scale,
        softcap=softcap,
        lse=lse,
        num_splits=num_splits,
    )


__all__ = ["Shape", "Tiles", "paged_attention", "plan", "shape_for"]
