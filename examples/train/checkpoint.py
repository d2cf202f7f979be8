"""Everything that a run goes on from: weights, optimizer, scaler, average, random streams, and how far it is.

One snapshot serves twice. In memory it is what a roll-back returns to: weights and optimizer, while the step and the
streams go on, or the same batch would come again. In a file it is all that a resume needs to go on bit for bit. A file
is read as tensors and plain values, nothing that runs, and only by a run with the plan that wrote it.
"""

from __future__ import annotations

import copy
import os
import random
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch.optim import Optimizer

from examples.train.average import WeightAverage
from examples.train.errors import ResumeError
from examples.train.guards import LossSpikes
from examples.train.precision import Precision

FORMAT = 1
Stream = random.Random | numpy.random.Generator
Snapshot = dict[str, Any]


class TrainState:
    """What changes in the course of a run; all of it is in a snapshot."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        precision: Precision,
        *,
        average: WeightAverage[Any] | None,
        streams: Sequence[Stream],
        plan: Mapping[str, int | float | str],
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scaler = precision.scaler
        self.average = average
        self.streams = list(streams)
        self.plan = {**plan, "precision": precision.name}
        self.spikes = LossSpikes()
        self.step = 0
        self.rate_factor = 1.0
        self.num_rollbacks = 0

    def snapshot(self) -> Snapshot:
        """A copy that later steps leave alone."""
        learned = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": self.average.model.state_dict() if self.average else {},
        }
        return {
            "format": FORMAT,
            "plan": dict(self.plan),
            "learned": copy.deepcopy(learned),
            "step": self.step,
            "rate_factor": self.rate_factor,
            "num_rollbacks": self.num_rollbacks,
            "losses": list(self.spikes.history),
            "torch_stream": torch.get_rng_state(),
            "streams": [_stream_state(stream) for stream in self.streams],
        }

    def roll_back(self, snapshot: Snapshot) -> None:
        """Take back what was learned since; the step and the random streams stay where they are."""
        learned = copy.deepcopy(snapshot["learned"])
        self.model.load_state_dict(learned["model"])
        self.optimizer.load_state_dict(learned["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(learned["scaler"])
        if self.average is not None:
            self.average.model.load_state_dict(learned["average"])

    def resume(self, snapshot: Snapshot) -> None:
        """Go on as if the run that made the snapshot had not stopped. Raises ResumeError if that was another run."""
        if changed := [key for key in self.plan | snapshot["plan"] if self.plan.get(key) != snapshot["plan"].get(key)]:
            said = ", ".join(f"{key} {snapshot['plan'].get(key)!r}, not {self.plan.get(key)!r}" for key in changed)
            raise ResumeError(f"the state was made with {said}: go on with the same settings, or start with a new file")
        self.roll_back(snapshot)
        self.step = snapshot["step"]
        self.rate_factor = snapshot["rate_factor"]
        self.num_rollbacks = snapshot["num_rollbacks"]
        self.spikes.history.clear()
        self.spikes.history.extend(snapshot["losses"])
        torch.set_rng_state(snapshot["torch_stream"])
        for stream, state in zip(self.streams, snapshot["streams"], strict=True):
            _set_stream_state(stream, state)


def write_snapshot(snapshot: Snapshot, path: Path) -> None:
    """Whole or not at all: whoever stops in the middle leaves the file that was there."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(snapshot, unfinished)
    os.replace(unfinished, path)


def read_snapshot(path: Path) -> Snapshot:
    """Raises ResumeError where the file is no state of a run."""
    if not zipfile.is_zipfile(path):
        raise ResumeError(f"{path} is no state of a training run, or only part of one: remove it, or name another file")
    try:
        snapshot = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch makes of a file that is something else
        raise ResumeError(f"{path} is no state of a training run ({type(error).__name__}): name another file") from None
    if not isinstance(snapshot, dict) or snapshot.get("format") != FORMAT:
        raise ResumeError(f"{path} is no state of a training run in format {FORMAT}: name another file")
    return snapshot


def _stream_state(stream: Stream) -> Any:
    return stream.getstate() if isinstance(stream, random.Random) else stream.bit_generator.state


def _set_stream_state(stream: Stream, state: Any) -> None:
    if isinstance(stream, random.Random):
        stream.setstate(state)
    else:
        stream.bit_generator.state = state
