"""The loop: draws a step's micro-batches, adds up their gradients, and takes one step of the optimizer.

A step's loss is a mean over all its labels, however they are spread over micro-batches: labels are counted first, and
every micro-batch divides by the count of the whole step. So the accumulated gradient is the big batch's, which a mean
of means is only where all micro-batches hold equally many labels.

A loss, gradient or weight that is not finite takes the run back to its last snapshot at half the learning rate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from examples.train.checkpoint import Snapshot, TrainState, read_snapshot, write_snapshot
from examples.train.errors import NonFiniteError
from examples.train.guards import NORM, broken_gradient, broken_parameter, locate
from examples.train.schedule import Schedule

Batch = TypeVar("Batch")
BatchIn = TypeVar("BatchIn", contravariant=True)
LEAST_SCALE = 1.0  # a gradient that overflows unscaled is no matter of the scale


@dataclass(frozen=True, slots=True)
class Share:
    """What one micro-batch adds to its step's loss and figures; all shares of a step add up."""

    loss: Tensor
    figures: Mapping[str, float]


class Objective(Protocol[BatchIn]):
    """What is minimised."""

    def counts(self, batch: BatchIn) -> Mapping[str, int]:
        """How many labels of each kind the micro-batch holds."""

    def share(self, batch: BatchIn, step: int, counts: Mapping[str, int]) -> Share:
        """The micro-batch's share; `counts` are those of the whole step."""


class Report(Protocol):
    """Who is told of a run's progress."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """After every step, counted from 1; a step that was taken back has no figures."""

    def note(self, text: str) -> None:
        """Something a person should know."""


def split_evenly(size: int, parts: int) -> list[int]:
    """Sizes of the micro-batches of one batch, the larger ones first; they differ by one at most."""
    if not 1 <= parts <= max(size, 1):
        raise ValueError(f"a batch of {size} cannot be split into {parts} micro-batches: take 1 to {size}")
    return [size // parts + (part < size % parts) for part in range(parts)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds of a run, whatever it learns."""

    clip_norm: float = 1.0
    snapshot_every: int = 250
    max_rollbacks: int = 3


class Trainer(Generic[Batch]):
    """One run from `state.step` to `steps`; rates of the optimizer's groups are the peaks of the schedule."""

    def __init__(
        self,
        state: TrainState,
        objective: Objective[Batch],
        draw: Callable[[int], Sequence[Batch]],
        schedule: Schedule,
        *,
        steps: int,
        limits: Limits | None = None,
        state_file: Path | None = None,
    ) -> None:
        self.state, self.objective, self.draw, self.schedule = state, objective, draw, schedule
        self.steps, self.limits, self.state_file = steps, limits or Limits(), state_file
        self._peaks = [float(group["lr"]) for group in state.optimizer.param_groups]
        self._parameters = list(state.model.parameters())

    def run(self, report: Report, on_snapshot: Callable[[int], None] | None = None) -> None:
        """Train to the end, from where the state file stands if there is one; `on_snapshot` is told the step of each.

        Raises NonFiniteError when rolling back has not helped, with the weights of the last snapshot in the model,
        and ResumeError if the state file belongs to another run.
        """
        state, every = self.state, self.limits.snapshot_every
        if self.state_file is not None and self.state_file.exists():
            state.resume(read_snapshot(self.state_file))
            report.note(f"going on from step {state.step} of {self.state_file}")
        good = state.snapshot()
        while state.step < self.steps:
            is_due = (state.step + 1) % every == 0 or state.step + 1 == self.steps
            figures: Mapping[str, float] = {}
            try:
                figures = self._step(report)
                if is_due and (broken := broken_parameter(state.model, state.step)) is not None:
                    raise broken
            except NonFiniteError as error:
                self._roll_back(good, error, report)
            state.step += 1
            report.figures(state.step, figures)
            if is_due:
                good = state.snapshot()
                if self.state_file is not None:
                    write_snapshot(good, self.state_file)
                if on_snapshot is not None:
                    on_snapshot(state.step)

    def _step(self, report: Report) -> dict[str, float]:
        state = self.state
        share_of_peak = self.schedule(state.step) * state.rate_factor
        for group, peak in zip(state.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * share_of_peak
        state.optimizer.zero_grad(set_to_none=True)
        figures = self._accumulate(self.draw(state.step))
        if self._update() and state.average is not None:
            state.average.update(state.step)
        if (ratio := state.spikes.observe(figures["loss"])) is not None:
            report.note(f"step {state.step}: the loss {figures['loss']:.4g} is {ratio:.1f} times the recent median")
        return figures

    def _accumulate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Backward passes of all micro-batches, and the step's figures."""
        state = self.state
        counts: Counter[str] = Counter()
        for batch in batches:
            counts.update(self.objective.counts(batch))
        figures = {"loss": 0.0}
        for batch in batches:
            before = torch.get_rng_state()
            share = self.objective.share(batch, state.step, counts)
            loss = share.loss.item()
            if not math.isfinite(loss):
                torch.set_rng_state(before)
                again = partial(self.objective.share, batch, state.step, counts)
                raise locate(state.model, again, state.step)
            state.scaler.scale(share.loss).backward()  # type: ignore[no-untyped-call]
            for name, value in {"loss": loss, **share.figures}.items():
                figures[name] = figures.get(name, 0.0) + value
        return figures

    def _update(self) -> bool:
        """Step the optimizer; False if the scaler left the step out because gradients overflowed."""
        state, scale = self.state, self.state.scaler.get_scale()
        state.scaler.unscale_(state.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        error = None if bool(norm.isfinite()) else broken_gradient(state.model, state.step)
        is_fatal = error is not None and (scale <= LEAST_SCALE or error.place == NORM)
        if not is_fatal:
            nn.utils.clip_grads_with_norm_(self._parameters, self.limits.clip_norm, norm)
            state.scaler.step(state.optimizer)
        state.scaler.update()  # in any case: it forgets what unscale_ has noted
        if error is not None and is_fatal:
            raise error
        return error is None

    def _roll_back(self, good: Snapshot, error: NonFiniteError, report: Report) -> None:
        state = self.state
        state.roll_back(good)
        state.num_rollbacks += 1
        if state.num_rollbacks > self.limits.max_rollbacks:
            raise error
        state.rate_factor *= 0.5
        report.note(f"{error}. Back to the weights of step {good['step']}, at {state.rate_factor:g} of the rate")
