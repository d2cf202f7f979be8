"""Prefill on the arrived prefix: how much of a throttled transfer of embeddings it hides, on the CPU.

    python -m benchmarks.bench_overlap --json FILE [--quick] [--models 100m,demo] [--dtypes bfloat16]

A language worker gets the rows of one long image prompt by the usual stream, from a sender that writes them at an even
pace. One worker computes them as they come, another waits until all are there; they take turns, and what the first is
quicker, over the time that the rows took, is the share hidden. A transfer of 1 takes as long as the computation alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.report import machine, median, versions, write_json
from benchmarks.serving_models import load_model
from cluster.model_info import ModelInfo
from language_worker.config import EngineConfig
from language_worker.sampling_params import SamplingParams
from language_worker.worker import LanguageWorker
from transfer.config import TransferConfig
from transfer.endpoints.endpoint import open_endpoint
from transfer.errors import RemoteFailure
from transfer.memory.buffers import plane_of
from transfer.protocol.ticket import Ticket
from transfer.service.service import Service
from transfer.streams.stream_sender import StreamSender

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = ("model", "rows", "transfer", "ms", "at once ms", "waits ms", "as they come ms", "hidden")
WAIT_S = 120.0
NAMES = itertools.count()
SAMPLING = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


class Pair:
    """A language worker, and a client that calls it and sends it rows; `waits`: it begins when it has all of them."""

    def __init__(self, folder: Path, options: argparse.Namespace, dtype: str, *, waits: bool) -> None:
        longest = options.rows + 16
        config = EngineConfig(
            dtype=dtype,  # type: ignore[arg-type]
            num_threads=options.threads,
            prefix_cache=False,
            max_step_tokens=longest,
            kv_cache_tokens=longest + 32,
            max_model_len=longest,
            **({"min_partial_chunk": longest} if waits else {}),
        )
        transfer = TransferConfig(block_size=options.block_size)
        self._block_size = options.block_size
        self._image_id = ModelInfo.load(str(folder)).image_token_id
        self._worker = LanguageWorker(folder, config, transfer, open_endpoint(f"inproc://overlap-{next(NAMES)}"))
        self._worker.start()
        self._service = Service(open_endpoint(f"inproc://overlap-{next(NAMES)}"), transfer)
        self._sender = StreamSender(self._service, transfer)
        self._service.start()
        self._connection = self._service.endpoint.connect(self._worker.address)

    def first_token(self, rows: torch.Tensor, transfer_s: float) -> tuple[float, tuple[int, ...]]:
        """Seconds from the call to the first token, and that token; the last row leaves after `transfer_s`."""
        times: list[float] = []
        ids: list[int] = []
        failures: list[RemoteFailure | None] = []
        ended = threading.Event()

        def on_part(body: dict[str, Any], frames: Sequence[memoryview]) -> None:
            times.append(time.perf_counter())
            ids.extend(body.get("token_ids", ()))

        def on_end(body: dict[str, Any] | None, failure: RemoteFailure | None) -> None:
            failures.append(failure)
            ended.set()

        ticket = Ticket.issue(f"overlap-{next(NAMES)}")
        body = {"request_id": ticket.stream_id, "prompt_token_ids": [1, 2, self._image_id, 3, 4], "num_media": 1}
        body |= {"sampling": SAMPLING.to_body(), "ticket": ticket.to_body()}
        started = time.perf_counter()
        self._service.call(self._connection, "generate", body, on_part=on_part, on_end=on_end)
        self._send(ticket, rows, started, transfer_s)
        if not ended.wait(WAIT_S):
            raise TimeoutError(f"the worker has not answered after {WAIT_S:g} s")
        (failure,) = failures
        if failure is not None:
            raise failure
        return times[0] - started, tuple(ids)

    def _send(self, ticket: Ticket, rows: torch.Tensor, started: float, transfer_s: float) -> None:
        """Rows leave in blocks, each when its last row is due."""
        stream = self._sender.open(ticket, self._worker.address, None, (plane_of("embeddings", rows),))
        stream.announce(rows.shape[0], [{"grid": [1, 2, 2 * rows.shape[0]], "rows": rows.shape[0]}])
        first = 0
        for part in rows.split(self._block_size):
            due = started + transfer_s * (first + part.shape[0]) / rows.shape[0]
            time.sleep(max(0.0, due - time.perf_counter()))
            stream.write(first, {"embeddings": part})
            first += part.shape[0]

    def close(self) -> None:
        self._service.close()
        self._worker.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    options = _options(arguments)
    console, report = Console(), {"machine": machine(), "versions": versions(("torch",)), "threads": options.threads}
    report |= {"block_size": options.block_size, "rounds": options.rounds, "cases": []}
    for name in options.models.split(","):
        for dtype in options.dtypes.split(","):
            with console.status(f"{name} {dtype}"):
                report["cases"] += _cases(name, dtype, options)
    write_json(options.json, report)
    console.print(table(report))
    console.print(f"JSON: {options.json}")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_overlap", description=__doc__)
    parser.add_argument("--json", type=Path, default=RESULTS / "overlap.json", help="where the JSON goes")
    parser.add_argument("--models", default="100m", help="comma-separated: demo, 100m")
    parser.add_argument("--dtypes", default="bfloat16", help="comma-separated torch dtypes")
    parser.add_argument("--rows", type=int, default=1920, help="rows of the prompt's image")
    parser.add_argument("--block-size", type=int, default=128, help="rows of a block of the transfer")
    parser.add_argument("--transfers", default="0.5,1", help="comma-separated: its time, in the computation's")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds, after one that is thrown away")
    parser.add_argument("--quick", action="store_true", help="one round: does it run, not how much is hidden")
    options = parser.parse_args(arguments)
    options.rounds = 1 if options.quick else options.rounds
    return options


def _cases(name: str, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One case for each pace."""
    folder = load_model(name, RESULTS / "models", 1).folder
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    width = config.get("text_config", config)["hidden_size"]
    generator = torch.Generator().manual_seed(0)
    rows = 0.1 * torch.randn(options.rows, width, generator=generator).to(getattr(torch, dtype))
    waiting = Pair(folder, options, dtype, waits=True)
    try:
        overlapping = Pair(folder, options, dtype, waits=False)
        try:
            place = {"model": name, "dtype": dtype, "rows": options.rows}
            paces = map(float, options.transfers.split(","))
            return [{**place, **_case(waiting, overlapping, rows, pace, options.rounds)} for pace in paces]
        finally:
            overlapping.close()
    finally:
        waiting.close()


