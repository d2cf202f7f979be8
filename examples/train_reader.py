"""Trains the shipped LLaDA-V from nothing: `python -m examples.train_reader --out cluster/demo/reader`.

First the tower and the projector alone, with two linear classifiers on every column of features and one on their mean,
which exist only while training; then the text half, which learns to read from rows that no longer change. As in
`train_diffusion`, each step of that hides part of the answer and asks for what is hidden. What is kept is an
exponential moving average of the weights.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

from examples.augment import NO_DIGIT, draw_batch
from examples.digits import COLOURS
from examples.reader import (
    FEATURES,
    GENERATION_LENGTH,
    IMAGE,
    Sample,
    answer_ids,
    column_labels,
    draw_samples,
    prompt_ids,
    squares,
    token_id,
)
from examples.reader_model import HIDDEN, Reader, Tower, num_rows, save
from examples.sums import MASK
from examples.train_vision import cosine_schedule, set_learning_rate, take_step

REPORT_EVERY = 100
AVERAGE_DECAY = 0.995
Report = Callable[[int, dict[str, float]], None]


class ColumnHeads(nn.Module):
    """Of every feature: the digit whose centre is in its column and its place in the number; of all: the colour."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.Linear(HIDDEN, 2 * (NO_DIGIT + 1))
        self.colour = nn.Linear(HIDDEN, len(COLOURS))

    def forward(self, rows: Tensor, digits: Tensor, order: Tensor, colours: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Summed loss, and the share of columns or pictures that each is right about."""
        digit_scores, order_scores = self.columns(rows).unflatten(1, (FEATURES, FEATURES)).chunk(2, dim=-1)
        colour_scores = self.colour(rows.mean(1))
        every = digits[:, None].expand(-1, FEATURES, -1).flatten(), order[:, None].expand(-1, FEATURES, -1).flatten()
        loss = functional.cross_entropy(digit_scores.flatten(0, 2), every[0])
        loss = loss + 0.5 * functional.cross_entropy(order_scores.flatten(0, 2), every[1])
        loss = loss + 0.2 * functional.cross_entropy(colour_scores, colours)
        has_digit = digits != NO_DIGIT
        guessed = digit_scores.softmax(-1).mean(1).argmax(-1)
        right = {
            "digit": float((guessed == digits)[has_digit].float().mean()),
            "order": float((order_scores.softmax(-1).mean(1).argmax(-1) == order)[has_digit].float().mean()),
            "colour": float((colour_scores.argmax(-1) == colours).float().mean()),
        }
        return loss, right


def train_tower(plan: argparse.Namespace, report: Report) -> Tower:
    """A tower whose rows tell digits, their order and their colour."""
    torch.manual_seed(plan.seed)
    rng, names = numpy.random.default_rng([plan.seed, 1]), list(COLOURS)
    tower, heads = Tower(), ColumnHeads()
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05)
    average = copy.deepcopy(tower)
    for step in track(range(plan.tower_steps), "seeing"):
        set_learning_rate(optimizer, 2e-3 * cosine_schedule(step, plan.tower_steps))
        pictures = draw_batch(rng, plan.batch_size, max_digits=2 if step < 100 else 5)
        digits, order = column_labels(pictures, pictures.numbers, NO_DIGIT)
        colours = torch.tensor([names.index(colour) for colour in pictures.colours])
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.bfloat16):
            rows = tower(squares(pictures)[0])
        loss, right = heads(rows.float(), digits, order, colours)
        take_step(optimizer, loss, parameters)
        _average(average, tower, step)
        report(step + 1, {"loss": loss.item(), **right})
    return average


def train_text(plan: argparse.Namespace, tower: Tower, report: Report, keep: Callable[[Reader], None]) -> Reader:
    """The averaged model; `keep` has it every now and then."""
    torch.manual_seed(plan.seed + 1)
    rng, reader = numpy.random.default_rng([plan.seed, 2]), Reader(tower.requires_grad_(False))
    average = copy.deepcopy(reader)
    parameters = [*reader.text.parameters(), reader.newline]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05)
    for step in track(range(plan.text_steps), "reading"):
        set_learning_rate(optimizer, 2.5e-3 * cosine_schedule(step, plan.text_steps))
        pictures = draw_batch(rng, plan.batch_size, max_digits=2 if step < 100 else 5)
        samples = draw_samples(rng, pictures)
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.bfloat16):
            with torch.no_grad():
                squeezed, fitted = tower(torch.cat(squares(pictures))).chunk(2)
            rows = reader.arranged(squeezed, fitted, [sample.width for sample in samples])
            batch = Conversations(samples)
            logits = reader.text(batch.hidden_ids, batch.is_real, rows, batch.is_row)[batch.is_hidden].float()
        loss = functional.cross_entropy(logits, batch.token_ids[batch.is_hidden])
        take_step(optimizer, loss, parameters)
        _average(average, reader, step)
        right = float((logits.argmax(-1) == batch.token_ids[batch.is_hidden]).float().mean())
        report(step + 1, {"loss": loss.item(), "tokens": right})
        if (step + 1) % (5 * REPORT_EVERY) == 0:
            keep(average)
    return average


class Conversations:
    """Padded on the right; each position of an answer is hidden by a chance of its row's own."""

    def __init__(self, samples: list[Sample]) -> None:
        whole = []
        for sample in samples:
            whole.append(prompt_ids(sample.question, num_rows(sample.width)) + answer_ids(sample.answer))
        lengths, places = torch.tensor([len(ids) for ids in whole]), torch.arange(max(map(len, whole)))
        self.token_ids = torch.zeros(len(whole), len(places), dtype=torch.long)
        for row, ids in enumerate(whole):
            self.token_ids[row, : len(ids)] = torch.tensor(ids)
        self.is_real = places < lengths[:, None]
        self.is_row = (self.token_ids == token_id(IMAGE)) & self.is_real
        is_answer = self.is_real & (places >= lengths[:, None] - GENERATION_LENGTH)
        chance = torch.rand(len(whole), 1).clamp_min(0.15)
        self.is_hidden = is_answer & (torch.rand(self.token_ids.shape) < chance)
        self.hidden_ids = self.token_ids.masked_fill(self.is_hidden, token_id(MASK))


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, step: int) -> None:
    decay = min(AVERAGE_DECAY, (step + 1) / (step + 10))
    for kept, current in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(current, 1.0 - decay)


