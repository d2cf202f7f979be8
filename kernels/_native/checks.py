"""The error of a C twin that is asked for what it is not made for.

A pointer carries no dtype, no shape and no end: each twin compares these before it hands pointers over, in one
condition, since a call takes a few microseconds.
"""

from __future__ import annotations

import torch


def misfit(op: str, **tensors: torch.Tensor | None) -> ValueError:
    """To be raised by `op`: what each of its tensors is."""
    described = ", ".join(f"{name} {_described(tensor)}" for name, tensor in tensors.items() if tensor is not None)
    return ValueError(f"{op}: {described} do not fit the C path; mind dtypes, shapes and strides, all on the CPU")


def _described(tensor: torch.Tensor) -> str:
    layout = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
    place = "" if tensor.is_cpu else f" on {tensor.device}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{layout}{place}"


def is_like(tensor: torch.Tensor, dtype: torch.dtype, *shape: int) -> bool:
    """Whether it is a contiguous `dtype` [*shape] on the CPU."""
    return tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.is_cpu
