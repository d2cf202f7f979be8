"""A float32 matrix whose numbers are all bfloat16's, as a checkpoint that was stored in bfloat16 gives them.

A product with a row or two costs the reading of the matrix, and that of its bfloat16 half is half as long. The result
is the same: the numbers are, and sums are float32. More rows are multiplied with the full matrix, which is kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels._native.limits import HALVED_ROWS, MIN_COLUMNS, SMALL_WEIGHTS
from kernels.dispatch import native


class HalvedMatrix:
    """A weight [N, K] in both widths."""

    __slots__ = ("full", "half")

    def __init__(self, full: torch.Tensor, half: torch.Tensor) -> None:
        self.full = full
        self.half = half

    @property
    def shape(self) -> torch.Size:
        return self.full.shape

    @property
    def num_bytes(self) -> int:
        """What a product with one row reads."""
        return 2 * self.half.numel()

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self.full[rows]

    def copy_(self, weight: torch.Tensor) -> None:
        """Other numbers, which must be bfloat16's too."""
        self.full.copy_(weight)
        self.half.copy_(weight)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x @ weight.T + bias`: x [T, K] float32."""
        quick = native("linear", x) if 0 < x.shape[0] <= HALVED_ROWS else None
        if quick is None:
            return F.linear(x, self.full, bias)
        return quick.mixed_linear(x, self.half, bias)  # type: ignore[no-any-return]


def halved(weight: torch.Tensor) -> torch.Tensor | HalvedMatrix:
    """`weight` with its half beside it where that is exact and of use, else `weight` itself."""
    is_served = weight.dtype == torch.float32 and weight.is_contiguous() and weight.shape[0] >= MIN_COLUMNS
    if not is_served or weight.numel() > SMALL_WEIGHTS or native("linear", weight, SMALL_WEIGHTS) is None:
        return weight
    half = weight.to(torch.bfloat16)
    return HalvedMatrix(weight, half) if torch.equal(half.to(torch.float32), weight) else weight
