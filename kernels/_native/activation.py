"""The gated activation. See kernels.activation."""

from __future__ import annotations

import torch

from kernels._native.library import POINTER, SIZE, row_function

_SWIGLU = row_function("swiglu", POINTER, POINTER, SIZE, SIZE)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [..., 2 * I]."""
    gate_up = gate_up.contiguous()
    inner = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], inner), dtype=gate_up.dtype)
    if out.numel():
        _SWIGLU(out.dtype, out.numel(), gate_up.data_ptr(), out.data_ptr(), out.numel() // inner, inner)
    return out
