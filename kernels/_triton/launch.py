"""What the launchers share: tile sizes, and whether kernels are interpreted."""

from __future__ import annotations

import triton
import triton.language as tl

# A plain @triton.jit function tells: under the interpreter it is another class. Asked once, before any launch.


@triton.jit
def _probe(out_ptr):
    tl.store(out_ptr, 0)


IS_INTERPRETED = type(_probe).__name__ == "InterpretedFunction"


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is not below `value` (at least 1)."""
    return 1 << max(0, value - 1).bit_length()


def ceil_div(value: int, by: int) -> int:
    """`value / by`, rounded up."""
    return -(-value // by)
