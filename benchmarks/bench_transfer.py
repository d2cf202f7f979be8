"""The wire against raw TCP and memcpy, between two processes, in one interleaved run.

    python -m benchmarks.bench_transfer [--rounds N] [--paths tcp,streams-tcp,...] [--json FILE]

Every round sends 543 MB over each path and then some requests of 1024 tokens, in blocks of 917,504 bytes from and to
cold memory in shuffled order; the first round is thrown away, and checks every byte instead. Ratios are taken within
a round; medians are reported, with processor seconds of both processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.report import machine, versions, write_json
from benchmarks.transfer_memory import ITEM_BLOCKS, Shape
from benchmarks.transfer_paths import PATHS, new_ticket
from benchmarks.transfer_tables import markdown, summarise, tables

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "numpy", "pyzmq", "msgpack", "xxhash")
CONGESTION = "reno"  # loopback has no losses: what matters is that nothing is paced
ANSWER_S = 120

Body = dict[str, Any]


class Peer:
    """A child process that obeys `transfer_peer`'s commands."""

    def __init__(self, role: str, shape: Shape, folder: str, extra: Sequence[str]) -> None:
        sizes = ["--items", str(shape.num_items), "--block-rows", str(shape.block_rows), "--folder", folder]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.transfer_peer", role, *sizes, *extra],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parent.parent,
        )
        try:
            self.facts = self.answer()
        except RuntimeError:
            self.close()
            raise

    def tell(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Body:
        """The next answer. RuntimeError when the process failed or ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the benchmark ended with code {self._process.wait(ANSWER_S)}")
        body: Body = json.loads(line)
        if "error" in body:
            raise RuntimeError(body["error"])
        return body

    def ask(self, **command: Any) -> Body:
        self.tell(**command)
        return self.answer()

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Pair:
    """A receiver and a sender, and runs between them."""

    def __init__(self, shape: Shape, folder: str, paths: Sequence[str], isolate: bool) -> None:
        self._first = 0  # where in the pools the next run begins
        self.receiver = Peer("receiver", shape, folder, ["--isolate", CONGESTION] if isolate else [])
        facts = self.receiver.facts
        try:
            self.sender = Peer("sender", shape, folder, ["--join", str(facts["pid"])] if facts["isolated"] else [])
        except RuntimeError:
            self.receiver.close()
            raise
        self._block_bytes = shape.block_bytes
        try:
            for path in paths:
                self._open(path)
        except RuntimeError:
            self.close()
            raise

    def _open(self, path: str) -> None:
        if path == "memcpy":
            return
        address = self.receiver.ask(do="open", path=path)["address"]
        key = self.sender.ask(do="open", path=path, address=address)["key"]
        if key is not None:
            self.receiver.ask(do="allow", path=path, key=key)

    def run(self, path: str, count: int, requests: int = 1, *, check: bool = False, is_open: bool = False) -> Body:
        """`requests` requests of `count` blocks: seconds of each, GB/s and processor seconds per GB."""
        work: Body = {"path": path, "first": self._first, "count": count, "requests": requests, "is_open": is_open}
        self._first += count * requests
        if path == "memcpy":
            sent, received = self.sender.ask(do="memcpy", **work), {"cpu_s": 0.0, "right": True}
        else:
            if PATHS[path].uses_tickets:
                work["tickets"] = [new_ticket() for _ in range(requests)]
            self.receiver.ask(do="run", check=check, **work)
            sent = self.sender.ask(do="run", **work)
            received = self.receiver.answer()
        if not received["right"]:
            raise RuntimeError(f"{path}: the bytes that came are not those that were sent")
        gigabytes = self._block_bytes * count * requests / 1e9
        return {
            "seconds": sent["seconds"],
            "gb_per_s": gigabytes / sum(sent["seconds"]),
            "cpu_s_per_gb": (sent["cpu_s"] + received["cpu_s"]) / gigabytes,
            "sender_cpu_s_per_gb": sent["cpu_s"] / gigabytes,
            "receiver_cpu_s_per_gb": received["cpu_s"] / gigabytes,
        }

    def close(self) -> None:
        for peer in (self.sender, self.receiver):
            with contextlib.suppress(RuntimeError, OSError):
                peer.ask(do="close")
            peer.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    options = _options(arguments)
    console = Console(width=None if sys.stdout.isatty() else 130)
    paths = options.paths.split(",") if options.paths else ["memcpy", *PATHS]
    unknown = sorted(set(paths) - {"memcpy", *PATHS})
    if unknown:
        raise SystemExit(f"there is no path {unknown[0]!r}; choose from memcpy, {', '.join(PATHS)}")
    shape = Shape(num_items=options.items or Shape().num_items, block_rows=options.block_rows)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        pair = Pair(shape, folder, paths, not options.no_namespace)
        try:
            runs = _measure(pair, shape, paths, options, console)
        finally:
            pair.close()
    facts = {name: pair.receiver.facts[name] for name in ("isolated", "congestion", "allocator_tuned")}
    report: Body = {"machine": machine(), "versions": versions(PACKAGES), **facts}
    report |= {"block_bytes": shape.block_bytes, "pool_blocks": shape.num_blocks, "rounds": options.rounds}
    report |= {"seconds": round(time.monotonic() - started, 1), **summarise(runs), "runs": runs}
    write_json(options.json, report)
    options.json.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    for table in tables(report):
        console.print(table)
    where = "a network namespace of their own" if report["isolated"] else "the machine's network"
    console.print(f"TCP congestion control: {report['congestion']}, in {where}; {report['seconds']} s; {options.json}")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_transfer", description=__doc__)
    add_options(parser)
    return parser.parse_args(arguments)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The benchmark's flags."""
    parser.add_argument("--json", type=Path, default=RESULTS / "transfer.json", help="where the JSON goes")
    parser.add_argument("--rounds", type=_count, default=15, help="rounds that count (default 15)")
    parser.add_argument(
        "--requests", type=_count, default=10, help="1024-token requests per path and round (default 10)"
    )
    parser.add_argument("--paths", default="", help=f"comma-separated, of memcpy, {', '.join(PATHS)} (default: all)")
    parser.add_argument("--items", type=int, default=0, help="items of 8 blocks in a pool (default: 256 MiB)")
    parser.add_argument("--block-rows", type=_count, default=128, help="rows of 7168 bytes in a block (default 128)")
    parser.add_argument("--no-namespace", action="store_true", help="measure on the machine's own loopback")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above zero")
    return number


def _measure(pair: Pair, shape: Shape, paths: list[str], options: argparse.Namespace, console: Console) -> list[Body]:
    """One body per round, path -> figures; who goes first changes from round to round."""
    rounds: list[Body] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=options.rounds + 1)
        for i in range(options.rounds + 1):
            figures: Body = {}
            for path in paths if i % 2 else reversed(paths):
                if i:
                    figures[path] = _figures(pair, path, shape, options.requests)
                elif path != "memcpy":
                    _check(pair, path, shape)
            progress.advance(task)
            if i:
                rounds.append(figures)
    return rounds


def _check(pair: Pair, path: str, shape: Shape) -> None:
    """Every byte of one run is compared; that also warms up everything."""
    hands_over = PATHS[path].hands_over
    pair.run(path, _handover_blocks(shape) if hands_over else shape.num_blocks, check=True, is_open=hands_over)


def _figures(pair: Pair, path: str, shape: Shape, requests: int) -> Body:
    if path == "memcpy":
        return pair.run(path, 2 * shape.num_blocks)
    if PATHS[path].hands_over:
        return {"handover": pair.run(path, _handover_blocks(shape), requests, is_open=True)["seconds"]}
    return {
        **pair.run(path, 2 * shape.num_blocks),
        "latency": pair.run(path, ITEM_BLOCKS, requests, is_open=True)["seconds"],
        "cold": pair.run(path, ITEM_BLOCKS, requests)["seconds"],
    }


def _handover_blocks(shape: Shape) -> int:
    """8192 tokens in blocks of 128, what is granted before a total is known; less where the pool is small."""
    return min(64, shape.num_blocks)


if __name__ == "__main__":
    sys.exit(main())
