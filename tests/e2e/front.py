"""The front of a cluster in the test's process: a service, a directory and a handoff; gathers what a request yields.

`open_workers` puts workers in processes of their own behind one.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cluster.directory import WorkerAddress, WorkerDirectory
from cluster.handoff import Handoff
from cluster.served import RequestStats, RunningRequest, ServedRequest
from language_worker.api import TokenChunk
from tests.e2e.worker_process import WorkerProcess
from transfer.config import TransferConfig
from transfer.endpoints.endpoint import open_endpoint
from transfer.service.service import Service

WAIT_S = 120.0
PATIENT = {"peer_timeout_s": 90.0}  # nobody is lost because a machine is slow


@dataclass
class Gathered:
    """A Sink: one request's chunks and its outcome."""

    chunks: list[TokenChunk] = field(default_factory=list)
    stats: RequestStats | None = None
    error: Exception | None = None
    over: threading.Event = field(default_factory=threading.Event)
    first_chunk: threading.Event = field(default_factory=threading.Event)

    def on_chunk(self, chunk: TokenChunk) -> None:
        assert not self.over.is_set(), "a chunk after the end"
        self.chunks.append(chunk)
        self.first_chunk.set()

    def on_end(self, stats: RequestStats) -> None:
        assert not self.over.is_set(), "two ends"
        self.stats = stats
        self.over.set()

    def on_error(self, error: Exception) -> None:
        assert not self.over.is_set(), "two ends"
        self.error = error
        self.over.set()

    def finish(self) -> RequestStats:
        """Wait for the end; the request must have succeeded."""
        assert self.over.wait(WAIT_S), "the request did not end"
        assert self.error is None, self.error
        assert self.stats is not None
        return self.stats

    def tokens(self, index: int = 0) -> list[int]:
        return [token for chunk in self.chunks if chunk.index == index for token in chunk.token_ids]

    def logits(self) -> torch.Tensor:
        """float32 [prompt positions, vocabulary] of a finished request that asked for them."""
        parts = self.finish().hops["logits"]
        return torch.cat(
            [
                torch.frombuffer(bytearray(frame), dtype=torch.float32).view(body["logits_shape"])
                for body, frame in parts
            ]
        )


class Front:
    """Reaches workers by their addresses."""

    def __init__(self, address: str, transfer: TransferConfig, *, curve: bool = False) -> None:
        self.service = Service(open_endpoint(address, transfer, curve=curve), transfer)
        self.service.start()
        self.directory = WorkerDirectory(self.service)
        self._handoff = Handoff(self.service, self.directory)

    @property
    def public_key(self) -> str | None:
        return self.service.endpoint.public_key

    def reach(self, workers: Sequence[WorkerAddress]) -> None:
        self.directory.replace(workers)

    def submit(self, request: ServedRequest) -> tuple[Gathered, RunningRequest]:
        sink = Gathered()
        return sink, self._handoff.submit(request, sink)

    def close(self) -> None:
        self.service.close()


def open_workers(
    stack: ExitStack,
    model: str,
    transfer: Mapping[str, float],
    transport: str,
    processes: Mapping[str, WorkerProcess],
    **configs: dict[str, Any],
) -> Front:
    """A worker of each kind in `configs`, open and known to each other and to a front; all of it ends with `stack`."""
    sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-")))  # mkdtemp makes it 0700
    addresses = {
        name: f"ipc://{sockets}/{name}" if transport == "ipc" else "tcp://127.0.0.1:0" for name in ("front", *configs)
    }
    curve, transfer = transport == "curve", {**PATIENT, **transfer}
    front = Front(addresses["front"], TransferConfig(**transfer), curve=curve)  # type: ignore[arg-type]
    stack.callback(front.close)
    workers, keys = [], [front.public_key]
    for kind, config in configs.items():
        stack.callback(processes[kind].ask, "close")
        opened = processes[kind].ask(
            "open", model=model, address=addresses[kind], curve=curve, transfer=transfer, config=config
        )
        workers.append(WorkerAddress(name=kind, kind=kind, **opened))  # type: ignore[arg-type]
        keys.append(opened["public_key"])
    if curve:
        for process in processes.values():
            process.ask("allow", public_keys=keys)
    front.reach(workers)
    return front
