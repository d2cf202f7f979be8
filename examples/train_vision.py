"""First phase: teach the vision tower alone to see digits, their order and their colour in every cell.

Three linear heads read each merged 28x28 cell: which digit's centre lies in this column (or none), which digit
of the number it is, counted from the left, and the ink's colour. They exist only while training; no checkpoint
holds them. A tower that already answers these lets the text half learn to read in a few hundred steps, where
learning both at once leaves the loss flat for thousands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from examples.augment import NO_DIGIT, NO_ORDER, PictureBatch, draw_batch
from examples.digits import COLOURS, MAX_DIGITS
from examples.train.checkpoint import TrainState
from examples.train.masks import count_labels, masked_mean
from examples.train.precision import Precision, PrecisionName
from examples.train.schedule import CosineSchedule
from examples.train.trainer import Report, Share, Trainer, split_evenly
from examples.train_model import VisionShape, VisionTower


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionPlan:
    """How long and how hard the first phase trains."""

    steps: int = 2800
    batch_size: int = 64
    num_micro_batches: int = 1
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    precision: PrecisionName = "bfloat16"


class CellHeads(nn.Module):
    """The auxiliary classifiers: one linear layer, its outputs split three ways."""

    sizes = (NO_DIGIT + 1, NO_ORDER + 1, len(COLOURS))

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, rows: Tensor, batch: PictureBatch, num_cells: int) -> tuple[Tensor, dict[str, float]]:
        """Summed loss, and the share of real cells that each head gets right, both over `num_cells`."""
        outputs = self.linear(rows.float()).float().split(self.sizes, dim=-1)
        labels = (batch.digit_labels, batch.order_labels, batch.colour_labels)
        losses = [masked_mean(output, label, num_cells) for output, label in zip(outputs, labels, strict=True)]
        right = {
            name: int((output.argmax(-1) == label).sum()) / max(num_cells, 1)
            for name, output, label in zip(("digit", "order", "colour"), outputs, labels, strict=True)
        }
        return losses[0] + 0.5 * losses[1] + 0.3 * losses[2], right


@dataclass(frozen=True, kw_only=True, slots=True)
class Seeing:
    """The objective: every cell of every picture told."""

    tower: VisionTower
    heads: CellHeads
    precision: Precision

    def counts(self, batch: PictureBatch) -> dict[str, int]:
        return {"cells": count_cells(batch)}

    def share(self, batch: PictureBatch, step: int, counts: Mapping[str, int]) -> Share:
        with self.precision.autocast():
            rows = self.tower(batch.patches, batch.cells_wide)
        loss, right = self.heads(rows, batch, counts["cells"])
        return Share(loss, right)


def count_cells(batch: PictureBatch) -> int:
    """Cells that are picture and not canvas padding; they carry a label of each kind."""
    return count_labels(batch.digit_labels)


def train_vision(
    seed: int, out_size: int, plan: VisionPlan, report: Report, state_file: Path | None = None
) -> tuple[VisionTower, CellHeads]:
    """A tower whose rows tell digit, order and colour of every cell."""
    torch.manual_seed(seed)
    rng = numpy.random.default_rng([seed, 1])
    tower, heads = VisionTower(VisionShape(), out_size), CellHeads(out_size)
    parts = nn.ModuleDict({"visual": tower, "heads": heads})
    optimizer = torch.optim.AdamW(
        parts.parameters(), plan.learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay
    )
    precision = Precision(plan.precision)
    state = TrainState(
        parts, optimizer, precision, average=None, streams=[rng], plan={"phase": "seeing", "seed": seed, **asdict(plan)}
    )

    def draw(step: int) -> list[PictureBatch]:
        max_digits = 2 if step < 100 else MAX_DIGITS
        return [draw_batch(rng, size, max_digits) for size in split_evenly(plan.batch_size, plan.num_micro_batches)]

    objective = Seeing(tower=tower, heads=heads, precision=precision)
    schedule = CosineSchedule(steps=plan.steps)
    Trainer(state, objective, draw, schedule, steps=plan.steps, state_file=state_file).run(report)
    return tower, heads
