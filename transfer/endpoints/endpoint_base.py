"""EndpointBase: what every transport's endpoint shares: one thread, posted callbacks, ticks, and failures contained.

Knows no transport. A subclass gives its address, `_run` (the thread's loop) and `_wake`.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from transfer.config import TransferConfig
from transfer.connection import Connection
from transfer.endpoints.contract import Handler, Tick
from transfer.errors import EndpointClosed, LocalProtocolError
from transfer.protocol.messages import Message

logger = logging.getLogger(__name__)

MAX_RESTARTS = 16  # of the loop, each within RESTART_SPAN_S of the one before
RESTART_SPAN_S = 1.0


class EndpointBase(ABC):
    """Start, post, tick and counters; see `connection.Endpoint` for the contract."""

    def __init__(self, config: TransferConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._posted: deque[Callable[[], None]] = deque()
        self._closing = False  # nothing more may be posted
        self._closed = False  # nothing more may be sent
        self._thread: threading.Thread | None = None
        self._handler: Handler | None = None
        self._on_tick: Tick | None = None
        self._on_restart: Callable[[], None] | None = None
        self._next_tick = 0.0
        self._counts = {
            "messages_received": 0,
            "dropped_malformed": 0,
            "dropped_old_link": 0,  # of a peer that was disconnected, or came back over a new link
            "dropped_unreachable": 0,
            "handler_errors": 0,
            "loop_restarts": 0,
        }

    @property
    @abstractmethod
    def address(self) -> str:
        """What peers connect to."""

    @abstractmethod
    def _run(self) -> None:
        """The loop of the I/O thread; ends soon after `_closing` is set and nothing is posted."""

    @abstractmethod
    def _wake(self) -> None:
        """Make the loop look at what was posted or queued; cheap, from any thread."""

    def start(
        self, handler: Handler, on_tick: Tick | None = None, on_restart: Callable[[], None] | None = None
    ) -> None:
        """Start the I/O thread; LocalProtocolError when it runs, EndpointClosed after close."""
        with self._lock:
            if self._closing:
                raise EndpointClosed(f"{self.address} is closed")
            if self._thread is not None:
                raise LocalProtocolError(f"{self.address} was started twice")
            self._handler, self._on_tick, self._on_restart = handler, on_tick, on_restart
            self._next_tick = time.monotonic() + self._config.tick_s
            self._thread = threading.Thread(target=self._keep_running, name=f"transfer {self.address}", daemon=True)
            self._thread.start()

    def post(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the I/O thread, in order. Raises EndpointClosed."""
        with self._lock:
            if self._closing:
                raise EndpointClosed(f"{self.address} is closed")
            self._posted.append(callback)
        if not self._on_thread():
            self._wake()

    def _keep_running(self) -> None:
        """The loop, started anew when it dies: a fault on one message must not silence a worker for good."""
        deaths = 0
        while True:
            started = time.monotonic()
            try:
                self._run()
                return
            except Exception:
                deaths = deaths + 1 if time.monotonic() - started < RESTART_SPAN_S else 1
                if self._closing or deaths > MAX_RESTARTS:
                    raise
                logger.exception("the loop of %s died and is started anew", self.address)
            self._counts["loop_restarts"] += 1
            if self._on_restart is not None:
                self._guard(self._on_restart)

    def _on_thread(self) -> bool:
        return self._thread is not None and threading.get_ident() == self._thread.ident

    def _run_posted(self) -> None:
        for _ in range(len(self._posted)):
            self._guard(self._posted.popleft())

    def _dispatch(self, connection: Connection, message: Message, frames: Sequence[memoryview]) -> None:
        self._counts["messages_received"] += 1
        if self._handler is not None:
            self._guard(self._handler, connection, message, frames)

    def _seconds_to_tick(self) -> float:
        return max(0.0, self._next_tick - time.monotonic())

    def _maybe_tick(self) -> None:
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + self._config.tick_s
            if self._on_tick is not None:
                self._guard(self._on_tick, now)

    def _guard(self, callback: Callable[..., None], *args: Any) -> None:
        try:
            callback(*args)
        except Exception:
            self._counts["handler_errors"] += 1
            logger.exception("a handler on %s failed; the endpoint goes on", self.address)