def _case(waiting: Pair, overlapping: Pair, rows: torch.Tensor, pace: float, rounds: int) -> dict[str, Any]:
    """Per round: everything at once, then paced by what that took, to both workers."""
    measured, tokens = [], set()
    for i in range(rounds + 1):
        at_once_s, first = waiting.first_token(rows, 0.0)
        transfer_s = pace * at_once_s
        late_s, second = waiting.first_token(rows, transfer_s)
        early_s, third = overlapping.first_token(rows, transfer_s)
        tokens |= {first, second, third}
        if i:
            measured.append((transfer_s, at_once_s, late_s, early_s, (late_s - early_s) / transfer_s))
    names = ("transfer_ms", "at_once_ms", "waiting_ms", "overlapping_ms")
    *times, hidden = map(median, zip(*measured, strict=True))
    return {
        "transfer": pace,
        **{name: round(1e3 * value, 4) for name, value in zip(names, times, strict=True)},
        "hidden_share": round(hidden, 3),
        "equal_answers": len(tokens) == 1,
    }


def table(report: dict[str, Any]) -> Table:
    """A row for each pace."""
    shown = Table(*COLUMNS, title="first token of one image prompt whose rows come at an even pace")
    for case in report["cases"]:
        times = [round(case[name], 2) for name in ("transfer_ms", "at_once_ms", "waiting_ms", "overlapping_ms")]
        cells = (f"{case['model']} {case['dtype']}", case["rows"], case["transfer"], *times, case["hidden_share"])
        shown.add_row(*map(str, cells))
    return shown


if __name__ == "__main__":
    sys.exit(main())
