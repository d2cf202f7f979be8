"""SwiGLU and GELU, elementwise, computed in float32 and rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels._triton.launch import ceil_div

BLOCK = 1024
FORMULAS = {"erf": 0, "tanh": 1, "sigmoid": 2}


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))  # never overflows
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, row_stride, width, num_elements, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_elements
    start = gate_up_ptr + (places // width) * row_stride + places % width
    gate = tl.load(start, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    up = tl.load(start + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, (wide * _sigmoid(wide) * up).to(gate.dtype), mask=inside)


@triton.jit
def gelu_kernel(x_ptr, out_ptr, num_elements, FORMULA: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_elements
    x = tl.load(x_ptr + places, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    if FORMULA == 2:
        result = wide * _sigmoid(1.702 * wide)
    elif FORMULA == 1:
        inner = 0.7978845608028654 * (wide + 0.044715 * wide * wide * wide)
        result = wide * _sigmoid(2.0 * inner)  # 0.5 * (1 + tanh(y)) == sigmoid(2 y)
    else:
        result = 0.5 * wide * (1.0 + tl.math.erf(wide * 0.7071067811865476))
    tl.store(out_ptr + places, result.to(x.dtype), mask=inside)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """See kernels.activation.swiglu."""
    width = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        rows = gate_up.reshape(-1, 2 * width)
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        swiglu_kernel[(ceil_div(out.numel(), BLOCK),)](rows, out, rows.stride(0), width, out.numel(), BLOCK=BLOCK)
    return out


def gelu(x: torch.Tensor) -> torch.Tensor:
    """See kernels.activation.gelu."""
    return _gelu(x, "erf")


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """See kernels.activation.gelu_tanh."""
    return _gelu(x, "tanh")


def gelu_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """See kernels.activation.gelu_sigmoid."""
    return _gelu(x, "sigmoid")


def _gelu(x: torch.Tensor, formula: str) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if out.numel():
        gelu_kernel[(ceil_div(out.numel(), BLOCK),)](x, out, out.numel(), FORMULA=FORMULAS[formula], BLOCK=BLOCK)
    return out
