"""Trains the demo checkpoint from nothing: `python -m examples.train_demo --out cluster/demo/model --seed 0`.

Two phases (vision alone, then everything) and a measurement on held-out glyphs, with progress on the terminal.
With `--state FOLDER` each phase keeps what it goes on from there, and the same command continues a run that was
stopped, or comes back to its end, with the same outcome bit for bit.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

from examples.demo_accuracy import evaluation_set, measure
from examples.demo_checkpoint import round_to_saved, save_checkpoint
from examples.train.precision import PrecisionName
from examples.train.progress import progress_bar
from examples.train_data import tokenizer
from examples.train_model import TextShape, TinyQwen, VisionTower
from examples.train_text import TextPlan, train_text
from examples.train_vision import CellHeads, VisionPlan, train_vision


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console = Console()
    started = time.monotonic()
    model = _read(arguments, console, *_see(arguments, console))
    num_bytes = save_checkpoint(model, tokenizer(), arguments.out)
    round_to_saved(model)
    console.print(_table(measure(model, evaluation_set(arguments.evaluate))))
    minutes = (time.monotonic() - started) / 60
    console.print(f"{num_bytes / 1e6:.2f} MB of weights in {arguments.out}, {minutes:.1f} minutes")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vision-steps", type=int, default=VisionPlan().steps)
    parser.add_argument("--text-steps", type=int, default=TextPlan().steps)
    parser.add_argument("--micro-batches", type=int, default=1, help="parts of a batch, computed one after the other")
    parser.add_argument("--precision", choices=get_args(PrecisionName), default=TextPlan().precision)
    parser.add_argument("--checks", type=int, default=150, help="held-out questions asked at every checkpoint")
    parser.add_argument("--evaluate", type=int, default=500, help="held-out questions asked at the end")
    parser.add_argument("--state", type=Path, help="folder that keeps what a stopped run goes on from")
    return parser


def _see(arguments: argparse.Namespace, console: Console) -> tuple[VisionTower, CellHeads]:
    plan = VisionPlan(
        steps=arguments.vision_steps, num_micro_batches=arguments.micro_batches, precision=arguments.precision
    )
    out_size = TextShape(vocab_size=0).hidden_size
    with progress_bar(console, "seeing", plan.steps) as report:
        return train_vision(arguments.seed, out_size, plan, report, _state_file(arguments, "seeing"))


def _read(arguments: argparse.Namespace, console: Console, tower: VisionTower, heads: CellHeads) -> TinyQwen:
    plan = TextPlan(
        steps=arguments.text_steps, num_micro_batches=arguments.micro_batches, precision=arguments.precision
    )
    checks = evaluation_set(arguments.checks, first_seed=2_000_000)

    def checkpoint(step: int, model: TinyQwen) -> None:
        counts = measure(model, checks)
        shares = ", ".join(f"{name} {right / max(total, 1):.1%}" for name, (right, total) in counts.items())
        console.print(f"step {step}: {shares} exact of {len(checks)} questions")
        save_checkpoint(model, tokenizer(), arguments.out)

    with progress_bar(console, "reading", plan.steps) as report:
        state_file = _state_file(arguments, "reading")
        return train_text(arguments.seed, tower, heads, plan, report, checkpoint, state_file)


def _state_file(arguments: argparse.Namespace, phase: str) -> Path | None:
    return None if arguments.state is None else arguments.state / f"{phase}.pt"


def _table(counts: dict[str, tuple[int, int]]) -> Table:
    table = Table("question", "asked", "right", "share", title="held-out glyphs, greedy, exact answers")
    for name, (right, total) in counts.items():
        table.add_row(name, str(total), str(right), f"{right / total:.1%}" if total else "")
    return table


if __name__ == "__main__":
    main()
