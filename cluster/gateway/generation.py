"""From the handoff's callbacks, which come from I/O threads, to the event loop.

One `Generation` gathers the chunks of all prompts of one HTTP request. A callback appends to a list under a lock and
wakes the loop at most once until the loop has looked: many tokens cost one wake-up. The list is bounded for streams,
where a client that does not read would let it grow. Knows nothing of HTTP or of JSON.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import ClusterError, RequestTimeout, SlowReader
from cluster.gateway.context import HandoffLike
from cluster.served import RequestStats, RunningRequest, ServedRequest
from language_worker.api import TokenChunk

MAX_BUFFERED_CHUNKS = 16384
DEADLINE_GRACE_S = 5.0  # the workers' own deadline comes first; this one is for workers that no longer answer


@dataclass(frozen=True, slots=True)
class Event:
    """A chunk, which prompt it belongs to, and when it arrived (time.perf_counter)."""

    prompt: int
    chunk: TokenChunk
    arrived_s: float


class Generation:
    """The running generations of one HTTP request. Everything but the sinks' callbacks belongs to the loop's thread."""

    def __init__(self, *, max_buffered: int | None = MAX_BUFFERED_CHUNKS) -> None:
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._lock = threading.Lock()
        self._max_buffered = max_buffered
        self._events: list[Event] = []
        self._error: Exception | None = None
        self._is_awake = False
        self._num_open = 0
        self._running: list[RunningRequest] = []
        self._deadline_s = 0.0
        self.stats: dict[int, RequestStats] = {}

    def start(self, handoff: HandoffLike, requests: Sequence[ServedRequest]) -> None:
        """Submit all requests, or none: what the handoff raises cancels the earlier ones and is raised again."""
        self._deadline_s = self._loop.time() + max(r.timeout_s for r in requests) + DEADLINE_GRACE_S
        self._num_open = len(requests)
        try:
            for i, request in enumerate(requests):
                self._running.append(handoff.submit(request, _PromptSink(self, i)))
        except BaseException:
            self.cancel()
            raise

    async def next_events(self) -> list[Event]:
        """What arrived since the last call, waiting for something to; empty when all prompts have ended.

        Raises the first error of any prompt, after the chunks before it; the other prompts are cancelled then.
        """
        while True:
            with self._lock:
                events, self._events = self._events, []
                error, is_over = self._error, self._num_open == 0
                self._is_awake = False
                self._wake.clear()
            if events:
                return events
            if error is not None:
                self.cancel()
                raise error
            if is_over:
                return []
            await self._wait()

    async def _wait(self) -> None:
        try:
            async with asyncio.timeout_at(self._deadline_s):
                await self._wake.wait()
        except TimeoutError:
            self.cancel()
            raise RequestTimeout("the request's deadline passed and the workers gave no sign") from None

    def cancel(self) -> None:
        """Stop everything that still runs; idempotent. `next_events` raises from then on what the handoff reports."""
        for running in self._running:
            running.cancel()
        self._running.clear()

    def fail(self, error: Exception) -> None:
        """End with this error unless something ended it before; from any thread."""
        with self._lock:
            self._error = self._error or error
        self._wake_up()

    def push(self, prompt: int, chunk: TokenChunk) -> None:
        """A new chunk; from any thread."""
        arrived_s = time.perf_counter()
        with self._lock:
            if self._error is not None:
                return
            if self._max_buffered is not None and len(self._events) >= self._max_buffered:
                self._error = SlowReader(f"the client left {self._max_buffered} chunks of its stream unread")
            else:
                self._events.append(Event(prompt, chunk, arrived_s))
            is_lost = self._error is not None
        self._wake_up(self.cancel if is_lost else None)

    def end(self, prompt: int, stats: RequestStats) -> None:
        """This prompt is complete; from any thread."""
        with self._lock:
            self.stats[prompt] = stats
            self._num_open -= 1
        self._wake_up()

    def _wake_up(self, then: object = None) -> None:
        with self._lock:
            if self._is_awake and then is None:
                return
            self._is_awake = True
        try:
            self._loop.call_soon_threadsafe(self._on_wake, then)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    def _on_wake(self, then: object) -> None:
        self._wake.set()
        if callable(then):
            then()


class _PromptSink:
    """Sink of one prompt."""

    __slots__ = ("_generation", "_prompt")

    def __init__(self, generation: Generation, prompt: int) -> None:
        self._generation = generation
        self._prompt = prompt

    def on_chunk(self, chunk: TokenChunk) -> None:
        if chunk.finish_reason in ("abort", "error"):
            self._generation.fail(
                ClusterError(f"a sample ended with {chunk.finish_reason!r} and no error was reported")
            )
        else:
            self._generation.push(self._prompt, chunk)

    def on_end(self, stats: RequestStats) -> None:
        self._generation.end(self._prompt, stats)

    def on_error(self, error: Exception) -> None:
        self._generation.fail(error)
