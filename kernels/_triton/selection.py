"""Ranks inside a diffusion block by comparing every position with every other, then one accept rule."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels._triton.launch import next_power_of_2

RULES = {"count": 0, "threshold": 1, "factor": 2, "entropy": 3}


@triton.jit
def select_kernel(confidence_ptr, open_ptr, parameter_ptr, out_ptr, length, RULE: tl.constexpr, LENGTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LENGTH)
    inside = lanes < length
    confidence = tl.load(confidence_ptr + row * length + lanes, mask=inside, other=0.0)
    is_open = tl.load(open_ptr + row * length + lanes, mask=inside, other=0) != 0
    limit = tl.load(parameter_ptr + row)
    rank = tl.zeros([LENGTH], tl.int32)
    total = tl.zeros([LENGTH], tl.float32)
    for i in range(length):
        other = tl.load(confidence_ptr + row * length + i)
        other_open = tl.load(open_ptr + row * length + i) != 0
        is_ahead = other_open & ((other > confidence) | ((other == confidence) & (i < lanes)))
        rank += is_ahead.to(tl.int32)
        total += tl.where(is_ahead, other, 0.0)
    if RULE == 0:
        accepted = rank < limit
    elif RULE == 1:
        accepted = (confidence >= limit) | (rank == 0)
    elif RULE == 2:
        accepted = (confidence >= 1.0 - limit / (rank + 2).to(tl.float32)) | (rank == 0)
    else:
        accepted = (total + confidence >= -limit) | (rank == 0)
    tl.store(out_ptr + row * length + lanes, (accepted & is_open).to(tl.int8), mask=inside)


def select(rule: str, confidence: torch.Tensor, is_open: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """See kernels.selection."""
    num_rows, length = confidence.shape
    out = torch.empty(num_rows, length, dtype=torch.int8, device=confidence.device)
    if num_rows:
        lanes = next_power_of_2(length)
        select_kernel[(num_rows,)](
            confidence.contiguous(), is_open.contiguous().view(torch.int8), parameter.contiguous(), out, length,
            RULE=RULES[rule], LENGTH=lanes, num_warps=max(1, min(8, lanes // 64)),
        )  # fmt: skip
    return out.view(torch.bool)
