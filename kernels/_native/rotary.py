"""Rotation of heads. See kernels.rotary."""

from __future__ import annotations

import torch

from kernels._native.checks import is_like, misfit
from kernels._native.library import POINTER, SIZE, row_function

_ROTATE = row_function("rotate", POINTER, SIZE, POINTER, POINTER, POINTER, SIZE, SIZE, SIZE)


def rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """x [T, H, D], tokens any distance apart; cos, signed_sin [T, 1, D] float32. Raises ValueError on others."""
    tokens, heads, dim = x.shape
    if x.stride(2) != 1 or x.stride(1) != dim:
        x = x.contiguous()
    cos, signed_sin = cos.contiguous(), signed_sin.contiguous()
    is_table = is_like(cos, torch.float32, tokens, 1, dim) and is_like(signed_sin, torch.float32, tokens, 1, dim)
    if not is_table or dim % 2:
        raise misfit("rotate", x=x, cos=cos, signed_sin=signed_sin)
    out = torch.empty((tokens, heads, dim), dtype=x.dtype)
    _ROTATE(
        x.dtype, x.numel(), x.data_ptr(), x.stride(0), cos.data_ptr(), signed_sin.data_ptr(), out.data_ptr(), tokens,
        heads, dim,
    )  # fmt: skip
    return out
