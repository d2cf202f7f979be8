"""Few rows into pages. See kernels.pages."""

from __future__ import annotations

import torch

from kernels._native.library import POINTER, SIZE, functions

_WRITE_PAGES = functions("write_pages", POINTER, POINTER, POINTER, POINTER, SIZE, SIZE, POINTER, SIZE, SIZE)


def write_pages(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor
) -> None:
    """k, v [T, Hk, D], tokens any distance apart; slots [T] int64 contiguous."""
    tokens, heads, dim = k.shape
    k, v = (rows if rows.stride(2) == 1 and rows.stride(1) == dim else rows.contiguous() for rows in (k, v))
    _WRITE_PAGES[k.dtype](
        k_cache.data_ptr(), v_cache.data_ptr(), k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0),
        slots.data_ptr(), tokens, heads * dim,
    )  # fmt: skip
