"""Learning rates over a run, as shares of their peak: pure functions of the step, in (0, 1].

A warm-up is a factor, and every factor is at most one, so that no schedule made of them can pass its peak; adding a
floor to a cosine that starts at one would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]


@dataclass(frozen=True, kw_only=True, slots=True)
class CosineSchedule:
    """Linear warm-up to the peak, then half a cosine down to `floor`."""

    steps: int
    warmup_steps: int = 100
    floor: float = 0.01

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup_steps < 0 or not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"{self}: steps are at least 1, warmup_steps at least 0, floor lies in 0..1")

    def __call__(self, step: int) -> float:
        fall = half_cosine(step, self.warmup_steps, self.steps)
        return warm_up(step, self.warmup_steps) * (self.floor + (1.0 - self.floor) * fall)


def warm_up(step: int, warmup_steps: int) -> float:
    """1/warmup_steps at step 0, one from the last step of the warm-up on."""
    return 1.0 if step >= warmup_steps else (step + 1) / warmup_steps


def half_cosine(step: int, start: int, stop: int) -> float:
    """One up to `start`, zero from `stop` on."""
    if step <= start:
        return 1.0
    if step >= stop:
        return 0.0
    return 0.5 * (1.0 + math.cos(math.pi * (step - start) / (stop - start)))
