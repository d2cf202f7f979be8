"""First phase of the reader: its tower and projector alone learn which digit stands in every column of a picture.

Linear heads read every row, and every column's rows together: the digit whose centre is in the column (or none), and
the how-many-th of the number it is; and all rows together: the ink's colour. They exist only while training; no
checkpoint holds them. A column's rows together are easier than each of them, and get the learning off the ground.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from examples.augment import NO_DIGIT, PictureBatch, draw_batch
from examples.digits import COLOURS, MAX_DIGITS
from examples.reader import FEATURES, column_labels, squares
from examples.reader_model import HIDDEN, Tower
from examples.train.average import WeightAverage
from examples.train.checkpoint import TrainState
from examples.train.masks import masked_mean
from examples.train.precision import Precision
from examples.train.schedule import CosineSchedule
from examples.train.trainer import Limits, Report, Share, Trainer, split_evenly


@dataclass(frozen=True, kw_only=True, slots=True)
class SeeingPlan:
    """How long and how hard the first phase trains."""

    steps: int = 3600
    batch_size: int = 48
    num_micro_batches: int = 1
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    average_decay: float = 0.995
    warp: float = 0.5
    snapshot_every: int = 200


class ColumnHeads(nn.Module):
    """Of every row: the digit whose centre is in its column and its place in the number; of all: the colour."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.Linear(HIDDEN, 2 * (NO_DIGIT + 1))
        self.colour = nn.Linear(HIDDEN, len(COLOURS))

    def forward(self, rows: Tensor, pictures: PictureBatch, num_pictures: int) -> tuple[Tensor, dict[str, float]]:
        """Summed loss, and shares of right columns and colours, as parts of a step of `num_pictures`."""
        digits, order = column_labels(pictures, pictures.numbers, NO_DIGIT)
        digit_scores, order_scores = self.columns(rows).unflatten(1, (FEATURES, FEATURES)).chunk(2, dim=-1)
        colour_scores = self.colour(rows.mean(1))
        colours = torch.tensor([list(COLOURS).index(colour) for colour in pictures.colours])
        num_rows = num_pictures * FEATURES**2
        loss = 0.2 * masked_mean(colour_scores, colours, num_pictures)
        for scores, labels, weight in ((digit_scores, digits, 1.0), (order_scores, order, 0.5)):
            loss = loss + weight * masked_mean(scores, _in_every_line(labels), num_rows)
            loss = loss + weight * masked_mean(scores.mean(1), labels, num_pictures * FEATURES)
        share, has_digit = len(digits) / num_pictures, digits != NO_DIGIT
        guessed = digit_scores.mean(1).argmax(-1)
        figures = {
            "digit": share * float((guessed == digits)[has_digit].float().mean()),
            "colour": share * float((colour_scores.argmax(-1) == colours).float().mean()),
        }
        return loss, figures


def _in_every_line(labels: Tensor) -> Tensor:
    """[B, FEATURES] of columns -> [B, FEATURES, FEATURES] of rows, line by line."""
    return labels[:, None].expand(-1, FEATURES, -1)


@dataclass(frozen=True, slots=True)
class Seeing:
    """The objective: every column of every picture told, from the picture squeezed into a square."""

    tower: Tower
    heads: ColumnHeads

    def counts(self, batch: PictureBatch) -> dict[str, int]:
        return {"pictures": len(batch.numbers)}

    def share(self, batch: PictureBatch, step: int, counts: Mapping[str, int]) -> Share:
        loss, figures = self.heads(self.tower(squares(batch)[0]), batch, counts["pictures"])
        return Share(loss, figures)


def train_tower(
    seed: int, plan: SeeingPlan, report: Report, state_file: Path | None = None
) -> tuple[Tower, ColumnHeads]:
    """A tower whose rows tell digits, their order and their colour; its weights are an average."""
    torch.manual_seed(seed)
    rng = numpy.random.default_rng([seed, 1])
    tower, heads = Tower(), ColumnHeads()
    parts = nn.ModuleDict({"tower": tower, "heads": heads})
    optimizer = torch.optim.AdamW(
        parts.parameters(), plan.learning_rate, betas=(0.9, 0.98), weight_decay=plan.weight_decay
    )
    average = WeightAverage(tower, decay=plan.average_decay, delay=10)
    settings = {"phase": "seeing", "seed": seed, **asdict(plan)}
    state = TrainState(parts, optimizer, Precision("float32"), average=average, streams=[rng], plan=settings)

    def draw(step: int) -> list[PictureBatch]:
        max_digits = 2 if step < 100 else MAX_DIGITS
        return [
            draw_batch(rng, size, max_digits, warp=plan.warp)
            for size in split_evenly(plan.batch_size, plan.num_micro_batches)
        ]

    schedule, limits = CosineSchedule(steps=plan.steps), Limits(snapshot_every=plan.snapshot_every)
    Trainer(state, Seeing(tower, heads), draw, schedule, steps=plan.steps, limits=limits, state_file=state_file).run(
        report
    )
    return average.model, heads
