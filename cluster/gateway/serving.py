"""One generation request, from its body to its last byte, whatever its endpoint.

Owns the order of things: admit, read, prepare in a thread, fetch media, start, answer; the client's disconnect cancels
at every point; whatever was taken is given back exactly once. What a request means and how an answer looks is the
`Job`'s, made by the chat and completion routes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.errors import ClientGone, ClusterError, rule_for
from cluster.gateway.body import Loan, parse_json, read_body
from cluster.gateway.events import DONE, EventStream, error_event
from cluster.gateway.generation import MAX_BUFFERED_CHUNKS, Event, Generation
from cluster.gateway.state import GatewayState
from cluster.metrics import GatewayMetrics
from cluster.served import RequestStats, ServedRequest


class Answer(Protocol):
    """How an endpoint shows chunks; one object per request, streamed or not."""

    def write(self, events: list[Event]) -> str:
        """The stream's events for these chunks."""

    def write_usage(self, stats: dict[int, RequestStats]) -> str:
        """The stream's event after the last choice, if the client asked for it."""

    def add(self, events: list[Event]) -> None:
        """Remember the chunks for `body`."""

    def body(self, stats: dict[int, RequestStats]) -> dict[str, Any]:
        """The whole answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a route made of a request. remote_media: URLs of those media of the first request that are still to be
    read, by their numbers."""

    requests: tuple[ServedRequest, ...]
    stream: bool
    answer: Answer
    remote_media: Mapping[int, str] = field(default_factory=dict)


async def serve(state: GatewayState, request: Request, prepare: Callable[[dict[str, Any]], Job]) -> Response:
    """Answer a generation request; `prepare` runs in a thread and raises what is wrong with the request."""
    started_s = time.perf_counter()
    with ExitStack() as stack:
        job = await _prepared(state, request, prepare, stack)
        tracker = Tracker(state.metrics, job.requests, started_s)
        stack.callback(tracker.close)
        max_buffered = MAX_BUFFERED_CHUNKS if job.stream else None
        generation = stack.enter_context(state.generation(max_buffered=max_buffered))
        watcher = asyncio.create_task(_watch(request, generation))
        stack.callback(watcher.cancel)
        generation.start(state.context.handoff, job.requests)
        if not job.stream:
            while events := await generation.next_events():
                tracker.observe(events)
                job.answer.add(events)
            tracker.complete(generation.stats)
            return JSONResponse(job.answer.body(generation.stats))
        first = await generation.next_events()
        return EventStream(_stream(job.answer, generation, tracker, first), stack.pop_all().close)


async def _prepared(
    state: GatewayState, request: Request, prepare: Callable[[dict[str, Any]], Job], stack: ExitStack
) -> Job:
    config = state.context.config
    stack.enter_context(state.admitted())
    body = await read_body(request, max_bytes=config.max_body_bytes, budget=state.budget)
    stack.callback(state.budget.give, len(body))
    loop = asyncio.get_running_loop()
    job = await loop.run_in_executor(state.threads, lambda: prepare(parse_json(body)))
    return await _with_media(state, request, job, stack) if job.remote_media else job


async def _with_media(state: GatewayState, request: Request, job: Job, stack: ExitStack) -> Job:
    """The job with all its media. A client that leaves meanwhile ends the reading."""
    loan = Loan(state.budget)
    stack.callback(loan.close)
    fetching = asyncio.create_task(state.fetcher.fetch_all(job.remote_media, loan))
    leaving = asyncio.create_task(_until_gone(request))
    try:
        await asyncio.wait((fetching, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not fetching.done():
            raise ClientGone("the client closed the connection")
        fetched = fetching.result()
    finally:
        leaving.cancel()
        fetching.cancel()
        await asyncio.gather(fetching, leaving, return_exceptions=True)
    first, *others = job.requests
    media = tuple(fetched.get(index, item) for index, item in enumerate(first.media))
    return replace(job, requests=(replace(first, media=media), *others), remote_media={})


async def _until_gone(request: Request) -> None:
    """Return when the client went; after the body that is the only message to come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _watch(request: Request, generation: Generation) -> None:
    await _until_gone(request)
    generation.fail(ClientGone("the client closed the connection"))
    generation.cancel()


async def _stream(
    answer: Answer, generation: Generation, tracker: Tracker, events: list[Event]
) -> AsyncIterator[bytes]:
    try:
        while events:
            tracker.observe(events)
            if text := answer.write(events):
                yield text.encode()
            events = await generation.next_events()
        tracker.complete(generation.stats)
        yield answer.write_usage(generation.stats).encode() + DONE
    except Exception as error:  # it must reach the client as an event, whatever it is
        tracker.fail(error)
        yield error_event(error)


class Tracker:
    """One request's contribution to the metrics."""

    def __init__(self, metrics: GatewayMetrics, requests: tuple[ServedRequest, ...], started_s: float) -> None:
        self._metrics = metrics
        self._started_s = started_s
        self._last_s: dict[tuple[int, int], float] = {}
        self._unfinished = {(i, k) for i, request in enumerate(requests) for k in range(request.sampling.n)}
        self._seen_prompts: set[int] = set()

    def observe(self, events: list[Event]) -> None:
        """Chunks on their way to the client."""
        num_tokens = 0
        for event in events:
            chunk, key = event.chunk, (event.prompt, event.chunk.index)
            if chunk.token_ids:
                num_tokens += len(chunk.token_ids)
                self._observe_times(key, event.arrived_s, len(chunk.token_ids))
            if chunk.finish_reason is not None and key in self._unfinished:
                self._unfinished.remove(key)
                self._metrics.count_finish(chunk.finish_reason)
        self._metrics.generation_tokens.inc(num_tokens)

    def _observe_times(self, key: tuple[int, int], arrived_s: float, num_tokens: int) -> None:
        if key[0] not in self._seen_prompts:
            self._seen_prompts.add(key[0])
            self._metrics.time_to_first_token.observe(arrived_s - self._started_s)
        last_s = self._last_s.get(key)
        if last_s is not None:
            self._metrics.inter_token_latency.observe(max(0.0, arrived_s - last_s) / num_tokens)
        self._last_s[key] = arrived_s

    def complete(self, stats: dict[int, RequestStats]) -> None:
        """All prompts have ended; raises ClusterError if a sample's end never came."""
        if self._unfinished:
            raise ClusterError(f"the generation ended although {len(self._unfinished)} samples had not finished")
        self._metrics.prompt_tokens.inc(sum(s.num_prompt_tokens for s in stats.values()))
        self._metrics.request_latency.observe(time.perf_counter() - self._started_s)

    def fail(self, error: Exception) -> None:
        """The stream broke after it had begun (before that, the error is counted where it is answered)."""
        self._metrics.count_error(rule_for(error).code)

    def close(self) -> None:
        """The request is over; samples that did not finish count as aborted."""
        for _ in self._unfinished:
            self._metrics.count_finish("abort")
        self._unfinished.clear()
