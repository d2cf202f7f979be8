"""Attention of short causal windows over pages. See kernels.paged_attention."""

from __future__ import annotations

import torch

from kernels._native.library import POINTER, REAL, SIZE, functions

MAX_HEAD_DIM = 256  # of a head, as attention.c has it

_PAGED_ATTENTION = functions(
    "paged_attention",
    POINTER, SIZE, POINTER, POINTER, POINTER, SIZE, POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, SIZE, SIZE, REAL,
    POINTER, takes_long=True,
)  # fmt: skip


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, page_table: torch.Tensor, windows: torch.Tensor,
    scale: float, out: torch.Tensor,
) -> None:  # fmt: skip
    """Answer some windows into `out` [T, H, D]. page_table [S, P] int64, windows [3, S] int64 (query lengths, key
    lengths, first rows), both contiguous."""
    _, page_size, kv_heads, dim = k_cache.shape
    if q.stride(2) != 1 or q.stride(1) != dim:
        q = q.contiguous()
    sequences, lens = windows.shape[1], windows.data_ptr()
    _PAGED_ATTENTION[q.dtype](
        q.data_ptr(), q.stride(0), k_cache.data_ptr(), v_cache.data_ptr(), page_table.data_ptr(),
        page_table.shape[1], lens, lens + 8 * sequences, lens + 16 * sequences, sequences, q.shape[1], kv_heads, dim,
        page_size, scale, out.data_ptr(),
    )  # fmt: skip
