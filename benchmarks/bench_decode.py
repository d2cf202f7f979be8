"""Decoding against transformers on the CPU: one request, 8 and 32 at once, text and images, in one interleaved run.

    python -m benchmarks.bench_decode --json FILE [--quick] [--models demo,100m] [--dtypes float32,bfloat16]

Rounds alternate between the engines, the first of them discarded; medians are reported. Requests that arrive together
are one left-padded static batch for transformers. Besides: the time around the model's step, the share of the memory
limit, and what drafts by prompt lookup bring on text that repeats itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.decode_limits import read_bandwidth, step_figures
from benchmarks.report import machine, median, versions, write_json
from benchmarks.serving_models import BenchModel, BenchRequest, load_model, text_requests
from benchmarks.serving_peers import Ours, Peer, Run, Transformers

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow")
COLUMNS = ("model", "dtype", "prompts", "at once", "tandem tok/s", "static batch tok/s", "x static", "x one by one")
STEP_COLUMNS = ("model", "dtype", "sequences", "model ms", "around it ms", "sampled", "memory limit ms")
REPETITIVE = "one two three four five six seven eight nine ten " * 12
NEW_TOKENS = {"demo": 64, "100m": 48}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print tables, write JSON."""
    options = _options(arguments)
    console, started = Console(), time.monotonic()
    report: dict[str, Any] = {"machine": machine(), "versions": versions(PACKAGES), "threads": options.threads}
    report |= {"cases": [], "steps": [], "drafts": []}
    pairs = [(name, dtype) for name in options.models.split(",") for dtype in options.dtypes.split(",")]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(pairs))
        for name, dtype in pairs:
            progress.update(task, description=f"{name} {dtype}")
            _measure(report, name, dtype, options)
            progress.advance(task)
    report["seconds"] = round(time.monotonic() - started, 1)
    write_json(options.json, report)
    for table in tables(report):
        console.print(table)
    console.print(f"{report['seconds']} s; JSON: {options.json}")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_decode", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "decode.json", help="where the JSON goes")
    parser.add_argument("--models", default="demo,100m", help="comma-separated: demo, 100m")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated torch dtypes")
    parser.add_argument("--prompts", default="text,image", help="comma-separated: text, image")
    parser.add_argument("--concurrency", default="1,8,32", help="comma-separated numbers of requests at once")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of either engine")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that is thrown away")
    parser.add_argument("--new-tokens", type=int, default=0, help="tokens of each answer (demo: 64, 100m: 48)")
    parser.add_argument("--quick", action="store_true", help="one round: does it run, not how fast is it")
    return parser.parse_args(arguments)


def _measure(report: dict[str, Any], name: str, dtype: str, options: argparse.Namespace) -> None:
    """All figures of one model in one dtype, added to the report."""
    rounds = 1 if options.quick else options.rounds
    widths = sorted({1, *map(int, options.concurrency.split(","))})
    count = (rounds + 1) * max(widths)
    model = load_model(name, RESULTS / "models", count)
    model = dataclasses.replace(model, new_tokens=options.new_tokens or NEW_TOKENS[name])
    peers: dict[str, Peer] = {
        "tandem": Ours(model, dtype, options.threads),
        "transformers": Transformers(model, dtype, options.threads),
    }
    try:
        for kind in options.prompts.split(","):
            requests = text_requests(count) if kind == "text" else model.requests
            place = {"model": name, "dtype": dtype, "prompts": kind, "new_tokens": model.new_tokens}
            report["cases"] += [{**place, **case} for case in _compare(peers, requests, widths, rounds)]
    finally:
        for peer in peers.values():
            peer.close()
        peers.clear()
        gc.collect()
    bandwidth = read_bandwidth(options.threads)
    for width in widths:
        step = step_figures(model, dtype, options.threads, width)
        limit_ms = 1e3 * step["weight_bytes"] / bandwidth
        step |= {"memory_limit_ms": round(limit_ms, 3), "share_of_limit": round(limit_ms / step["model_ms"], 3)}
        report["steps"].append({"model": name, "dtype": dtype, "read_gb_per_s": round(bandwidth / 1e9, 1), **step})
    report["drafts"].append({"model": name, "dtype": dtype, **_drafts(model, dtype, options.threads, rounds)})


