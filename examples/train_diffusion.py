"""Trains the shipped diffusion model from nothing: `python -m examples.train_diffusion --out cluster/demo/diffusion`.

Each step hides part of the answer and asks for what is hidden: any positions of it, or, as block-wise decoding will,
some positions of one block and all behind it. What is kept is an exponential moving average of the weights. With
`--state FILE` the same command goes on with a run that was stopped, bit for bit.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from examples.diffusion_model import Llada, Shape, round_to_saved, save
from examples.sums import (
    END,
    END_OF_TURN,
    GENERATION_LENGTH,
    MASK,
    answer_ids,
    answer_to,
    build_tokenizer,
    draw_question,
    prompt_ids,
)
from examples.train.average import WeightAverage
from examples.train.checkpoint import TrainState
from examples.train.masks import IGNORED, count_labels, masked_mean
from examples.train.precision import Precision
from examples.train.progress import progress_bar
from examples.train.schedule import half_cosine, warm_up
from examples.train.trainer import Limits, Report, Share, Trainer, split_evenly


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionPlan:
    """How long and how hard it trains."""

    steps: int = 7000
    batch_size: int = 40
    num_micro_batches: int = 1
    learning_rate: float = 2.5e-3
    checkpoint_every: int = 500

    def rate(self, step: int) -> float:
        """The warm-up lies on the cosine, which falls from the first step; a hundredth is left at the end."""
        return max(warm_up(step, 100) * half_cosine(step, 0, self.steps), 0.01)


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole sequences padded on the right; `is_answer` marks the positions that are to be generated."""

    token_ids: Tensor
    is_real: Tensor
    is_answer: Tensor


@dataclass(frozen=True, slots=True)
class Riddle:
    """A batch with some of its answers hidden; `labels` are what is hidden, IGNORED elsewhere."""

    token_ids: Tensor
    is_real: Tensor
    labels: Tensor


def draw_batch(rng: random.Random, tokenizer: Tokenizer, size: int) -> Batch:
    questions = [draw_question(rng, held_out=False) for _ in range(size)]
    prompts = [prompt_ids(tokenizer, question) for question in questions]
    longest = max(map(len, prompts)) + GENERATION_LENGTH
    token_ids = torch.full((size, longest), tokenizer.token_to_id(END))
    is_real, is_answer = torch.zeros(size, longest, dtype=torch.bool), torch.zeros(size, longest, dtype=torch.bool)
    for row, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
        whole = prompt + answer_ids(tokenizer, question)
        token_ids[row, : len(whole)] = torch.tensor(whole)
        is_real[row, : len(whole)] = True
        is_answer[row, len(prompt) : len(whole)] = True
    return Batch(token_ids, is_real, is_answer)


def hide(batch: Batch) -> Tensor:
    """Which answer positions are hidden [B, L]: each by a chance of its row's own, or a block's and all behind it."""
    size = batch.token_ids.shape[0]
    order = batch.is_answer.cumsum(1) - 1
    chance = torch.rand(size, 1).clamp_min(0.05)
    first = torch.randint(GENERATION_LENGTH, (size, 1)) // 8 * 8
    in_block = (order >= first) & (order < first + 8)
    blockwise = (in_block & (torch.rand(order.shape) < chance)) | (order >= first + 8)
    anywhere = torch.rand(order.shape) < chance
    return batch.is_answer & torch.where(torch.rand(size, 1) < 0.5, blockwise, anywhere)


@dataclass(frozen=True, slots=True)
class Filling:
    """The objective: what is hidden, told by all that is not."""

    model: Llada

    def counts(self, batch: Riddle) -> dict[str, int]:
        return {"hidden": count_labels(batch.labels)}

    def share(self, batch: Riddle, step: int, counts: Mapping[str, int]) -> Share:
        is_hidden = batch.labels != IGNORED
        logits = self.model(batch.token_ids, batch.is_real)[is_hidden]
        return Share(masked_mean(logits, batch.labels[is_hidden], counts["hidden"]), {})


