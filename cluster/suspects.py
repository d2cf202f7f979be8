"""Suspects: which of the requests that ran at a worker when it crashed may be what crashed it.

A request that ran at one crash is computed anew like any other. One that ran at two may be their cause: where no other
request ran at both, it is; where others did, one of them at a time is tried once more while the rest wait, so that a
third crash names it. The crashes that a named request ran at are explained by it, and held against nobody else.

In doubt it was no crash: a loss counts against a request only if the worker was heard from after the request had left
for it, and is gone. Where it lives, or answers after all, only the link broke. Thread-safe; requests are opaque.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from cluster.directory import WorkerAddress

R = TypeVar("R", bound=Hashable)
MAX_CRASHES = 2


class Verdict(enum.Enum):
    """What to do with a request whose worker crashed."""

    ANEW = "compute it anew at another worker"
    TRIAL = "it or another one crashes workers: try it when it is its turn"
    GUILTY = "it crashes workers: give it up"


class Suspects(Generic[R]):
    """The requests that run, and the crashes they ran at."""

    def __init__(self, is_alive: Callable[[WorkerAddress], bool]) -> None:
        self._is_alive = is_alive
        self._lock = threading.Lock()
        self._running: dict[R, frozenset[WorkerAddress]] = {}
        self._crashes: dict[WorkerAddress, set[R]] = {}  # who ran there, of those that have not ended
        self._taken: dict[R, set[WorkerAddress]] = {}  # who was heard from after the request had left for it
        self._sure: set[WorkerAddress] = set()  # crashed by their own word: the process may still answer
        self._guilty: set[R] = set()
        self._waiting: list[R] = []
        self._on_trial: R | None = None

    def enter(self, request: R, workers: Iterable[WorkerAddress], *, goes_on: bool = False) -> None:
        """The request runs at these workers now. goes_on: and at those where it ran before."""
        with self._lock:
            before = self._running.get(request, frozenset()) if goes_on else frozenset()
            self._running[request] = before | frozenset(workers)

    def took(self, request: R, worker: WorkerAddress) -> None:
        """The worker was heard from after the request had left for it: it lived when the request came."""
        with self._lock:
            if worker in self._running.get(request, ()):
                self._taken.setdefault(request, set()).add(worker)

    def leave(self, request: R) -> None:
        """The request has ended."""
        with self._lock:
            self._running.pop(request, None)
            self._taken.pop(request, None)
            self._guilty.discard(request)
            self._on_trial = None if self._on_trial == request else self._on_trial
            for crash in self._crashes.values():
                crash.discard(request)
            self._drop({worker for worker, crash in self._crashes.items() if not crash})

    def judge(self, request: R, worker: WorkerAddress, *, is_sure: bool) -> Verdict:
        """The request lost this worker. A guilty request's crashes are forgotten. is_sure: it crashed, nothing else."""
        with self._lock:
            if request in self._guilty:
                return Verdict.GUILTY
            if not is_sure and self._is_alive(worker):
                return Verdict.ANEW
            if worker not in self._crashes:
                self._crashes[worker] = {other for other, workers in self._running.items() if worker in workers}
            self._crashes[worker].add(request)
            self._sure |= {worker} if is_sure else set()
            crashes = self._crashes_of(request)
            if len(crashes) < MAX_CRASHES:
                return Verdict.ANEW
            if len(set.intersection(*(self._crashes[crashed] for crashed in crashes))) > 1:
                return Verdict.TRIAL
            self._drop(crashes)
            self._guilty.add(request)
            return Verdict.GUILTY

    def wait(self, request: R) -> None:
        """The request is to be tried when it is its turn."""
        with self._lock:
            self._running.pop(request, None)
            self._on_trial = None if self._on_trial == request else self._on_trial
            self._waiting.append(request)

    def withdraw(self, request: R) -> bool:
        """The request waits no more; whether it did."""
        with self._lock:
            waits = request in self._waiting
            self._waiting = [other for other in self._waiting if other != request]
            return waits

    def release(self, can_risk: Callable[[set[str]], bool]) -> list[R]:
        """Who waits no more: those that are suspects no longer, and the next to be tried, if nobody is and its crashes'
        kinds of workers can be risked.
        """
        with self._lock:
            crashes = {request: self._crashes_of(request) for request in self._waiting}
            released = [request for request in self._waiting if len(crashes[request]) < MAX_CRASHES]
            if self._on_trial is None:
                suspects = (request for request in self._waiting if request not in released)
                self._on_trial = next((r for r in suspects if can_risk({w.kind for w in crashes[r]})), None)
                released += [] if self._on_trial is None else [self._on_trial]
            self._waiting = [request for request in self._waiting if request not in released]
            return released

    @property
    def num_waiting(self) -> int:
        with self._lock:
            return len(self._waiting)

    def _crashes_of(self, request: R) -> set[WorkerAddress]:
        """Those that count against it: where it ran when they crashed."""
        ran_at = {worker for worker, crash in self._crashes.items() if request in crash}
        gone = {worker for worker in ran_at & self._taken.get(request, set()) if not self._is_alive(worker)}
        return gone | (ran_at & self._sure)

    def _drop(self, workers: set[WorkerAddress]) -> None:
        self._crashes = {worker: crash for worker, crash in self._crashes.items() if worker not in workers}
        self._sure -= workers
