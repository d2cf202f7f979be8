"""Trains the demo checkpoint from nothing: `python -m examples.train_demo --out cluster/demo/model --seed 0`.

Two phases (vision alone, then everything) and a measurement on held-out glyphs, with progress on the terminal.
`--vision-stage FILE` keeps the first phase's result, or goes on from it when the file exists: phases draw from
separate random streams, so the outcome is the same.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from examples.demo_accuracy import evaluation_set, measure
from examples.demo_checkpoint import round_to_saved, save_checkpoint
from examples.train_data import tokenizer
from examples.train_model import TextShape, TinyQwen, VisionShape, VisionTower
from examples.train_text import TextPlan, train_text
from examples.train_vision import CellHeads, Report, VisionPlan, train_vision

LOG_EVERY = 100


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    console = Console()
    started = time.monotonic()
    tower, heads = _vision_stage(arguments, console)
    checks = evaluation_set(150, first_seed=2_000_000)

    def checkpoint(step: int, model: TinyQwen) -> None:
        counts = measure(model, checks)
        console.print(f"step {step}: {_shares(counts)} exact of {len(checks)} questions")
        save_checkpoint(model, tokenizer(), arguments.out)

    plan = TextPlan(steps=arguments.text_steps)
    with _progress(console) as progress:
        report = _reporter(progress, console, "reading", plan.steps)
        model = train_text(arguments.seed, tower, heads, plan, report, checkpoint)
    num_bytes = save_checkpoint(model, tokenizer(), arguments.out)
    round_to_saved(model)
    console.print(_table(measure(model, evaluation_set(arguments.evaluate))))
    minutes = (time.monotonic() - started) / 60
    console.print(f"{num_bytes / 1e6:.2f} MB of weights in {arguments.out}, {minutes:.1f} minutes")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vision-steps", type=int, default=VisionPlan().steps)
    parser.add_argument("--text-steps", type=int, default=TextPlan().steps)
    parser.add_argument("--evaluate", type=int, default=500, help="held-out questions asked at the end")
    parser.add_argument("--vision-stage", type=Path, help="file that keeps the first phase's result")
    return parser.parse_args()


def _vision_stage(arguments: argparse.Namespace, console: Console) -> tuple[VisionTower, CellHeads]:
    kept: Path | None = arguments.vision_stage
    out_size = TextShape(vocab_size=0).hidden_size
    if kept is not None and kept.exists():
        tower, heads = VisionTower(VisionShape(), out_size), CellHeads(out_size)
        tensors = torch.load(kept, weights_only=True)
        tower.load_state_dict(tensors["tower"])
        heads.load_state_dict(tensors["heads"])
        return tower, heads
    plan = VisionPlan(steps=arguments.vision_steps)
    with _progress(console) as progress:
        report = _reporter(progress, console, "seeing", plan.steps)
        tower, heads = train_vision(arguments.seed, out_size, plan, report)
    if kept is not None:
        torch.save({"tower": tower.state_dict(), "heads": heads.state_dict()}, kept)
    return tower, heads


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
    )


def _reporter(progress: Progress, console: Console, name: str, steps: int) -> Report:
    """Moves the bar each step; averages the figures and prints them every LOG_EVERY steps."""
    task = progress.add_task(name, total=steps, figures="")
    sums: dict[str, float] = {}

    def report(step: int, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            sums[key] = sums.get(key, 0.0) + value
        if step % LOG_EVERY == 0:
            text = " ".join(f"{key} {value / LOG_EVERY:.4f}" for key, value in sums.items())
            console.print(f"{name} {step}/{steps}: {text}")
            progress.update(task, figures=text)
            sums.clear()
        progress.update(task, completed=step)

    return report


def _shares(counts: dict[str, tuple[int, int]]) -> str:
    return ", ".join(f"{name} {right / total:.1%}" for name, (right, total) in counts.items())


def _table(counts: dict[str, tuple[int, int]]) -> Table:
    table = Table("question", "asked", "right", "share", title="held-out glyphs, greedy, exact answers")
    for name, (right, total) in counts.items():
        table.add_row(name, str(total), str(right), f"{right / total:.1%}")
    return table


if __name__ == "__main__":
    main()
