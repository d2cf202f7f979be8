"""Requests of mixed lengths that arrive at random, against transformers in static batches, on the CPU.

    python -m benchmarks.bench_arrivals --json FILE [--quick] [--models 100m,demo] [--loads 0.7,3]

Poisson arrivals, text and images in turn, 16 to 256 new tokens each, greedy with ends of sequence ignored. Both engines
answer the same traces, one after the other; a load of 1 is the rate at which full static batches of these requests are
answered in the same run. Below it waiting times count, above it throughput.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.arrival_traffic import Answer, Arrival, Continuous, Server, StaticBatches, poisson_arrivals
from benchmarks.report import machine, versions, write_json
from benchmarks.serving_models import BenchModel, BenchRequest, load_model, text_requests

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow")
NUM_REQUESTS = {"demo": 128, "100m": 32}
COLUMNS = ("model", "load", "req/s", "tok/s", "static", "x", "TTFT p90 ms", "static", "x lower")
ENGINES: dict[str, Callable[[BenchModel, str, int, int], Server]] = {"tandem": Continuous, "static": StaticBatches}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    options = _options(arguments)
    console, started = Console(), time.monotonic()
    report: dict[str, Any] = {"machine": machine(), "versions": versions(PACKAGES), "threads": options.threads}
    report |= {"max_at_once": options.max_at_once, "new_tokens": options.new_tokens, "cases": []}
    for name in options.models.split(","):
        for dtype in options.dtypes.split(","):
            with console.status(f"{name} {dtype}") as status:
                report["cases"] += _cases(name, dtype, options, status.update)
    report["seconds"] = round(time.monotonic() - started, 1)
    write_json(options.json, report)
    console.print(table(report))
    console.print(f"{report['seconds']} s; JSON: {options.json}")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_arrivals", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "arrivals.json", help="where the JSON goes")
    parser.add_argument("--models", default="100m", help="comma-separated: demo, 100m")
    parser.add_argument("--dtypes", default="bfloat16", help="comma-separated torch dtypes")
    parser.add_argument("--loads", default="0.7,3", help="comma-separated: offered, in what full static batches answer")
    parser.add_argument("--requests", type=int, default=0, help="requests of a trace (demo: 128, 100m: 32)")
    parser.add_argument("--new-tokens", type=_span, default=(16, 256), help="FEWEST-MOST new tokens of a request")
    parser.add_argument("--max-at-once", type=int, default=32, help="sequences of a batch, and of a step of ours")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of either engine")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and lengths")
    parser.add_argument("--quick", action="store_true", help="few, short requests: does it run, not how fast is it")
    options = parser.parse_args(arguments)
    if options.quick:
        options.requests, options.new_tokens = options.requests or 6, (2, 8)
    return options


def _span(text: str) -> tuple[int, int]:
    fewest, _, most = text.partition("-")
    span = int(fewest), int(most or fewest)
    if not 1 <= span[0] <= span[1]:
        raise argparse.ArgumentTypeError(f"{text} is no range of lengths: use FEWEST-MOST, such as 16-256")
    return span


def _cases(name: str, dtype: str, options: argparse.Namespace, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """One case for each load; the engines take turns. The first trace, a full batch, says what a load of 1 is."""
    count = options.requests or NUM_REQUESTS[name]
    model = load_model(name, RESULTS / "models", count)
    requests = _mixed(model.requests, count)
    servers = {engine: make(model, dtype, options.threads, options.max_at_once) for engine, make in ENGINES.items()}
    try:
        at_once = poisson_arrivals(requests[: options.max_at_once // 2], 0.0, options.new_tokens, options.seed + 1)
        full = figures(at_once, _serve(servers, at_once, f"{name} {dtype}: all at once", tell)["static"])
        capacity = full["tokens_per_s"] / statistics.fmean(options.new_tokens)  # requests per second
        cases = []
        for load in map(float, options.loads.split(",")):
            trace = poisson_arrivals(requests, load * capacity, options.new_tokens, options.seed)
            answers = _serve(servers, trace, f"{name} {dtype}: load {load:g}", tell)
            place = {"model": name, "dtype": dtype, "load": load, "requests_per_s": round(load * capacity, 3)}
            cases.append({**place, "requests": count, **_compare(trace, answers)})
        return cases
    finally:
        for server in servers.values():
            server.close()
        servers.clear()
        gc.collect()


def _serve(
    servers: dict[str, Server], trace: Sequence[Arrival], what: str, tell: Callable[[str], None]
) -> dict[str, list[Answer]]:
    """Every engine's answers to the same trace."""
    answers = {}
    for engine, server in servers.items():
        tell(f"{what}, {engine}, {len(trace)} requests over {trace[-1].at_s:.0f} s")
        answers[engine] = server.serve(trace)
    return answers


def _mixed(with_images: Sequence[BenchRequest], count: int) -> list[BenchRequest]:
    """Text and image in turn."""
    return [pair[i % 2] for i, pair in enumerate(zip(text_requests(count), with_images, strict=True))]


def _compare(trace: Sequence[Arrival], answers: dict[str, list[Answer]]) -> dict[str, Any]:
    by_engine = {engine: figures(trace, given) for engine, given in answers.items()}
    ours, static = by_engine["tandem"], by_engine["static"]
    num_equal = sum(a.token_ids == b.token_ids for a, b in zip(*answers.values(), strict=True))
    return {
        **by_engine,
        "x_throughput": round(ours["tokens_per_s"] / static["tokens_per_s"], 2),
        "x_ttft_p90": round(static["ttft_p90_ms"] / ours["ttft_p90_ms"], 2),
        "equal_answers": f"{num_equal}/{len(trace)}",
    }


def figures(trace: Sequence[Arrival], answers: Sequence[Answer]) -> dict[str, float]:
    """Of one engine on one trace: all tokens asked for over the time to the last of them, and the waiting times."""
    end_s = max(arrival.at_s + answer.last_s for arrival, answer in zip(trace, answers, strict=True))
    firsts, lasts = ([getattr(a, name) for a in answers] for name in ("first_s", "last_s"))
    return {
        "tokens_per_s": round(sum(len(answer.token_ids) for answer in answers) / end_s, 1),
        "ttft_p50_ms": round(1e3 * statistics.median(firsts), 1),
        "ttft_p90_ms": round(1e3 * _p90(firsts), 1),
        "answer_p90_ms": round(1e3 * _p90(lasts), 1),
    }


def _p90(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=10, method="inclusive")[-1]


def table(report: dict[str, Any]) -> Table:
    """A row for each load."""
    shown = Table(*COLUMNS, title="Poisson arrivals, mixed lengths")
    for case in report["cases"]:
        ours, static = case["tandem"], case["static"]
        cells = [f"{case['model']} {case['dtype']}", case["load"], case["requests_per_s"]]
        cells += [ours["tokens_per_s"], static["tokens_per_s"], case["x_throughput"]]
        cells += [ours["ttft_p90_ms"], static["ttft_p90_ms"], case["x_ttft_p90"]]
        shown.add_row(*map(str, cells))
    return shown


if __name__ == "__main__":
    sys.exit(main())
