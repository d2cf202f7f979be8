"""One of the two processes of the transfer benchmark: it obeys commands on stdin, a line of JSON each, and answers so.

Knows how a run of a path is made and how much processor time it took here; what to compare is the other side's matter.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import network_namespace
from benchmarks.transfer_memory import SOURCE_SEED, TARGET_SEED, Content, Pool, Shape, memcpy_seconds
from benchmarks.transfer_paths import PATHS, ReceiverPath, SenderPath
from transfer.endpoints.allocator import tune_allocator

Body = dict[str, Any]


class ReceiverProcess:
    """Answers `run` twice: when it waits for the blocks, and when it has them."""

    def __init__(self, shape: Shape, folder: str) -> None:
        self._pool = Pool(shape, TARGET_SEED)
        self._source = Content(shape, SOURCE_SEED)
        self._folder = folder
        self._paths: dict[str, ReceiverPath] = {}

    def open(self, command: Body) -> Body:
        path = PATHS[command["path"]].receiver(self._pool, self._folder)
        self._paths[command["path"]] = path
        return {"address": path.address}

    def allow(self, command: Body) -> Body:
        self._paths[command["path"]].allow(command["key"])
        return {}

    def run(self, command: Body) -> Body:
        path = self._paths[command["path"]]
        runs = _requests(command)
        for first, count, ticket in runs:
            path.expect(first, count, ticket, self._source if command["check"] else None)
        before = _cpu_seconds()
        _answer({"ready": True})
        right = [path.receive(first, count) for first, count, _ in runs]
        return {"cpu_s": _cpu_seconds() - before, "right": all(right)}

    def close(self, command: Body) -> Body:
        for path in self._paths.values():
            path.close()
        return {}


class SenderProcess:
    """Answers `run` with the seconds of each request."""

    def __init__(self, shape: Shape, folder: str) -> None:
        self._pool = Pool(shape, SOURCE_SEED)
        self._target: Pool | None = None
        self._folder = folder
        self._paths: dict[str, SenderPath] = {}

    def open(self, command: Body) -> Body:
        path = PATHS[command["path"]].sender(self._pool, command["address"], self._folder)
        self._paths[command["path"]] = path
        return {"key": path.public_key}

    def run(self, command: Body) -> Body:
        path = self._paths[command["path"]]
        before = _cpu_seconds()
        seconds = [path.send(first, count, ticket, command["is_open"]) for first, count, ticket in _requests(command)]
        return {"cpu_s": _cpu_seconds() - before, "seconds": seconds}

    def memcpy(self, command: Body) -> Body:
        self._target = self._target or Pool(self._pool.content.shape, TARGET_SEED)
        before = _cpu_seconds()
        seconds = [memcpy_seconds(self._pool, self._target, first, count) for first, count, _ in _requests(command)]
        return {"cpu_s": _cpu_seconds() - before, "seconds": seconds}

    def close(self, command: Body) -> Body:
        for path in self._paths.values():
            path.close()
        return {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Set the process up, then obey until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer_peer")
    parser.add_argument("role", choices=("receiver", "sender"))
    parser.add_argument("--items", type=int, required=True)
    parser.add_argument("--block-rows", type=int, required=True)
    parser.add_argument("--folder", required=True, help="private folder for ipc sockets")
    parser.add_argument("--isolate", metavar="CONGESTION", help="own network namespace with this congestion control")
    parser.add_argument("--join", type=int, metavar="PID", help="the network namespace of that process")
    options = parser.parse_args(arguments)
    isolated = bool(options.isolate) and network_namespace.isolate(options.isolate)
    if options.join:
        network_namespace.join(options.join)
    tuned = tune_allocator()
    torch.set_num_threads(1)  # copies that stand for a computation would leave a pool of threads spinning on both cores
    shape = Shape(num_items=options.items, block_rows=options.block_rows)
    process = (ReceiverProcess if options.role == "receiver" else SenderProcess)(shape, options.folder)
    congestion = network_namespace.congestion_control()
    _answer({"pid": os.getpid(), "isolated": isolated, "congestion": congestion, "allocator_tuned": tuned})
    for line in sys.stdin:
        command = json.loads(line)
        act: Callable[[Body], Body] = getattr(process, command["do"])
        try:
            _answer(act(command))
        except Exception as error:
            _answer({"error": f"{options.role}: {command.get('path')}: {type(error).__name__}: {error}"})
    return 0


def _requests(command: Body) -> list[tuple[int, int, Body | None]]:
    """(first block, number of blocks, ticket) of each request; requests go on in the pools where the last one ended."""
    count: int = command["count"]
    tickets = command.get("tickets") or [None] * command["requests"]
    return [(command["first"] + i * count, count, ticket) for i, ticket in enumerate(tickets)]


def _cpu_seconds() -> float:
    """Of all threads of this process, in user and kernel mode."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _answer(body: Body) -> None:
    sys.stdout.write(json.dumps(body) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
