"""An exponential moving average of a model's weights, steadier than the last step's.

It starts as the weights themselves and slows down to its final decay, so that the random beginning is soon forgotten.
"""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class WeightAverage(Generic[Model]):
    """`model` holds the average of `source`; its decay after step s is min(decay, (s + 1) / (s + delay))."""

    def __init__(self, source: Model, *, decay: float, delay: int) -> None:
        self.source = source
        self.model = copy.deepcopy(source)
        self.decay = decay
        self.delay = delay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights that step `step` (from 0) has left."""
        decay = min(self.decay, (step + 1) / (step + self.delay))
        for kept, current in zip(self.model.parameters(), self.source.parameters(), strict=True):
            kept.lerp_(current, 1.0 - decay)
        for own, now in zip(self.model.buffers(), self.source.buffers(), strict=True):
            own.copy_(now)
