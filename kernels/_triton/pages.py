"""Keys and values of a step's tokens into their slots: one program per token, both caches."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels._triton.launch import misfit, next_power_of_2


@triton.jit
def write_pages_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    num_heads, head_dim, HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    heads = tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, DIM)[None, :]
    inside = (heads < num_heads) & (columns < head_dim)
    target = slot * num_heads * head_dim + heads * head_dim + columns
    k = tl.load(k_ptr + token * k_token_stride + heads * k_head_stride + columns, mask=inside)
    tl.store(k_cache_ptr + target, k, mask=inside)
    v = tl.load(v_ptr + token * v_token_stride + heads * v_head_stride + columns, mask=inside)
    tl.store(v_cache_ptr + target, v, mask=inside)


def write_pages(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor
) -> None:
    """See kernels.pages.write_pages. Raises ValueError on shapes and strides that do not fit."""
    num_tokens, num_heads, head_dim = k.shape
    are_caches = all(cache.is_contiguous() and cache.shape[2:] == k.shape[1:] for cache in (k_cache, v_cache))
    if not are_caches or k_cache.shape != v_cache.shape or v.shape != k.shape or slots.shape != k.shape[:1]:
        raise misfit("write_pages", k_cache=k_cache, v_cache=v_cache, k=k, v=v, slots=slots)
    if not k.numel():
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    heads, columns = next_power_of_2(num_heads), next_power_of_2(head_dim)
    write_pages_kernel[(num_tokens,)](
        k, v, k_cache, v_cache, slots.contiguous(), k.stride(0), k.stride(1), v.stride(0), v.stride(1), num_heads,
        head_dim, HEADS=heads, DIM=columns, num_warps=max(1, min(8, heads * columns // 256)),
    )  # fmt: skip
