"""Requests that arrive one after another, and two ways to answer them: each from the moment it comes, or in batches.

A trace holds when each request arrives and how many tokens it wants; both engines answer the same traces. Times are
counted from a request's own arrival, so waiting for a batch to end is part of them.
"""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from benchmarks.serving_models import BenchModel, BenchRequest
from benchmarks.serving_peers import Transformers, prompt_of
from cluster.config import build_config, flat_overrides
from cluster.local import LocalWorkers
from cluster.prompts import request_from_prompt
from cluster.served import RequestStats
from language_worker.api import TokenChunk
from language_worker.sampling_params import SamplingParams

WAIT_S = 600.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """A request that comes `at_s` seconds after the beginning and wants `new_tokens` tokens."""

    at_s: float
    request: BenchRequest
    new_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Seconds from a request's arrival to its first and to its last token."""

    first_s: float
    last_s: float
    token_ids: tuple[int, ...]


class Server(Protocol):
    """One engine with a model loaded."""

    def serve(self, arrivals: Sequence[Arrival]) -> list[Answer]:
        """Answer a trace in real time, in the order of its arrivals."""

    def close(self) -> None:
        """Free the model."""


def poisson_arrivals(
    requests: Sequence[BenchRequest], requests_per_s: float, new_tokens: tuple[int, int], seed: int
) -> list[Arrival]:
    """The requests in order, the first at 0, with exponential times between them (0 requests_per_s: all at 0) and
    uniform lengths; the lengths do not depend on the rate."""
    rng = random.Random(seed)
    lengths = [rng.randint(*new_tokens) for _ in requests]
    arrivals, at_s = [], 0.0
    for request, length in zip(requests, lengths, strict=True):
        arrivals.append(Arrival(at_s=at_s, request=request, new_tokens=length))
        at_s += rng.expovariate(requests_per_s) if requests_per_s else 0.0
    return arrivals


class Continuous:
    """Tandem, both halves in this process: every request is submitted when it arrives. No cache helps anybody."""

    def __init__(self, model: BenchModel, dtype: str, threads: int, max_at_once: int) -> None:
        settings = {
            "dtype": dtype,
            "embedding": {"cache_tokens": 0, "num_threads": threads},
            "language": {"num_threads": threads, "max_num_seqs": max_at_once, "prefix_cache": False},
        }
        tree = flat_overrides({"model": {"path": str(model.folder)}}, settings)
        self._workers = LocalWorkers(build_config(tree).resolve())

    def serve(self, arrivals: Sequence[Arrival]) -> list[Answer]:
        started = time.perf_counter()
        sinks = []
        for arrival in arrivals:
            _sleep_until(started + arrival.at_s)
            sampling = SamplingParams(max_tokens=arrival.new_tokens, temperature=0.0, ignore_eos=True)
            request = request_from_prompt(self._workers.info, prompt_of(arrival.request), sampling)
            sinks.append(_Sink(started + arrival.at_s))
            self._workers.handoff.submit(request, sinks[-1])
        return [sink.answer() for sink in sinks]

    def close(self) -> None:
        self._workers.close()


class StaticBatches:
    """transformers' `generate`: all that wait become one left-padded batch, which runs until its longest answer ends.

    A request has its tokens as they are made; those that come after the last one it wants are thrown away.
    """

    def __init__(self, model: BenchModel, dtype: str, threads: int, max_at_once: int) -> None:
        self._peer = Transformers(model, dtype, threads)
        self._max_at_once = max_at_once

    def serve(self, arrivals: Sequence[Arrival]) -> list[Answer]:
        started = time.perf_counter()
        waiting = deque(arrivals)
        answers: list[Answer] = []
        while waiting:
            _sleep_until(started + waiting[0].at_s)
            began_s = time.perf_counter() - started
            batch: list[Arrival] = []
            while waiting and waiting[0].at_s <= began_s and len(batch) < self._max_at_once:
                batch.append(waiting.popleft())
            made = self._peer.generate([a.request for a in batch], max(a.new_tokens for a in batch))
            answers += [
                Answer(
                    first_s=began_s + made.arrivals_s[0] - arrival.at_s,
                    last_s=began_s + made.arrivals_s[arrival.new_tokens - 1] - arrival.at_s,
                    token_ids=ids[: arrival.new_tokens],
                )
                for arrival, ids in zip(batch, made.token_ids, strict=True)
            ]
        return answers

    def close(self) -> None:
        self._peer.close()


class _Sink:
    """Notes when the tokens of one request come; `arrived` on the clock of `time.perf_counter`."""

    def __init__(self, arrived: float) -> None:
        self._arrived = arrived
        self._first_s = 0.0
        self._last_s = 0.0
        self._ids: list[int] = []
        self._error: Exception | None = None
        self._ended = threading.Event()

    def on_chunk(self, chunk: TokenChunk) -> None:
        self._last_s = time.perf_counter() - self._arrived
        self._first_s = self._first_s or self._last_s
        self._ids.extend(chunk.token_ids)

    def on_end(self, stats: RequestStats) -> None:
        self._ended.set()

    def on_error(self, error: Exception) -> None:
        self._error = error
        self._ended.set()

    def answer(self) -> Answer:
        """Wait for the end. Raises what ended it otherwise."""
        if not self._ended.wait(WAIT_S):
            raise TimeoutError(f"a request has no answer after {WAIT_S:g} s")
        if self._error is not None:
            raise self._error
        return Answer(first_s=self._first_s, last_s=self._last_s, token_ids=tuple(self._ids))


def _sleep_until(moment: float) -> None:
    """Until `time.perf_counter` says `moment`; at once where that is past."""
    left = moment - time.perf_counter()
    if left > 0:
        time.sleep(left)
