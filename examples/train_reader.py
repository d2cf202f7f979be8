"""Trains the shipped LLaDA-V from nothing: `python -m examples.train_reader --out cluster/demo/reader`.

Two phases (the tower alone, then the text half) and a measurement on held-out glyphs. With `--state FOLDER` each phase
keeps what it goes on from there, and the same command continues a run that was stopped, bit for bit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from cluster import LLM, DiffusionParams
from examples.demo_accuracy import evaluation_set
from examples.reader_accuracy import measure
from examples.reader_model import Reader, Tower, save
from examples.train.progress import progress_bar
from examples.train_reader_text import ReadingPlan, train_text
from examples.train_reader_vision import ColumnHeads, SeeingPlan, train_tower


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console = Console()
    reader = _read(arguments, console, *_see(arguments, console))
    num_bytes = save(reader, arguments.out)
    console.print(f"{num_bytes / 1e6:.2f} MB of weights in {arguments.out}")
    with LLM(model=str(arguments.out), dtype="float32", device="cpu") as llm:
        found = measure(llm, evaluation_set(arguments.evaluate), DiffusionParams())
    shares = ", ".join(f"{name} {found[name]:.1%}" for name in ("number", "colour", "count", "all"))
    console.print(f"{shares} exact of {arguments.evaluate} questions about held-out glyphs, served")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train the shipped LLaDA-V.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vision-steps", type=int, default=SeeingPlan().steps)
    parser.add_argument("--text-steps", type=int, default=ReadingPlan().steps)
    parser.add_argument("--micro-batches", type=int, default=1, help="parts of a batch, computed one after the other")
    parser.add_argument("--evaluate", type=int, default=300, help="held-out questions asked at the end")
    parser.add_argument("--state", type=Path, help="folder that keeps what a stopped run goes on from")
    return parser


def _see(arguments: argparse.Namespace, console: Console) -> tuple[Tower, ColumnHeads]:
    plan = SeeingPlan(steps=arguments.vision_steps, num_micro_batches=arguments.micro_batches)
    with progress_bar(console, "seeing", plan.steps) as report:
        return train_tower(arguments.seed, plan, report, _state_file(arguments, "seeing"))


def _read(arguments: argparse.Namespace, console: Console, tower: Tower, heads: ColumnHeads) -> Reader:
    plan = ReadingPlan(steps=arguments.text_steps, num_micro_batches=arguments.micro_batches)

    def checkpoint(step: int, reader: Reader) -> None:
        save(reader, arguments.out)

    with progress_bar(console, "reading", plan.steps) as report:
        return train_text(arguments.seed, tower, heads, plan, report, checkpoint, _state_file(arguments, "reading"))


def _state_file(arguments: argparse.Namespace, phase: str) -> Path | None:
    return None if arguments.state is None else arguments.state / f"{phase}.pt"


if __name__ == "__main__":
    main()
