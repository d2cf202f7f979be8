"""Pointwise gates, computed in float32 and rounded once; one kernel, the formula chosen at compile time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels._triton.launch import ceil_div

BLOCK = 1024
FORMULAS = {"relu_squared": 0, "softcap": 1, "sigmoid_blend": 2, "silu_gate": 3}


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))  # never overflows
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def gate_kernel(x_ptr, gate_ptr, other_ptr, out_ptr, cap, num_elements, FORMULA: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_elements
    x = tl.load(x_ptr + places, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    if FORMULA == 0:
        positive = tl.maximum(wide, 0.0)
        result = positive * positive
    elif FORMULA == 1:
        result = cap * (2.0 * _sigmoid(2.0 * wide / cap) - 1.0)  # tanh
    else:
        gate = tl.load(gate_ptr + places, mask=inside, other=0.0).to(tl.float32)
        share = _sigmoid(gate)
        if FORMULA == 2:
            other = tl.load(other_ptr + places, mask=inside, other=0.0).to(tl.float32)
            result = share * wide + (1.0 - share) * other
        else:
            result = wide * gate * share
    tl.store(out_ptr + places, result.to(x.dtype), mask=inside)


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """See kernels.gates.relu_squared."""
    return _launch("relu_squared", x, x, x)


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """See kernels.gates.softcap."""
    return _launch("softcap", x, x, x, cap)


def sigmoid_blend(gate: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """See kernels.gates.sigmoid_blend."""
    return _launch("sigmoid_blend", first, gate, second)


def silu_gate(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """See kernels.gates.silu_gate."""
    return _launch("silu_gate", x, gate, x)


def _launch(formula: str, x: torch.Tensor, gate: torch.Tensor, other: torch.Tensor, cap: float = 1.0) -> torch.Tensor:
    x, gate, other = x.contiguous(), gate.contiguous(), other.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        gate_kernel[(ceil_div(out.numel(), BLOCK),)](
            x, gate, other, out, cap, out.numel(), FORMULA=FORMULAS[formula], BLOCK=BLOCK
        )
    return out
