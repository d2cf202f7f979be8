"""The gated activation. See kernels.activation."""

from __future__ import annotations

import torch

from kernels._native.library import POINTER, SIZE, row_function

_SWIGLU = row_function("swiglu", POINTER, POINTER, SIZE, SIZE)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [..., 2 * I]."""
    gate_up = gate_up.contiguous()
    *leading, width = gate_up.shape
    out = torch.empty((*leading, width // 2), dtype=gate_up.dtype)
    numbers = out.numel()
    if numbers:
        inner = width // 2
        _SWIGLU(gate_up.dtype, numbers, gate_up.data_ptr(), out.data_ptr(), numbers // inner, inner)
    return out
