"""A matrix of whole numbers of 4 or 8 bits, with a scale and a zero per group of inputs, as checkpoints hold it.

    weight[o, i] = (numbers[o, i] - zeros[o, groups[i]]) * scales[o, groups[i]]

How the public layouts pack one is in `packed_layouts.py`.
"""

from __future__ import annotations

import dataclasses

import torch

CHUNK_NUMBERS = 1 << 22  # of a matrix, in float32 beside its result at one time


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GroupedWeight:
    """See the module: numbers [out, in] uint8, scales [out, G] float32, zeros [out, G] uint8, groups [in] int64."""

    bits: int
    numbers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    groups: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that it holds."""
        return self.numbers, self.scales, self.zeros, self.groups

    def dequantised(self) -> torch.Tensor:
        """The weight [out, in] in float32, which holds it exactly where the scales are of 16 bits."""
        weight = torch.empty(self.numbers.shape)
        step = max(1, CHUNK_NUMBERS // max(1, weight.shape[1]))
        for first in range(0, len(weight), step):
            rows = slice(first, first + step)
            torch.sub(self.numbers[rows].float(), self.zeros[rows].float()[:, self.groups], out=weight[rows])
            weight[rows] *= self.scales[rows][:, self.groups]
        return weight
