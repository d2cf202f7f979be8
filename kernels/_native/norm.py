"""RMS norms. See kernels.norm."""

from __future__ import annotations

import torch

from kernels._native.checks import is_like, misfit
from kernels._native.library import POINTER, REAL, SIZE, row_function

_RMS_NORM = row_function("rms_norm", POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, REAL)
_ADD_RMS_NORM = row_function("add_rms_norm", POINTER, POINTER, POINTER, POINTER, SIZE, SIZE, REAL)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """weight [..., D], of x's dtype and last dimensions, or None. Raises ValueError on others."""
    x, width = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    factors, num_weights = None, 0
    if weight is not None:
        weight = weight.contiguous()
        if not is_like(weight, x.dtype, *tuple(x.shape)[-weight.dim() :]):
            raise misfit("rms_norm", x=x, weight=weight)
        factors, num_weights = weight.data_ptr(), weight.numel() // max(1, width)
    if x.numel():
        _RMS_NORM(
            x.dtype, x.numel(), x.data_ptr(), factors, out.data_ptr(), x.numel() // width, width, num_weights, eps
        )
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """residual: contiguous. Raises ValueError where shapes and dtypes are not the same."""
    x, weight = x.contiguous(), weight.contiguous()
    if not is_like(residual, x.dtype, *x.shape) or not is_like(weight, x.dtype, x.shape[-1]):
        raise misfit("add_rms_norm", x=x, residual=residual, weight=weight)
    out = torch.empty_like(x)
    width = x.shape[-1]
    if not x.numel():
        return out, residual
    _ADD_RMS_NORM(
        x.dtype, x.numel(), x.data_ptr(), residual.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // width,
        width, eps,
    )  # fmt: skip
    return out, residual
