"""Few rows into pages. See kernels.pages."""

from __future__ import annotations

import torch

from kernels._native.checks import is_like, misfit
from kernels._native.library import POINTER, SIZE, functions

_WRITE_PAGES = functions(
    "write_pages", POINTER, POINTER, POINTER, POINTER, SIZE, SIZE, POINTER, SIZE, SIZE, SIZE, returns=SIZE
)


def write_pages(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor
) -> None:
    """k, v [T, Hk, D], tokens any distance apart; slots [T] int64.

    Raises ValueError on other shapes and dtypes, IndexError for a slot that is not there; nothing is written then.
    """
    tokens, heads, dim = k.shape
    slots = slots.contiguous()
    dtype, (num_pages, page_size, *_) = k.dtype, k_cache.shape
    is_cache = is_like(k_cache, dtype, num_pages, page_size, heads, dim)
    fits = is_cache and is_like(v_cache, dtype, num_pages, page_size, heads, dim)
    if not fits or v.dtype != dtype or v.shape != k.shape or not is_like(slots, torch.int64, tokens):
        raise misfit("write_pages", k_cache=k_cache, v_cache=v_cache, k=k, v=v, slots=slots)
    k, v = (rows if rows.stride(2) == 1 and rows.stride(1) == dim else rows.contiguous() for rows in (k, v))
    num_slots = num_pages * page_size
    refused = _WRITE_PAGES[dtype](
        k_cache.data_ptr(), v_cache.data_ptr(), k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0),
        slots.data_ptr(), num_slots, tokens, heads * dim,
    )  # fmt: skip
    if refused >= 0:
        raise IndexError(f"write_pages: slot {int(slots[refused])} is none of the cache's {num_slots}")