def _compare(
    peers: dict[str, Peer], requests: Sequence[BenchRequest], widths: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Per number of requests at once: both engines' tokens per second, taking turns on the same requests."""
    runs: dict[int, dict[str, list[Run]]] = {width: {name: [] for name in peers} for width in widths}
    for i in range(rounds + 1):
        for width in widths:
            batch = list(requests[i * width : (i + 1) * width])
            for name in list(peers) if i % 2 else reversed(list(peers)):
                run = peers[name].one(batch[0]) if width == 1 else peers[name].many(batch)
                if i:
                    runs[width][name].append(run)
    rates = {
        width: {name: median([run.tokens_per_s for run in own]) for name, own in by_name.items()}
        for width, by_name in runs.items()
    }
    return [
        {
            "at_once": width,
            "tokens_per_s": {name: round(rate, 3) for name, rate in rates[width].items()},
            "ms_per_token": {name: round(median([run.ms_per_token for run in own]), 3) for name, own in by.items()},
            "x_static_batch": round(rates[width]["tandem"] / rates[width]["transformers"], 2),
            "x_one_by_one": round(rates[width]["tandem"] / rates[1]["transformers"], 2),
            "equal_answers": _num_equal(by),
            "runs": rounds,
        }
        for width, by in runs.items()
    ]


def _num_equal(runs: dict[str, list[Run]]) -> str:
    pairs = [
        (a, b)
        for ours, theirs in zip(runs["tandem"], runs["transformers"], strict=True)
        for a, b in zip(ours.token_ids, theirs.token_ids, strict=True)
    ]
    return f"{sum(a == b for a, b in pairs)}/{len(pairs)}"


def _drafts(model: BenchModel, dtype: str, threads: int, rounds: int) -> dict[str, Any]:
    """A request whose text repeats itself, with and without prompt lookup, taking turns."""
    model = dataclasses.replace(model, new_tokens=2 * model.new_tokens)
    request = BenchRequest(prompt=REPETITIVE, image=None)
    plain = Ours(model, dtype, threads)
    drafting = Ours(model, dtype, threads, decode_strategy="speculative")
    try:
        pairs = [(plain.one(request), drafting.one(request)) for _ in range(rounds + 1)][1:]
        stats = drafting.stats()
    finally:
        plain.close()
        drafting.close()
    speed_up = median([without.total_s / with_drafts.total_s for without, with_drafts in pairs])
    proposed = stats["spec_decode_num_draft_tokens_total"]
    return {
        "new_tokens": model.new_tokens,
        "speed_up": round(speed_up, 2),
        "acceptance": round(stats["spec_decode_num_accepted_tokens_total"] / max(1, proposed), 3),
        "equal_answers": sum(a.token_ids == b.token_ids for a, b in pairs) == len(pairs),
    }


def tables(report: dict[str, Any]) -> list[Table]:
    """The crowd, the step, the drafts."""
    crowd = Table(*COLUMNS, title="answers, ends of sequence ignored")
    for case in report["cases"]:
        rates = {name: round(rate, 1) for name, rate in case["tokens_per_s"].items()}
        cells = (rates["tandem"], rates["transformers"], case["x_static_batch"], case["x_one_by_one"])
        crowd.add_row(case["model"], case["dtype"], case["prompts"], str(case["at_once"]), *map(str, cells))
    step = Table(*STEP_COLUMNS, title="a decode step")
    for row in report["steps"]:
        values = (row["batch"], row["model_ms"], row["host_ms"], row["sampled_host_ms"], row["memory_limit_ms"])
        step.add_row(row["model"], row["dtype"], *map(str, values))
    drafts = Table("model", "dtype", "accepted", "x without", title="prompt lookup on text that repeats itself")
    for row in report["drafts"]:
        drafts.add_row(row["model"], row["dtype"], str(row["acceptance"]), str(row["speed_up"]))
    return [crowd, step, drafts]


if __name__ == "__main__":
    sys.exit(main())
