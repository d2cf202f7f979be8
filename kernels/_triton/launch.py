"""What the launchers share: tile sizes, the error of what does not fit, and whether kernels are interpreted."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# A plain @triton.jit function tells: under the interpreter it is another class. Asked once, before any launch.


@triton.jit
def _probe(out_ptr):
    tl.store(out_ptr, 0)


IS_INTERPRETED = type(_probe).__name__ == "InterpretedFunction"


def misfit(op: str, **tensors: torch.Tensor | None) -> ValueError:
    """To be raised by a launcher: what each of its tensors is. A pointer carries no shape and no end, so what torch's
    path refuses would be read or written past its end here."""
    described = (
        f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        f"{'' if tensor.is_contiguous() else f' with strides {tensor.stride()}'}"
        for name, tensor in tensors.items()
        if tensor is not None
    )
    return ValueError(f"{op}: {', '.join(described)} do not fit the Triton path")


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is not below `value` (at least 1)."""
    return 1 << max(0, value - 1).bit_length()


def ceil_div(value: int, by: int) -> int:
    """`value / by`, rounded up."""
    return -(-value // by)
