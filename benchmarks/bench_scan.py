"""The selective scan of one layer on the CPU: Tandem's, and a Python loop over tokens, in one run.

    python -m benchmarks.bench_scan --json FILE [--quick]

A prompt of 4096 tokens, float32, states of 64 numbers. The goal is 20 times the training repository's, which loops once
for the outputs and once more for the last state; one loop alone is reported, too. Rounds alternate, the first is
discarded; medians are reported.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.fusion_tree_reference import looped_scan, looped_state
from benchmarks.report import machine, median, versions, write_json
from kernels.selective_scan import ScanWeights, selective_scan
from kernels.state_batch import StateBatch

RESULTS = Path(__file__).resolve().parent / "results"
STATE = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    tokens, rounds = (256, 1) if options.quick else (options.tokens, options.rounds)
    report: dict[str, Any] = {"machine": machine(), "versions": versions(("torch",)), "threads": options.threads}
    widths = [int(width) for width in options.channels.split(",")]
    report["cases"] = [_case(width, tokens, rounds) for width in widths]
    write_json(options.json, report)
    Console().print(_table(report))
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_scan", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "scan.json", help="where the JSON goes")
    parser.add_argument("--channels", default="256,1024,3072", help="comma-separated, twice the hidden size each")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2, help="torch threads of either")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, after one that is thrown away")
    parser.add_argument("--quick", action="store_true", help="one round of 256 tokens: does it run, not how fast is it")
    return parser.parse_args(arguments)


@torch.inference_mode()
def _case(channels: int, tokens: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x, dt, b, c = torch.randn(tokens, 2 * channels + 2 * STATE, generator=generator).split(
        [channels, channels, STATE, STATE], dim=1
    )
    a = -torch.arange(1.0, STATE + 1).repeat(channels, 1)
    weights = ScanWeights(a=a, skip=torch.ones(channels), dt_bias=torch.zeros(channels))
    steps = torch.nn.functional.softplus(dt)
    found: dict[str, torch.Tensor] = {}

    def ours() -> None:
        states = torch.zeros(1, channels, STATE)
        found["ours"] = selective_scan(x, dt, b, c, weights, states, StateBatch(lengths=[tokens], slots=[0]))

    def loop() -> None:
        state = torch.zeros(1, channels, STATE)
        found["loop"] = looped_scan(x[None], steps[None], a, b[None], c[None], weights.skip, state)[0][0]

    def again() -> None:
        looped_state(x[None], steps[None], a, b[None], torch.zeros(1, channels, STATE))

    ways: dict[str, Callable[[], None]] = {"ours": ours, "loop": loop, "again": again}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name in sorted(ways, reverse=bool(i % 2)):
            started = time.perf_counter()
            ways[name]()
            if i:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: median(values) for name, values in seconds.items()}
    return {
        "channels": channels,
        "tokens": tokens,
        "seconds": medians,
        "x_loop": round(medians["loop"] / medians["ours"], 1),
        "x_both": round((medians["loop"] + medians["again"]) / medians["ours"], 1),
        "largest_difference": float((found["ours"] - found["loop"]).abs().max()),
    }


def _table(report: dict[str, Any]) -> Table:
    made = Table(title=f"selective scan, float32, {report['threads']} threads")
    for column in ("channels", "tokens", "tandem ms", "loop ms", "x loop", "x both loops", "largest difference"):
        made.add_column(column, justify="right")
    for case in report["cases"]:
        times = (f"{case['seconds'][name] * 1e3:.1f}" for name in ("ours", "loop"))
        difference = f"{case['largest_difference']:.1e}"
        made.add_row(
            str(case["channels"]),
            str(case["tokens"]),
            *times,
            f"{case['x_loop']:.1f}",
            f"{case['x_both']:.1f}",
            difference,
        )
    return made


if __name__ == "__main__":
    raise SystemExit(main())
