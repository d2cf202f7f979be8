"""Second phase: teach the text half to answer, while the vision tower goes on learning gently.

The auxiliary cell classifier of the first phase stays with a weight that fades to nothing. What is kept at the
end is an exponential moving average of the weights, which is steadier than the last step's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch
from torch import nn

from examples.augment import PictureBatch, draw_batch
from examples.demo_accuracy import real_rows
from examples.train.average import WeightAverage
from examples.train.checkpoint import TrainState
from examples.train.masks import IGNORED, count_labels, masked_mean
from examples.train.precision import Precision, PrecisionName
from examples.train.schedule import CosineSchedule
from examples.train.trainer import Limits, Report, Share, Trainer, split_evenly
from examples.train_data import TextBatch, collate, conversation, picture_turns, small_talk_turn, tokenizer
from examples.train_model import TextModel, TextShape, TinyQwen, VisionTower
from examples.train_vision import CellHeads, count_cells

Checkpoint = Callable[[int, TinyQwen], None]
Conversations = tuple[PictureBatch, TextBatch]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPlan:
    """How long and how hard the second phase trains."""

    steps: int = 2600
    batch_size: int = 48
    num_small_talk: int = 3
    num_micro_batches: int = 1
    learning_rate: float = 1.5e-3
    vision_learning_rate: float = 4e-4
    weight_decay: float = 0.05
    average_decay: float = 0.995
    cell_loss_weight: float = 0.3
    checkpoint_every: int = 250
    precision: PrecisionName = "bfloat16"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The objective: every token of every answer, and at first every cell too."""

    model: TinyQwen
    heads: CellHeads
    plan: TextPlan
    precision: Precision

    def counts(self, batch: Conversations) -> dict[str, int]:
        pictures, text = batch
        return {"tokens": count_labels(text.labels), "cells": count_cells(pictures)}

    def share(self, batch: Conversations, step: int, counts: Mapping[str, int]) -> Share:
        pictures, text = batch
        with self.precision.autocast():
            rows = self.model.visual(pictures.patches, pictures.cells_wide)
            media = real_rows(rows, pictures.cells_wide)
            hidden = self.model(text.input_ids, text.positions, media, text.media_mask)
            answered = text.labels != IGNORED
            logits = self.model.logits(hidden[answered])
        labels = text.labels[answered]
        answer_loss = masked_mean(logits, labels, counts["tokens"])
        cell_loss, right = self.heads(rows, pictures, counts["cells"])
        fade = self.plan.cell_loss_weight * (1.0 - step / self.plan.steps)
        tokens_right = int((logits.argmax(-1) == labels).sum()) / max(counts["tokens"], 1)
        figures = {"answers": answer_loss.item(), "tokens": tokens_right, "digit": right["digit"]}
        return Share(answer_loss + fade * cell_loss, figures)


def new_text_model(seed: int) -> TextModel:
    torch.manual_seed(seed + 1)
    vocab_size = -(-tokenizer().get_vocab_size() // 16) * 16
    return TextModel(TextShape(vocab_size=vocab_size))


def train_text(
    seed: int,
    tower: VisionTower,
    heads: CellHeads,
    plan: TextPlan,
    report: Report,
    checkpoint: Checkpoint,
    state_file: Path | None = None,
) -> TinyQwen:
    """The averaged model; `checkpoint` sees it every now and then, and at the end."""
    model = TinyQwen(tower, new_text_model(seed))
    rng = numpy.random.default_rng([seed, 2])
    parts = nn.ModuleDict({"visual": tower, "heads": heads, "model": model.model})
    vision_parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.model.parameters()), "lr": plan.learning_rate},
            {"params": vision_parameters, "lr": plan.vision_learning_rate},
        ],
        betas=(0.9, 0.98),
        weight_decay=plan.weight_decay,
    )
    precision = Precision(plan.precision)
    average = WeightAverage(model, decay=plan.average_decay, delay=10)
    settings = {"phase": "reading", "seed": seed, **asdict(plan)}
    state = TrainState(parts, optimizer, precision, average=average, streams=[rng], plan=settings)
    trainer = Trainer(
        state,
        Reading(model=model, heads=heads, plan=plan, precision=precision),
        lambda _: _draw(rng, plan),
        CosineSchedule(steps=plan.steps),
        steps=plan.steps,
        limits=Limits(snapshot_every=plan.checkpoint_every),
        state_file=state_file,
    )
    trainer.run(report, lambda step: checkpoint(step, average.model))
    return average.model


def draw_conversations(rng: numpy.random.Generator, pictures: PictureBatch, num_small_talk: int) -> TextBatch:
    """One conversation a picture, then a few without a picture."""
    samples, cells_wide = [], pictures.cells_wide.tolist()
    for number, colour, wide in zip(pictures.numbers, pictures.colours, cells_wide, strict=True):
        turns = picture_turns(rng, number, colour)
        samples.append(conversation(turns, wide, question_first=bool(rng.random() < 0.2)))
    for _ in range(num_small_talk):
        samples.append(conversation([small_talk_turn(rng)], 0, question_first=False))
    return collate(samples, cells_wide + [0] * num_small_talk)


def _draw(rng: numpy.random.Generator, plan: TextPlan) -> list[Conversations]:
    """The micro-batches of one step; small talk is in the first."""
    drawn = []
    for index, size in enumerate(split_evenly(plan.batch_size, plan.num_micro_batches)):
        pictures = draw_batch(rng, size)
        drawn.append((pictures, draw_conversations(rng, pictures, 0 if index else plan.num_small_talk)))
    return drawn
