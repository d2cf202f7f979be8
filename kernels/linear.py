"""A linear layer, whatever its weight is: a plain tensor, one with its half beside it, or 8-bit or 4-bit numbers.

Models call this and nothing else for their projections, so that how weights are stored is nobody's business but the
loader's.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F

from kernels._native.limits import CACHED_WEIGHTS, FEW_ROWS, MIN_COLUMNS
from kernels.dispatch import deciding, native
from kernels.halved_matrix import HalvedMatrix
from kernels.invariance import in_tiles, is_batch_invariant
from kernels.quantised_matrix import QuantisedMatrix

Weight: TypeAlias = torch.Tensor | HalvedMatrix | QuantisedMatrix


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias`: x [T, K], weight [N, K], bias [N] or None, of one floating dtype. Returns [T, N].

    Few rows on the CPU take the C path: torch's own costs 15 to 20 us a call in bfloat16 whatever the size, reads a
    large matrix with one thread where the rows are fewer than four, and one that no cache holds at a third of the
    memory's rate (1024 x 256 in float32: 121 us for one row, 39 in C). It rounds the result once, as torch does.
    """
    if is_batch_invariant():
        return in_tiles(lambda rows: _linear(rows, weight, bias), x)
    return _linear(x, weight, bias)


def _linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    if not isinstance(weight, torch.Tensor):
        return weight.linear(x, bias)
    if 0 < x.shape[0] <= FEW_ROWS and (x.dtype == torch.bfloat16 or weight.numel() >= CACHED_WEIGHTS):
        fits = weight.shape[0] >= MIN_COLUMNS and weight.is_contiguous()
        quick = native("linear", deciding(x, weight, bias), x.numel()) if fits else None
        if quick is not None:
            return quick.linear(x, weight, bias)  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)
