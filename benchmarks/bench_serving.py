"""Serving against transformers on the CPU: time to first token and tokens per second, in one interleaved run.

    python -m benchmarks.bench_serving --json FILE [--quick] [--models demo,100m] [--dtypes float32,bfloat16]

Per model and dtype, rounds alternate between the engines (one request each, then 16 at once each), the first of them
discarded; medians are reported, and medians of the ratios within a round. Requests that end after two tokens give
more figures for the first one. One-thread figures are taken for single requests only.
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

from benchmarks.report import machine, median, versions, write_json
from benchmarks.serving_models import BenchModel, BenchRequest, load_model
from benchmarks.serving_peers import Ours, Peer, Run, Transformers
from benchmarks.serving_tables import markdown, tables

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow")
BATCH = 16
ENGINES = {"tandem": Ours, "transformers": Transformers}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rounds:
    """How often each measurement is repeated, after one round that is thrown away. serial: single requests on one
    thread. first: single requests whose first token alone counts, besides.
    """

    first: int
    single: int
    serial: int
    batch: int


ROUNDS = {
    "demo": Rounds(first=0, single=40, serial=20, batch=7),
    "100m": Rounds(first=15, single=5, serial=3, batch=2),
}
QUICK_ROUNDS = {
    "demo": Rounds(first=0, single=5, serial=3, batch=2),
    "100m": Rounds(first=1, single=2, serial=1, batch=1),
}
FIRST_TOKENS = 2  # that such a request asks for


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One model, dtype and number of threads."""

    model: BenchModel
    dtype: str
    threads: int
    rounds: Rounds
    with_batch: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    options = _options(arguments)
    console = Console()
    started = time.monotonic()
    report: dict[str, Any] = {"machine": machine(), "versions": versions(PACKAGES), "batch": BATCH, "cases": []}
    cases = _cases(options)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(cases))
        for case in cases:
            label = f"{case.model.name} {case.dtype} {case.threads} threads"
            progress.update(task, description=label)
            report["cases"].append(measure(case))
            progress.advance(task)
    report["seconds"] = round(time.monotonic() - started, 1)
    write_json(options.json, report)
    options.json.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    for table in tables(report):
        console.print(table)
    console.print(f"{report['seconds']} s; JSON: {options.json}; Markdown beside it")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_serving", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "serving.json", help="where the JSON goes")
    parser.add_argument("--models", default="demo,100m", help="comma-separated: demo, 100m")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated torch dtypes")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of either engine")
    parser.add_argument("--quick", action="store_true", help="few rounds: does it run, not how fast is it")
    return parser.parse_args(arguments)


def _cases(options: argparse.Namespace) -> list[Case]:
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    cases = []
    for name in options.models.split(","):
        count = max(BATCH * (1 + rounds[name].batch), 1 + rounds[name].single) if name in rounds else 1
        model = load_model(name, RESULTS / "models", count)
        for dtype in options.dtypes.split(","):
            for threads in dict.fromkeys((options.threads, 1)):
                cases.append(
                    Case(
                        model=model,
                        dtype=dtype,
                        threads=threads,
                        rounds=rounds[name],
                        with_batch=threads == options.threads,
                    )
                )
    return cases


def measure(case: Case) -> dict[str, Any]:
    """Run one case: both engines loaded, taking turns."""
    peers: dict[str, Peer] = {name: engine(case.model, case.dtype, case.threads) for name, engine in ENGINES.items()}
    requests = case.model.requests
    try:
        count = case.rounds.single if case.with_batch else case.rounds.serial
        single = _alternate(peers, count, [[request] for request in requests])
        first = _alternate(peers, case.rounds.first, [[request] for request in requests], FIRST_TOKENS)
        batches = [list(requests[first : first + BATCH]) for first in range(0, len(requests), BATCH)]
        batch = _alternate(peers, case.rounds.batch, batches) if case.with_batch else {}
    finally:
        for peer in peers.values():
            peer.close()
        peers.clear()
        gc.collect()
    result: dict[str, Any] = {
        "model": case.model.name,
        "dtype": case.dtype,
        "threads": case.threads,
        "new_tokens": case.model.new_tokens,
        "single": {name: _summary(runs, first[name]) for name, runs in single.items()},
        "equal_answers": _equal_answers(single),
    }
    if batch:
        result["concurrent"] = {name: _summary(runs, []) for name, runs in batch.items()}
    result["ratios"] = _ratios(single, first, batch)
    return result


def _alternate(
    peers: dict[str, Peer], rounds: int, work: Sequence[list[BenchRequest]], new_tokens: int | None = None
) -> dict[str, list[Run]]:
    """Every engine in turn on the same requests; who goes first changes from round to round."""
    runs: dict[str, list[Run]] = {name: [] for name in peers}
    for i in range(rounds + 1 if rounds else 0):
        requests = work[i % len(work)]
        for name in list(peers) if i % 2 else reversed(list(peers)):
            peer = peers[name]
            run = peer.one(requests[0], new_tokens) if len(requests) == 1 else peer.many(requests)
            if i:
                runs[name].append(run)
    return runs


def _summary(runs: Sequence[Run], first: Sequence[Run]) -> dict[str, Any]:
    return {
        "runs": len(runs),
        "ttft_ms": round(median([1e3 * run.first_s for run in (*runs, *first)]), 2),
        "ms_per_token": round(median([run.ms_per_token for run in runs]), 3),
        "tokens_per_s": round(median([run.tokens_per_s for run in runs]), 1),
        "tokens_per_s_all": [round(run.tokens_per_s, 1) for run in runs],
    }


def _equal_answers(runs: dict[str, list[Run]]) -> str:
    pairs = list(zip(*runs.values(), strict=True))
    return f"{sum(a.token_ids == b.token_ids for a, b in pairs)}/{len(pairs)}"


def _ratios(single: dict[str, list[Run]], first: dict[str, list[Run]], batch: dict[str, list[Run]]) -> dict[str, float]:
    """Medians over the rounds, all of them better when larger; 1 is parity."""
    pairs = list(zip(single["tandem"], single["transformers"], strict=True))
    begun = [*pairs, *zip(first["tandem"], first["transformers"], strict=True)]
    ratios = {
        "ttft_speedup": median([theirs.first_s / ours.first_s for ours, theirs in begun]),
        "tokens_per_s": median([ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs]),
        "decode_speedup": median([theirs.ms_per_token / ours.ms_per_token for ours, theirs in pairs]),
    }
    if batch:
        alone = median([ours.tokens_per_s for ours, _ in pairs])
        together = list(zip(batch["tandem"], batch["transformers"], strict=True))
        ratios["concurrent_over_one_by_one"] = median([ours.tokens_per_s for ours, _ in together]) / alone
        ratios["concurrent_over_static_batch"] = median(
            [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in together]
        )
    return {name: round(value, 2) for name, value in ratios.items()}


if __name__ == "__main__":
    sys.exit(main())
