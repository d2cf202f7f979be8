"""Attention of short causal windows over pages. See kernels.paged_attention."""

from __future__ import annotations

import torch

from kernels._native.checks import is_like, misfit
from kernels._native.library import POINTER, REAL, SIZE, functions
from kernels._native.limits import MAX_HEAD_DIM

_PAGED_ATTENTION = functions(
    "paged_attention",
    POINTER, SIZE, SIZE, POINTER, POINTER, SIZE, POINTER, SIZE, POINTER, SIZE, SIZE, SIZE, SIZE, SIZE, SIZE, REAL,
    POINTER, SIZE,
    returns=SIZE, takes_long=True,
)  # fmt: skip


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, page_table: torch.Tensor, windows: torch.Tensor,
    scale: float, out: torch.Tensor, reach: int = 0,
) -> None:  # fmt: skip
    """Answer some windows into `out` [T, H, D]. page_table [S, P] int64, windows [3, S] int64 (query lengths, key
    lengths, first rows), both contiguous. reach: how many of its last keys a query sees (0: all). Raises ValueError on
    others, and where a window or its pages are not there.
    """
    num_pages, page_size, kv_heads, dim = k_cache.shape
    tokens, heads, _ = q.shape
    is_cache = all(is_like(cache, q.dtype, *k_cache.shape) for cache in (k_cache, v_cache))
    is_planned = page_table.dim() == 2 and is_like(page_table, torch.int64, *page_table.shape)
    is_planned &= is_like(windows, torch.int64, 3, len(page_table))
    is_sized = q.shape[2] == dim <= MAX_HEAD_DIM and heads % kv_heads == 0 and is_like(out, q.dtype, *q.shape)
    if not (is_cache and is_planned and is_sized):
        raise misfit(
            "paged_attention", q=q, k_cache=k_cache, v_cache=v_cache, page_table=page_table, windows=windows, out=out
        )
    if q.stride(2) != 1 or q.stride(1) != dim:
        q = q.contiguous()
    refused = _PAGED_ATTENTION[q.dtype](
        q.data_ptr(), q.stride(0), tokens, k_cache.data_ptr(), v_cache.data_ptr(), num_pages, page_table.data_ptr(),
        page_table.shape[1], windows.data_ptr(), len(page_table), heads, kv_heads, dim, page_size, reach,
        scale, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if refused >= 0:
        raise ValueError(
            f"paged_attention: sequence {refused} has the windows {windows[:, refused].tolist()} (queries, keys, first "
            f"row) and the page_table {page_table[refused].tolist()}, for {tokens} rows and {num_pages} pages of "
            f"{page_size}"
        )
