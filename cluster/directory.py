"""WorkerDirectory: the workers that a gateway can reach, which of them live, and how much each was given.

Thread-safe. Knows addresses and connections; what travels over them is the handoff's and the monitor's business.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from cluster.router import WorkerKind, WorkerView
from transfer.connection import Connection
from transfer.service.service import Service


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerAddress:
    """Where one worker listens. public_key: its CURVE key, None where CURVE is off."""

    name: str
    kind: WorkerKind
    address: str
    public_key: str | None = None


class WorkerDirectory:
    """The workers known to one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._workers: dict[str, WorkerAddress] = {}
        self._running: dict[str, int] = {}
        self._dead: set[str] = set()
        self._withdrawn: set[str] = set()  # dead whatever a ping says: an answer may have been on its way
        self._failed: set[WorkerAddress] = set()  # dead too: the engine broke, its process answers until it is replaced
        self._listeners: list[Callable[[], None]] = []

    def listen(self, on_change: Callable[[], None]) -> None:
        """Call this, from any thread, whenever workers come, go, die or answer again."""
        self._listeners.append(on_change)

    def replace(self, workers: Iterable[WorkerAddress], withdrawn: Collection[str] = ()) -> None:
        """The workers are these now; calls to a worker that is gone, has moved or is withdrawn end with PeerLost.

        withdrawn: names of those whose process has ended, as somebody knows who sees it. They are dead until they are
        no longer among these, or are there at another address.
        """
        new = {worker.name: worker for worker in workers}
        with self._lock:
            gone = [old for name, old in self._workers.items() if new.get(name) != old]
            moved = {old.name for old in gone}
            ended = [new[name] for name in new.keys() & set(withdrawn) - self._withdrawn - moved]
            back = self._withdrawn - set(withdrawn)  # as another process, though it may listen at the same address
            self._workers = new
            self._failed = {worker for worker in self._failed & set(new.values()) if worker.name not in back}
            self._withdrawn = new.keys() & set(withdrawn)
            self._dead &= new.keys()
            self._dead -= moved
        for old in gone:
            self._service.drop_peer(self._connect(old), "the worker was replaced")
        for worker in ended:
            self._service.drop_peer(self._connect(worker), "the worker's process has ended")
        self._tell()

    def views(self) -> list[WorkerView]:
        """A snapshot for the router."""
        with self._lock:
            return [
                WorkerView(
                    name=w.name,
                    kind=w.kind,
                    is_alive=self._lives(w),
                    num_running=self._running.get(w.name, 0),
                )
                for w in self._workers.values()
            ]

    def all(self) -> list[WorkerAddress]:
        """Every known worker, dead or alive."""
        with self._lock:
            return list(self._workers.values())

    def get(self, name: str) -> WorkerAddress | None:
        with self._lock:
            return self._workers.get(name)

    def connection(self, worker: WorkerAddress) -> Connection:
        """The (cached, lazily made) connection to a worker."""
        return self._connect(worker)

    def set_failed(self, worker: WorkerAddress) -> None:
        """The engine of exactly this incarnation broke: it stays dead, whatever a ping says."""
        with self._lock:
            if self._workers.get(worker.name) != worker or worker in self._failed:
                return
            self._failed.add(worker)
        self._tell()

    def set_alive(self, worker: WorkerAddress, is_alive: bool) -> bool:
        """Note a verdict about exactly this incarnation of the worker. True if that is news."""
        with self._lock:
            if self._workers.get(worker.name) != worker or (worker.name not in self._dead) == is_alive:
                return False
            (self._dead.discard if is_alive else self._dead.add)(worker.name)
        self._tell()
        return True

    def is_alive(self, worker: WorkerAddress) -> bool:
        """Whether exactly this incarnation is known and not taken for dead."""
        with self._lock:
            return self._workers.get(worker.name) == worker and self._lives(worker)

    def add_running(self, name: str, change: int) -> None:
        """A request was handed to the worker (+1) or has ended there (-1)."""
        with self._lock:
            left = self._running.get(name, 0) + change
            if left:
                self._running[name] = left
            else:
                self._running.pop(name, None)

    def _lives(self, worker: WorkerAddress) -> bool:
        return worker.name not in self._dead | self._withdrawn and worker not in self._failed

    def _tell(self) -> None:
        for on_change in self._listeners:
            on_change()

    def _connect(self, worker: WorkerAddress) -> Connection:
        return self._service.endpoint.connect(worker.address, worker.public_key)
