"""Writing keys and values into a paged cache, copying its pages, and the arithmetic of slots.

A cache is [num_pages, page_size, Hk, D]. A *slot* is a token's place in it: `page * page_size + offset`. A page table
row lists the pages of one sequence in order. Which page belongs to whom is the engine's business.
"""

from __future__ import annotations

import torch

from kernels.dispatch import fused
from kernels.quantised_pages import KVPages, QuantisedPages


def write_pages(k_cache: KVPages, v_cache: KVPages, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """Store keys and values [T, Hk, D] at `slots` [T] int64 of both caches [num_pages, page_size, Hk, D], in place.

    Caches must be contiguous, both plain or both quantised; slots must be distinct and on the cache's device.
    """
    if isinstance(k_cache, QuantisedPages) and isinstance(v_cache, QuantisedPages):
        k_cache.write(k, slots)
        v_cache.write(v, slots)
        return
    assert isinstance(k_cache, torch.Tensor) and isinstance(v_cache, torch.Tensor)
    quick = fused("pages", k)
    if quick is not None:
        quick.write_pages(k_cache, v_cache, k, v, slots)
        return
    num_slots = k_cache.shape[0] * k_cache.shape[1]
    for cache, rows in ((k_cache, k), (v_cache, v)):
        cache.view(num_slots, *cache.shape[2:]).index_copy_(0, slots, rows)


def copy_pages(k_cache: torch.Tensor, v_cache: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor) -> None:
    """Copy whole pages `sources` [n] onto `targets` [n] in both caches, in place; both int64, on the caches' device.

    All sources are read before any target is written; targets must be distinct.
    """
    for cache in (k_cache, v_cache):
        cache.index_copy_(0, targets, cache.index_select(0, sources))


def kv_slots(page_table_row: torch.Tensor, kv_len: int, page_size: int) -> torch.Tensor:
    """Slots of positions `0 .. kv_len - 1` of one sequence: [kv_len] int64. page_table_row: [P] integer."""
    pages = page_table_row[: -(-kv_len // page_size)].to(torch.int64)
    offsets = torch.arange(page_size, device=pages.device)
    return (pages[:, None] * page_size + offsets).reshape(-1)[:kv_len]
