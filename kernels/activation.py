"""Activations and gated activations, elementwise over any leading shape. Knows tensors only."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import ANY_SIZE, fused, twin
from kernels.invariance import in_tiles, is_batch_invariant


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of a fused projection.

    gate_up: [..., 2 * I], gate first, up second. Returns [..., I] of the same dtype.
    Raises ValueError when the last dimension is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: the last dimension holds gate and up and must be even, got {tuple(gate_up.shape)}")
    quick = fused("activation", gate_up, ANY_SIZE)
    if quick is not None:
        return quick.swiglu(gate_up)  # type: ignore[no-any-return]
    return in_tiles(_swiglu, gate_up) if is_batch_invariant() else _swiglu(gate_up)


def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Exact (erf) GELU. x: any shape; returns a new tensor like `x`."""
    triton = twin("activation", x)
    return F.gelu(x) if triton is None else triton.gelu(x)


def gelu_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """GELU in its sigmoid approximation, `x * sigmoid(1.702 x)`. x: any shape; returns a new tensor like `x`."""
    triton = twin("activation", x)
    return torch.sigmoid(1.702 * x).mul_(x) if triton is None else triton.gelu_sigmoid(x)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation. x: any shape; returns a new tensor like `x`."""
    triton = twin("activation", x)
    return F.gelu(x, approximate="tanh") if triton is None else triton.gelu_tanh(x)
