"""Second phase of the reader: the text half learns to read, while the tower goes on learning gently.

As in `train_diffusion`, each step hides part of the answer and asks for what is hidden; an answer is one block here.
The column heads of the first phase stay. What is kept is an exponential moving average of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from examples.augment import PictureBatch, draw_batch
from examples.reader import GENERATION_LENGTH, Sample, answer_ids, draw_samples, prompt_ids, squares, token_id
from examples.reader_model import Reader, Tower, num_rows
from examples.sums import MASK
from examples.train.average import WeightAverage
from examples.train.checkpoint import TrainState
from examples.train.masks import IGNORED, count_labels, masked_mean
from examples.train.precision import Precision
from examples.train.schedule import CosineSchedule
from examples.train.trainer import Limits, Report, Share, Trainer, split_evenly
from examples.train_reader_vision import ColumnHeads


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingPlan:
    """How long and how hard the second phase trains."""

    steps: int = 1500
    batch_size: int = 32
    num_micro_batches: int = 1
    learning_rate: float = 2.5e-3
    vision_learning_rate: float = 7e-4
    column_loss_weight: float = 0.3
    weight_decay: float = 0.05
    average_decay: float = 0.995
    warp: float = 0.5
    snapshot_every: int = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversations:
    """One question about each picture, padded on the right; `labels` are what is hidden, IGNORED elsewhere."""

    pictures: PictureBatch
    widths: Sequence[int]
    token_ids: Tensor
    is_real: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """The objective: what is hidden of the answers, told from pictures, questions and the rest of the answers; and
    every column told, as in the first phase. Only the squeezed square teaches the tower."""

    reader: Reader
    heads: ColumnHeads
    column_loss_weight: float

    def counts(self, batch: Conversations) -> dict[str, int]:
        return {"hidden": count_labels(batch.labels), "pictures": len(batch.widths)}

    def share(self, batch: Conversations, step: int, counts: Mapping[str, int]) -> Share:
        in_square, whole = squares(batch.pictures)
        squeezed = self.reader.tower(in_square)
        with torch.no_grad():
            fitted = self.reader.tower(whole)
        rows = self.reader.arranged(squeezed, fitted, batch.widths)
        is_hidden = batch.labels != IGNORED
        logits = self.reader.text.logits(self.reader.hidden(batch.token_ids, batch.is_real, rows)[is_hidden])
        labels = batch.labels[is_hidden]
        right = float((logits.argmax(-1) == labels).sum()) / max(counts["hidden"], 1)
        columns, figures = self.heads(squeezed, batch.pictures, counts["pictures"])
        loss = masked_mean(logits, labels, counts["hidden"]) + self.column_loss_weight * columns
        return Share(loss, {"tokens": right, "digit": figures["digit"]})


def train_text(
    seed: int,
    tower: Tower,
    heads: ColumnHeads,
    plan: ReadingPlan,
    report: Report,
    checkpoint: Callable[[int, Reader], None],
    state_file: Path | None = None,
) -> Reader:
    """The averaged model; `checkpoint` sees it every now and then, and at the end."""
    torch.manual_seed(seed + 1)
    rng = numpy.random.default_rng([seed, 2])
    reader = Reader(tower)
    text = {"params": [*reader.text.parameters(), reader.newline], "lr": plan.learning_rate}
    vision = {"params": [*tower.parameters(), *heads.parameters()], "lr": plan.vision_learning_rate}
    optimizer = torch.optim.AdamW([text, vision], betas=(0.9, 0.98), weight_decay=plan.weight_decay)
    average = WeightAverage(reader, decay=plan.average_decay, delay=10)
    settings = {"phase": "reading", "seed": seed, **asdict(plan)}
    parts = nn.ModuleDict({"reader": reader, "heads": heads})
    state = TrainState(parts, optimizer, Precision("float32"), average=average, streams=[rng], plan=settings)

    def draw(step: int) -> list[Conversations]:
        sizes = split_evenly(plan.batch_size, plan.num_micro_batches)
        drawn = [draw_batch(rng, size, warp=plan.warp) for size in sizes]
        return [converse(pictures, draw_samples(rng, pictures)) for pictures in drawn]

    schedule, limits = CosineSchedule(steps=plan.steps), Limits(snapshot_every=plan.snapshot_every)
    trainer = Trainer(
        state,
        Reading(reader, heads, plan.column_loss_weight),
        draw,
        schedule,
        steps=plan.steps,
        limits=limits,
        state_file=state_file,
    )
    trainer.run(report, lambda step: checkpoint(step, average.model))
    return average.model


def converse(pictures: PictureBatch, samples: Sequence[Sample]) -> Conversations:
    """Each position of an answer is hidden by a chance of its row's own; in a third of the rows all are."""
    whole = [prompt_ids(s.question, num_rows(s.width)) + answer_ids(s.answer) for s in samples]
    lengths, places = torch.tensor([len(ids) for ids in whole]), torch.arange(max(map(len, whole)))
    token_ids = torch.zeros(len(whole), len(places), dtype=torch.long)
    for row, ids in enumerate(whole):
        token_ids[row, : len(ids)] = torch.tensor(ids)
    is_real = places < lengths[:, None]
    is_answer = is_real & (places >= lengths[:, None] - GENERATION_LENGTH)
    chance = (1.5 * torch.rand(len(whole), 1)).clamp(0.15, 1.0)
    is_hidden = is_answer & (torch.rand(token_ids.shape) < chance)
    return Conversations(
        pictures=pictures,
        widths=[sample.width for sample in samples],
        token_ids=token_ids.masked_fill(is_hidden, token_id(MASK)),
        is_real=is_real,
        labels=token_ids.masked_fill(~is_hidden, IGNORED),
    )
