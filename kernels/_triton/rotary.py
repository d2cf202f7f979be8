"""Rotation of query and key heads by a table of cosines and signed sines; a program owns one token's heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels._triton.launch import misfit, next_power_of_2


@triton.jit
def rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, token_stride, head_stride, num_heads, half,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, HALF)[None, :]
    inside = (heads < num_heads) & (columns < half)
    start = x_ptr + token * token_stride + heads * head_stride + columns
    first = tl.load(start, mask=inside, other=0.0)
    low = first.to(tl.float32)
    high = tl.load(start + half, mask=inside, other=0.0).to(tl.float32)
    angle = token * 2 * half + columns
    valid = columns < half
    cos_low = tl.load(cos_ptr + angle, mask=valid, other=0.0)
    cos_high = tl.load(cos_ptr + angle + half, mask=valid, other=0.0)
    sin_low = tl.load(sin_ptr + angle, mask=valid, other=0.0)  # negated in the table
    sin_high = tl.load(sin_ptr + angle + half, mask=valid, other=0.0)
    target = out_ptr + (token * num_heads + heads) * 2 * half + columns
    tl.store(target, (low * cos_low + high * sin_low).to(first.dtype), mask=inside)
    tl.store(target + half, (high * cos_high + low * sin_high).to(first.dtype), mask=inside)


def rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """See kernels.rotary.rotate; cos, signed_sin: [T, 1, D] float32. Raises ValueError on others and for an odd D."""
    num_tokens, num_heads, head_dim = x.shape
    is_table = cos.shape == signed_sin.shape == (num_tokens, 1, head_dim)
    if not is_table or cos.dtype != torch.float32 or signed_sin.dtype != torch.float32 or head_dim % 2:
        raise misfit("rotate", x=x, cos=cos, signed_sin=signed_sin)
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        half = head_dim // 2
        columns = next_power_of_2(half)
        heads = min(next_power_of_2(num_heads), max(1, 2048 // columns))
        grid = (num_tokens, -(-num_heads // heads))
        rotate_kernel[grid](
            x, cos.contiguous(), signed_sin.contiguous(), out, x.stride(0), x.stride(1), num_heads, half,
            HEADS=heads, HALF=columns, num_warps=max(1, min(8, heads * columns // 256)),
        )  # fmt: skip
    return out