def train(
    seed: int,
    plan: DiffusionPlan,
    tokenizer: Tokenizer,
    report: Report,
    checkpoint: Callable[[int, Llada], None],
    state_file: Path | None = None,
) -> Llada:
    """The averaged model; `checkpoint` sees it every now and then, and at the end."""
    torch.manual_seed(seed)
    rng, mask_id = random.Random(seed), tokenizer.token_to_id(MASK)
    model = Llada(Shape(vocab_size=-(-tokenizer.get_vocab_size() // 16) * 16))
    average = WeightAverage(model, decay=0.998, delay=20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    settings = {"seed": seed, **asdict(plan)}
    precision = Precision("float32")
    state = TrainState(model, optimizer, precision, average=average, streams=[rng], plan=settings)

    def draw(_: int) -> list[Riddle]:
        batches = [draw_batch(rng, tokenizer, size) for size in split_evenly(plan.batch_size, plan.num_micro_batches)]
        return [_riddle(batch, hide(batch), mask_id) for batch in batches]

    limits = Limits(snapshot_every=plan.checkpoint_every)
    trainer = Trainer(state, Filling(model), draw, plan.rate, steps=plan.steps, limits=limits, state_file=state_file)
    trainer.run(report, lambda step: checkpoint(step, average.model))
    return average.model


def _riddle(batch: Batch, hidden: Tensor, mask_id: int) -> Riddle:
    return Riddle(
        batch.token_ids.masked_fill(hidden, mask_id), batch.is_real, batch.token_ids.masked_fill(~hidden, IGNORED)
    )


@torch.no_grad()
def accuracy(model: Llada, tokenizer: Tokenizer, count: int) -> float:
    """Share of held-out questions answered exactly, one token a step, most certain first, in blocks of 8."""
    rng, mask_id, right = random.Random(1), tokenizer.token_to_id(MASK), 0
    questions = [draw_question(rng, held_out=True) for _ in range(count)]
    for length in {len(question) for question in questions}:
        group = [question for question in questions if len(question) == length]
        prompt = torch.tensor([prompt_ids(tokenizer, question) for question in group])
        canvas = torch.cat([prompt, torch.full((len(group), GENERATION_LENGTH), mask_id)], dim=1)
        for step in range(GENERATION_LENGTH):
            end = prompt.shape[1] + (step // 8 + 1) * 8
            logits = model(canvas, torch.ones_like(canvas, dtype=torch.bool))
            logits[..., mask_id] = -math.inf
            confidence, token = logits.softmax(-1).max(-1)
            confidence[canvas != mask_id] = -1
            confidence[:, end:] = -1
            rows, best = torch.arange(len(group)), confidence.argmax(1)
            canvas[rows, best] = token[rows, best]
        for question, row in zip(group, canvas[:, prompt.shape[1] :].tolist(), strict=True):
            end_id = tokenizer.token_to_id(END_OF_TURN)
            text = tokenizer.decode(row[: row.index(end_id)] if end_id in row else row, skip_special_tokens=True)
            right += text == answer_to(question)
    return right / count


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train the shipped diffusion model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=DiffusionPlan().steps)
    parser.add_argument("--batch-size", type=int, default=DiffusionPlan().batch_size)
    parser.add_argument("--micro-batches", type=int, default=1, help="parts of a batch, computed one after the other")
    parser.add_argument("--learning-rate", type=float, default=DiffusionPlan().learning_rate)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--evaluate", type=int, default=500, help="held-out questions asked at the end")
    parser.add_argument("--state", type=Path, help="file that keeps what a stopped run goes on from")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    tokenizer, console = build_tokenizer(), Console()
    plan = DiffusionPlan(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        num_micro_batches=arguments.micro_batches,
        learning_rate=arguments.learning_rate,
    )

    def checkpoint(step: int, model: Llada) -> None:
        save(model, tokenizer, arguments.out)
        console.print(f"step {step}: {accuracy(model, tokenizer, 100):.1%} exact")

    with progress_bar(console, "filling", plan.steps) as report:
        model = train(arguments.seed, plan, tokenizer, report, checkpoint, arguments.state)
    round_to_saved(model)
    num_bytes = save(model, tokenizer, arguments.out)
    right = accuracy(model, tokenizer, arguments.evaluate)
    console.print(f"{right:.1%} exact of {arguments.evaluate} held-out questions, {num_bytes / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
