"""RMS norms of few rows. See kernels.norm."""

from __future__ import annotations

import torch

from kernels._native.library import POINTER, REAL, SIZE, functions

_RMS_NORM = functions("rms_norm", POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, REAL)
_ADD_RMS_NORM = functions("add_rms_norm", POINTER, POINTER, POINTER, POINTER, SIZE, SIZE, REAL)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight [W, D]: row r of x takes row r % W."""
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    if not x.numel():
        return out
    _RMS_NORM[x.dtype](
        x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, weight.numel() // width, eps
    )
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual: contiguous."""
    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    if not x.numel():
        return out, residual
    _ADD_RMS_NORM[x.dtype](
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width, width, eps
    )
    return out, residual
