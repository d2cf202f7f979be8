"""Prefill and decode apart against together, in one process: time to first token, and bytes of KV moved.

    python -m benchmarks.bench_split [--rounds N] [--lengths 64,512,2048] [--json FILE]

The two take turns on the shipped model, the first round discarded; prompts differ in every round, so no cache helps.
What the split costs a lone request is what is seen: the KV's way, one more step, and no second processor to gain from.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import machine, median, versions, write_json
from cluster import LLM, SamplingParams
from cluster.demo import MODEL_DIR

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = ("prompt tokens", "KV bytes", "together ms", "split ms", "x together", "tok/s together", "tok/s split")
NUM_NEW = 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="tandem bench split", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lengths", default="64,512,2048")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, default=RESULTS / "split.json")
    options = parser.parse_args(arguments)
    settings: dict[str, Any] = {"dtype": options.dtype, "device": "cpu", "language": {"num_threads": 1}}
    rows = []
    with (
        LLM(str(MODEL_DIR), **settings) as together,
        LLM(str(MODEL_DIR), workers={"prefill": 1, "decode": 1}, **settings) as split,
    ):
        for length in map(int, options.lengths.split(",")):
            rows.append(_case(together, split, length, options.rounds))
    write_json(options.json, {"machine": machine(), "versions": versions(("torch",)), "cases": rows})
    table = Table(*COLUMNS, title=f"Time to first token of one request, {options.dtype}, {options.rounds} rounds")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table, f"written to {options.json}")
    return 0


def _case(together: LLM, split: LLM, length: int, rounds: int) -> dict[str, Any]:
    runs: list[tuple[tuple[float, float], tuple[float, float]]] = []
    num_bytes = 0
    for i in range(rounds + 1):
        rng = random.Random(length * 1000 + i)
        prompt = [rng.randrange(400) for _ in range(length)]
        before = _moved(split)
        runs.append((_run(together, prompt), _run(split, prompt)))
        num_bytes = _moved(split) - before
    runs = runs[1:]
    whole, apart = ([pair[side] for pair in runs] for side in (0, 1))
    return {
        "prompt_tokens": length,
        "kv_bytes": num_bytes,
        "ttft_together_ms": 1e3 * median([first for first, _ in whole]),
        "ttft_split_ms": 1e3 * median([first for first, _ in apart]),
        "ratio": median([b[0] / a[0] for a, b in runs]),
        "tokens_per_s_together": median([NUM_NEW / total for _, total in whole]),
        "tokens_per_s_split": median([NUM_NEW / total for _, total in apart]),
    }


def _moved(llm: LLM) -> int:
    stats = llm.stats()["decode-0"]
    return int(stats["kv_tokens_imported_total"]) * int(stats["kv_row_bytes"])  # type: ignore[call-overload]


def _run(llm: LLM, prompt: list[int]) -> tuple[float, float]:
    """Seconds to the first token, and to the last."""
    started, first = time.perf_counter(), 0.0
    for _ in llm.stream(prompt, SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True)):
        first = first or time.perf_counter() - started
    return first, time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
