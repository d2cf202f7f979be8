"""WorkerMonitor: pings every worker and marks the silent ones, so that no request is sent to them.

Ray does not notice a stopped process; an unanswered ping does. A worker that answers again is taken back.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

from cluster.directory import WorkerAddress, WorkerDirectory
from transfer.errors import EndpointClosed, RemoteFailure
from transfer.service.service import Service

logger = logging.getLogger(__name__)

PING_INTERVAL_S = 1.0


class WorkerMonitor:
    """One thread; one ping per worker under way at most. The service's peer timeout decides when it is lost."""

    def __init__(self, service: Service, directory: WorkerDirectory, interval_s: float = PING_INTERVAL_S) -> None:
        self._service = service
        self._directory = directory
        self._interval_s = interval_s
        self._asked: set[WorkerAddress] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker-monitor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop the thread; closing twice, or before starting, does nothing."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            for worker in self._directory.all():
                try:
                    self._ping(worker)
                except EndpointClosed:
                    return

    def _ping(self, worker: WorkerAddress) -> None:
        with self._lock:
            if worker in self._asked:
                return
            self._asked.add(worker)

        def on_end(body: dict[str, Any] | None, failure: RemoteFailure | None) -> None:
            with self._lock:
                self._asked.discard(worker)
            if self._directory.set_alive(worker, failure is None):
                logger.warning(
                    "worker %s %s", worker.name, "answers again" if failure is None else f"is lost: {failure}"
                )

        self._service.call(self._directory.connection(worker), "ping", {}, on_end=on_end)
