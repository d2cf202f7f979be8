"""Every op of `kernels` on the CPU against the obvious composition of torch calls: what models would hold instead.

    python -m benchmarks.bench_kernels --json FILE [--quick] [--dtypes float32,bfloat16] [--only NAME]

Three ways take turns within each round: the composition, the op on its torch path, and the op as it is served (the C
twin where it has one). Ratios are taken within a round; medians are reported, above 1 is in our favour. The results of
the first round are compared, so that a way that is quick because it does something else shows.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import kernel_cases, kernel_cases_large
from benchmarks.kernel_cases import Call, Case, Sizes
from benchmarks.report import machine, median, versions, write_json
from kernels.dispatch import forced

RESULTS = Path(__file__).resolve().parent / "results"
SLOWER = 0.9  # a ratio below it is a loss; the rest is what choosing a path takes of a call of 3 us, and chance
ROUND_S = 0.002  # that a way is called for in a round, at least once
MOST_CALLS = 200


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    sizes = Sizes.tiny() if options.quick else Sizes()
    console = Console()
    report: dict[str, Any] = {"machine": machine(), "versions": versions(("torch",)), "threads": options.threads}
    report["cases"] = []
    for dtype in options.dtypes.split(","):
        with console.status(dtype), torch.inference_mode():
            for build in (*kernel_cases.GROUPS, *kernel_cases_large.GROUPS):
                for case in build(sizes, getattr(torch, dtype)):
                    if options.only in case.name:
                        report["cases"].append({"dtype": dtype, **_measured(case, options.rounds)})
    write_json(options.json, report)
    text = markdown(report)
    options.json.with_suffix(".md").write_text(text, encoding="utf-8")
    console.print(text, highlight=False, soft_wrap=True)
    losses = [f"{case['name']} {case['dtype']}" for case in report["cases"] if case["x_torch"] < SLOWER]
    console.print(
        f"torch path slower than the composition: {', '.join(losses) or 'none'}\nJSON: {options.json}", soft_wrap=True
    )
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_kernels", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "kernels.json", help="where the JSON goes")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated torch dtypes")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds, after one that is thrown away")
    parser.add_argument("--only", default="", help="measure only ops whose name contains this")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: does it run")
    options = parser.parse_args(arguments)
    options.rounds = 1 if options.quick else options.rounds
    return options


def _measured(case: Case, rounds: int) -> dict[str, Any]:
    """Median microseconds of each way, and how many times as fast as the composition the other two are."""

    ways: dict[str, Call] = {"naive": case.naive, "torch": case.op, "served": case.op}
    calls: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    differences: list[float] = []
    for name, way in ways.items():
        with _path(name):
            if case.is_comparable:
                differences.append(_difference(case.naive(), way()))
            calls[name] = _num_calls(way)
    for i in range(rounds):
        for name in sorted(ways, reverse=bool(i % 2)):
            with _path(name):
                seconds[name].append(_seconds(ways[name], calls[name]))

    def ratio(name: str) -> float:
        return round(median([a / b for a, b in zip(seconds["naive"], seconds[name], strict=True)]), 3)

    return {
        "name": case.name,
        "us": {name: round(1e6 * median(times), 2) for name, times in seconds.items()},
        "x_torch": ratio("torch"),
        "x_served": ratio("served"),
        "largest_difference": max(differences, default=None),
    }


def _path(name: str) -> contextlib.AbstractContextManager[None]:
    """Entered once for many calls: it takes as long as a small op."""
    return forced("torch") if name == "torch" else contextlib.nullcontext()


def _num_calls(way: Call) -> int:
    """How many take ROUND_S; the first one, which sets up, does not count."""
    way()
    return min(MOST_CALLS, max(1, int(ROUND_S / _seconds(way, 1))))


def _seconds(way: Call, calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        way()
    return (time.perf_counter() - started) / calls


def _difference(expected: object, actual: object) -> float:
    """The largest, in shares of the largest number there is; of several results the largest."""
    if isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor):
        if not expected.numel():
            return 0.0
        expected, actual = expected.double(), actual.double()
        return float((expected - actual).abs().max() / expected.abs().max().clamp_min(1e-30))
    assert isinstance(expected, (tuple, list)) and isinstance(actual, (tuple, list))
    return max(_difference(*pair) for pair in zip(expected, actual, strict=True))


def op_of(case: dict[str, Any]) -> str:
    """The op of a case, without its sizes."""
    return str(case["name"]).split(" ")[0].rstrip(",")


def markdown(report: dict[str, Any]) -> str:
    """For each op the least of its ratios on either path, and where; then every case."""
    lines = ["| op | torch path, x at least | where | as served, x at least | where |", "| --- " * 5 + "|"]
    for op in dict.fromkeys(map(op_of, report["cases"])):
        cases = [case for case in report["cases"] if op_of(case) == op]
        cells = [op]
        for key in ("x_torch", "x_served"):
            least = min(cases, key=lambda case: float(case[key]))
            where = f"{least['name'].removeprefix(op).strip(', ')} {least['dtype']}".strip()
            cells += [f"{least[key]:.2f}", where]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| case | dtype | composition us | torch path us | x | as served us | x |", "| --- " * 7 + "|"]
    for case in report["cases"]:
        us = case["us"]
        cells = [case["name"], case["dtype"], f"{us['naive']:.1f}", f"{us['torch']:.1f}", f"{case['x_torch']:.2f}"]
        cells += [f"{us['served']:.1f}", f"{case['x_served']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