def _reporter(name: str) -> Report:
    """Prints the mean of every figure now and then."""
    sums: dict[str, float] = {}
    started = time.monotonic()

    def report(step: int, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            sums[key] = sums.get(key, 0.0) + value
        if step % REPORT_EVERY == 0:
            text = ", ".join(f"{key} {value / REPORT_EVERY:.4f}" for key, value in sums.items())
            print(f"{name} {step}: {text}, {time.monotonic() - started:.0f} s", flush=True)
            sums.clear()

    return report


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the shipped LLaDA-V.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=2000)
    parser.add_argument("--text-steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bfloat16", action="store_true", help="multiply in bfloat16: quicker where the CPU can")
    parser.add_argument("--tower", type=Path, help="file that keeps the first phase's result")
    plan = parser.parse_args()
    torch.set_num_threads(plan.threads)
    tower = Tower()
    if plan.tower is not None and plan.tower.exists():
        tower.load_state_dict(torch.load(plan.tower, weights_only=True))
    else:
        tower = train_tower(plan, _reporter("seeing"))
        if plan.tower is not None:
            torch.save(tower.state_dict(), plan.tower)
    reader = train_text(plan, tower, _reporter("reading"), lambda average: print(save(average, plan.out), "bytes"))
    print(f"{save(reader, plan.out) / 1e6:.2f} MB of weights in {plan.out}")


if __name__ == "__main__":
    main()
