"""Pointwise gates beside SwiGLU: squared ReLU, the soft cap of logits, a sigmoid blend of two branches, a SiLU gate."""

from __future__ import annotations

from typing import NoReturn

import torch

from kernels.dispatch import twin


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """`max(x, 0)^2`. x: any shape; returns a new tensor like `x`."""
    triton = twin("gates", x)
    return torch.relu(x).square_() if triton is None else triton.relu_squared(x)


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """`cap * tanh(x / cap)`, computed in float32, like `x`. Raises ValueError when cap is not positive."""
    if cap <= 0:
        raise ValueError(f"softcap: the cap must be positive, got {cap}")
    triton = twin("gates", x)
    if triton is not None:
        return triton.softcap(x, cap)  # type: ignore[no-any-return]
    return x.float().div(cap).tanh_().mul_(cap).to(x.dtype)


def sigmoid_blend(gate: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """`g * first + (1 - g) * second` with `g = sigmoid(gate)`; equal shapes and dtypes, a new tensor like `first`."""
    if not (gate.shape == first.shape == second.shape and gate.dtype == first.dtype == second.dtype):
        _refuse("sigmoid_blend", gate, first, second)
    triton = twin("gates", first)
    if triton is not None:
        return triton.sigmoid_blend(gate, first, second)  # type: ignore[no-any-return]
    return torch.lerp(second.float(), first.float(), torch.sigmoid(gate.float())).to(first.dtype)


def silu_gate(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`x * gate * sigmoid(gate)`; equal shapes and dtypes, a new tensor like `x`."""
    if x.shape != gate.shape or x.dtype != gate.dtype:
        _refuse("silu_gate", x, gate)
    triton = twin("gates", x)
    if triton is not None:
        return triton.silu_gate(x, gate)  # type: ignore[no-any-return]
    return torch._C._nn.silu(gate).mul_(x)


def _refuse(op: str, *tensors: torch.Tensor) -> NoReturn:
    raise ValueError(f"{op}: shapes and dtypes differ: {[(tuple(t.shape), t.dtype) for t in tensors]}")
