"""Second phase: teach the text half to answer, while the vision tower goes on learning gently.

The auxiliary cell classifier of the first phase stays with a weight that fades to nothing. What is kept at the
end is an exponential moving average of the weights, which is steadier than the last step's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from torch.nn import functional

from examples.augment import PictureBatch, draw_batch
from examples.demo_accuracy import real_rows
from examples.train_data import TextBatch, collate, conversation, picture_turns, small_talk_turn, tokenizer
from examples.train_model import TextModel, TextShape, TinyQwen, VisionTower
from examples.train_vision import CellHeads, Report, cosine_schedule, set_learning_rate, take_step

Checkpoint = Callable[[int, TinyQwen], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPlan:
    """How long and how hard the second phase trains."""

    steps: int = 2600
    batch_size: int = 48
    num_small_talk: int = 3
    learning_rate: float = 1.5e-3
    vision_learning_rate: float = 4e-4
    weight_decay: float = 0.05
    average_decay: float = 0.995
    cell_loss_weight: float = 0.3
    checkpoint_every: int = 250


def new_text_model(seed: int) -> TextModel:
    torch.manual_seed(seed + 1)
    vocab_size = -(-tokenizer().get_vocab_size() // 16) * 16
    return TextModel(TextShape(vocab_size=vocab_size))


def train_text(
    seed: int, tower: VisionTower, heads: CellHeads, plan: TextPlan, report: Report, checkpoint: Checkpoint
) -> TinyQwen:
    """The averaged model; `checkpoint` sees it every now and then, and at the end."""
    model = TinyQwen(tower, new_text_model(seed))
    average = copy.deepcopy(model)
    rng = numpy.random.default_rng([seed, 2])
    vision_parameters = [*model.visual.parameters(), *heads.parameters()]
    text_parameters = list(model.model.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": text_parameters}, {"params": vision_parameters}],
        betas=(0.9, 0.98),
        weight_decay=plan.weight_decay,
    )
    for step in range(plan.steps):
        share = cosine_schedule(step, plan.steps)
        set_learning_rate(optimizer, plan.learning_rate * share, plan.vision_learning_rate * share)
        pictures = draw_batch(rng, plan.batch_size)
        text = draw_conversations(rng, pictures, plan.num_small_talk)
        with torch.autocast("cpu", torch.bfloat16):
            rows = model.visual(pictures.patches, pictures.cells_wide)
            hidden = model(text.input_ids, text.positions, real_rows(rows, pictures.cells_wide), text.media_mask)
            answered = text.labels >= 0
            logits = model.logits(hidden[answered])
        answer_loss = functional.cross_entropy(logits.float(), text.labels[answered])
        cell_loss, right = heads(rows, pictures)
        fade = plan.cell_loss_weight * (1.0 - step / plan.steps)
        take_step(optimizer, answer_loss + fade * cell_loss, [*vision_parameters, *text_parameters])
        _average(average, model, min(plan.average_decay, (step + 1) / (step + 10)))
        tokens_right = float((logits.argmax(-1) == text.labels[answered]).float().mean())
        report(step + 1, {"loss": answer_loss.item(), "tokens": tokens_right, "digit": right["digit"]})
        if (step + 1) % plan.checkpoint_every == 0 or step + 1 == plan.steps:
            checkpoint(step + 1, average)
    return average


def draw_conversations(rng: numpy.random.Generator, pictures: PictureBatch, num_small_talk: int) -> TextBatch:
    """One conversation a picture, then a few without a picture."""
    samples, cells_wide = [], pictures.cells_wide.tolist()
    for number, colour, wide in zip(pictures.numbers, pictures.colours, cells_wide, strict=True):
        turns = picture_turns(rng, number, colour)
        samples.append(conversation(turns, wide, question_first=bool(rng.random() < 0.2)))
    for _ in range(num_small_talk):
        samples.append(conversation([small_talk_turn(rng)], 0, question_first=False))
    return collate(samples, cells_wide + [0] * num_small_talk)


@torch.no_grad()
def _average(average: TinyQwen, model: TinyQwen, decay: float) -> None:
    for kept, current in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(current, 1.0 - decay)
