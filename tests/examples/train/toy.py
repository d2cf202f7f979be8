"""A model, an objective and a run small enough to check by hand."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from examples.train.average import WeightAverage
from examples.train.checkpoint import TrainState
from examples.train.masks import IGNORED, count_labels, masked_mean
from examples.train.precision import Precision, PrecisionName
from examples.train.schedule import CosineSchedule
from examples.train.trainer import Limits, Share, Trainer

VOCABULARY, WIDTH = 11, 6
Tokens = tuple[Tensor, Tensor]  # ids and labels [L]


class Block(nn.Module):
    """Has a part of its own beside its children's: the root between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.shift = 1.0

    def forward(self, x: Tensor) -> Tensor:
        inner = (self.up(x).square() + self.shift).sqrt()
        out: Tensor = x + self.down(inner)
        return out


class Toy(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = self.dropout(block(x))
        logits: Tensor = self.head(x)
        return logits


@dataclass(frozen=True, kw_only=True)
class Telling:
    """Cross entropy of all labels, enlarged by `factor`."""

    model: nn.Module
    precision: Precision
    factor: float = 1.0

    def counts(self, batch: Tokens) -> dict[str, int]:
        return {"tokens": count_labels(batch[1])}

    def share(self, batch: Tokens, step: int, counts: Mapping[str, int]) -> Share:
        with self.precision.autocast():
            logits = self.model(batch[0])
        return Share(self.factor * masked_mean(logits, batch[1], counts["tokens"]), {"tokens": float(len(batch[0]))})


@dataclass
class Heard:
    """What a report was told."""

    steps: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        self.steps.append((step, dict(figures)))

    def note(self, text: str) -> None:
        self.notes.append(text)


class Run:
    """A trainer of a Toy on random tokens; every random stream that a run may have is used."""

    def __init__(
        self,
        *,
        steps: int = 12,
        every: int = 3,
        precision: PrecisionName = "float32",
        factor: float = 1.0,
        dropout: float = 0.3,
        max_rollbacks: int = 3,
        state_file: Path | None = None,
        plan: Mapping[str, Any] | None = None,
    ) -> None:
        torch.manual_seed(7)
        self.random, self.numpy = random.Random(7), numpy.random.default_rng(7)
        self.model = Toy(dropout)
        self.average = WeightAverage(self.model, decay=0.9, delay=5)
        self.optimizer = torch.optim.AdamW(
            [{"params": self.model.embed.parameters(), "lr": 0.02}, {"params": self.rest(), "lr": 0.05}]
        )
        chosen = Precision(precision)
        self.state = TrainState(
            self.model,
            self.optimizer,
            chosen,
            average=self.average,
            streams=[self.random, self.numpy],
            plan=plan or {"steps": steps},
        )
        self.heard = Heard()
        self.trainer = Trainer(
            self.state,
            Telling(model=self.model, precision=chosen, factor=factor),
            self.draw,
            CosineSchedule(steps=steps, warmup_steps=3),
            steps=steps,
            limits=Limits(snapshot_every=every, max_rollbacks=max_rollbacks),
            state_file=state_file,
        )

    def rest(self) -> list[nn.Parameter]:
        return [p for name, p in self.model.named_parameters() if not name.startswith("embed")]

    def draw(self, step: int) -> Sequence[Tokens]:
        """Two micro-batches of different lengths; some positions carry no loss."""
        batches = []
        for _ in range(2):
            length = self.random.randint(4, 9)
            ids = torch.from_numpy(self.numpy.integers(VOCABULARY, size=length))
            labels = torch.randint(VOCABULARY, (length,))
            labels[:2] = IGNORED
            batches.append((ids, labels))
        return batches

    def go(self) -> Run:
        self.trainer.run(self.heard)
        return self


def bits(value: Any) -> Any:
    """A value in which tensors are bytes, so that `==` compares bit for bit."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, Mapping):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(part) for part in value]
    return value


def weights(model: nn.Module) -> Any:
    return bits(model.state_dict())
