"""Handoff: one request's path through the workers, embed -> prefill -> decode, with another try when a worker dies.

A lost embedding worker is replaced within the attempt, and who takes its rows keeps what it has; any other lost worker
costs the attempt, and the request begins anew from the same seed. One that may be what crashes workers is not sent on
for ever (`suspects.py`).

Tickets are issued here and given to both ends at the same moment; embeddings and KV then flow from worker to worker and
never pass through this process. Tokens reach the client exactly once: of an answer that is computed anew, those that
were delivered are compared and dropped (`replay.py`). Every callback comes from the service's I/O thread. Knows nothing
of HTTP, Ray and models.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

import xxhash

from cluster.attempt import LINK_CODES, LOST_CODES, Attempt
from cluster.directory import WorkerAddress, WorkerDirectory
from cluster.errors import CrashingRequest, NoWorker, RequestTimeout, WorkerLost
from cluster.legs import Route
from cluster.replay import AnswerDiffers, Delivered
from cluster.router import can_risk, choose_embedding, choose_language, is_split
from cluster.served import RequestStats, RunningRequest, ServedRequest, Sink
from cluster.suspects import MAX_CRASHES, Suspects, Verdict
from language_worker.api import TokenChunk
from transfer.errors import EndpointClosed, RemoteFailure, TransferError
from transfer.service.service import Service

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
CRASH_CODES = frozenset({"PeerLost", "EngineFailed"})  # the process died, or the engine in it; not: it was told to stop


class Handoff:
    """Hands requests to the workers of one directory."""

    def __init__(
        self, service: Service, directory: WorkerDirectory, on_attempt: Callable[[str], None] = lambda reason: None
    ) -> None:
        """on_attempt: told of every attempt, from any thread: "first", or the code of the loss that it makes good."""
        self._service = service
        self._directory = directory
        self._on_attempt = on_attempt
        self._suspects: Suspects[_Run] = Suspects(directory.is_alive)
        directory.listen(self._release)

    def submit(self, request: ServedRequest, sink: Sink) -> RunningRequest:
        """Start a request. Raises NoWorker at once when no live worker can take it, RequestTimeout when it has no time
        left, TransferError when the chosen worker cannot be called (EndpointClosed: the service is closed).
        """
        run = self._new_run(request, sink)
        try:
            run.start()
        except BaseException:
            self._suspects.leave(run)
            raise
        return run

    def _new_run(self, request: ServedRequest, sink: Sink) -> _Run:
        return _Run(self._service, self._directory, self._suspects, self._release, self._on_attempt, request, sink)

    def _release(self) -> None:
        """Let go on what waits and may; later, since the others of a lost worker's requests end right after one."""
        if self._suspects.num_waiting:
            with suppress(EndpointClosed):
                self._service.post(self._resume)

    def _resume(self) -> None:
        views = self._directory.views()
        for run in self._suspects.release(lambda kinds: can_risk(views, kinds)):
            try:
                run.resume()
            except Exception:  # the others wait no more either
                logger.exception("a request that had waited could not go on")


class _Run:
    """One request over all its attempts."""

    def __init__(
        self,
        service: Service,
        directory: WorkerDirectory,
        suspects: Suspects[_Run],
        release: Callable[[], None],
        on_attempt: Callable[[str], None],
        request: ServedRequest,
        sink: Sink,
    ) -> None:
        self._service = service
        self._directory = directory
        self._suspects = suspects
        self._release = release
        self._on_attempt = on_attempt
        self._request = _seeded(request)
        self._sink = sink
        self._media_key = _digest(request.media) if request.media else ""
        self._deadline = time.monotonic() + request.timeout_s
        self._lock = threading.Lock()
        self._attempt: Attempt | None = None
        self._num_attempts = 0
        self._reason = "first"  # of the next attempt
        self._asked: dict[str, WorkerAddress | None] = {}  # what was known by the names of those that were chosen
        self._lost: dict[str, WorkerAddress | None] = {}
        self._started_s = time.monotonic()
        self._ttft_ms: float | None = None
        self._delivered = Delivered(request.sampling.n)
        self._differs = False
        self._cancelled = False
        self._timer: threading.Timer | None = None  # of the deadline, while it waits to be tried
        self._waits_after: tuple[str, RemoteFailure] | None = None  # which loss

    def start(self) -> None:
        """Choose workers and begin an attempt. Raises NoWorker, RequestTimeout or TransferError."""
        views, excluded = self._directory.views(), self._excluded()
        if is_split(views):
            language = choose_language(views, excluded, "decode")
            prefill = choose_language(views, excluded, "prefill")
        else:
            language, prefill = choose_language(views, excluded), None
        embedding = choose_embedding(views, self._media_key, excluded) if self._request.media else None
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise RequestTimeout("the request's deadline passed before a worker could take it")
        request, number = self._request, self._num_attempts + 1
        name = request.request_id if number == 1 else f"{request.request_id}.{number}"
        route = Route(language=language, prefill=prefill, embedding=embedding)
        self._asked |= {worker: self._directory.get(worker) for worker in route.legs.values()}
        attempt = Attempt(self._service, self._directory, request, name, route, self._media_key, left_s, self)
        self._delivered.begin_again()
        self._suspects.enter(self, self._addresses(route.legs.values()))
        with self._lock:
            self._num_attempts = number
            self._attempt = attempt
            is_cancelled = self._cancelled
        attempt.start()
        self._on_attempt(self._reason)
        if is_cancelled:
            attempt.cancel()

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            attempt = self._attempt
        if self._suspects.withdraw(self):
            self._post(self._end_cancelled)
        elif attempt is not None:
            attempt.cancel()

    # -- for the attempt, on the I/O thread -------------------------------------------------------------------------

    def on_taken(self, worker: WorkerAddress) -> None:
        self._suspects.took(self, worker)

    def on_chunk(self, chunk: TokenChunk) -> None:
        if self._differs:
            return
        try:
            fresh = self._delivered.add(chunk)
        except AnswerDiffers as error:
            logger.error("request %s: the worker that took over says another answer: %s", chunk.request_id, error)
            self._differs = True  # it ends as cancelled, and then fails
            if self._attempt is not None:
                self._attempt.cancel()
            return
        if fresh is not None:
            if self._ttft_ms is None:
                self._ttft_ms = (time.monotonic() - self._started_s) * 1e3
            self._sink.on_chunk(fresh)

    def on_end(self, stats: RequestStats) -> None:
        if self._differs:
            self._end(_differing())
            return
        if self._num_attempts > 1:
            hops = {**stats.hops, "attempts": self._num_attempts, "ttft_ms": self._ttft_ms}
            stats = replace(stats, hops=hops)
        self._end(stats)

    def next_embedding(self, lost: str, failure: RemoteFailure) -> str | None:
        self._lost[lost] = self._asked.get(lost)
        if self._judge(lost, failure) is not Verdict.ANEW:
            return None
        try:
            chosen = choose_embedding(self._directory.views(), self._media_key, self._excluded())
        except NoWorker:
            return None
        self._asked[chosen] = self._directory.get(chosen)
        self._suspects.enter(self, self._addresses([chosen]), goes_on=True)
        return chosen

    def on_failure(self, worker: str, failure: RemoteFailure) -> None:
        """The attempt is over; where a worker was lost, another one may take the request."""
        if self._differs:
            self._end(_differing())
            return
        if failure.code not in LOST_CODES:
            self._end(failure)
            return
        if self._cancelled:
            self._end_cancelled()
            return
        self._lost[worker] = self._asked.get(worker)
        self._reason = failure.code
        verdict = self._judge(worker, failure)
        if verdict is Verdict.GUILTY:
            logger.error("request %s is given up: workers crash of it, %s last", self._request.request_id, worker)
            self._end(CrashingRequest(f"workers crash of this request: {', '.join(self._lost)}; it gets no other one"))
        elif self._num_attempts >= MAX_ATTEMPTS:
            self._end(_lost(worker, failure, f"and {MAX_ATTEMPTS - 1} others before it"))
        elif verdict is Verdict.TRIAL:
            self._wait(worker, failure)
        else:
            logger.warning("request %s: worker %s was lost, trying another", self._request.request_id, worker)
            self._begin_anew(worker, failure)

    def _begin_anew(self, worker: str, failure: RemoteFailure) -> None:
        try:
            self._start_again(worker, failure)
        except NoWorker:
            when = "while it was answering" if self._delivered.is_begun else "before the first token"
            self._end(_lost(worker, failure, f"{when}, and no other could take over"))
        except (TransferError, RequestTimeout) as error:
            self._end(error)

    def _start_again(self, worker: str, failure: RemoteFailure) -> None:
        """At another worker; or, where there is no other but for media, at the one to which only the link broke."""
        try:
            self.start()
        except NoWorker:
            lost = next((view for view in self._directory.views() if view.name == worker), None)
            if lost is None or not lost.is_alive or lost.kind == "embedding" or failure.code not in LINK_CODES:
                raise
            if self._num_attempts >= MAX_ATTEMPTS:
                raise
            del self._lost[worker]
            self.start()

    def _end(self, outcome: RequestStats | Exception) -> None:
        """The last word to the sink."""
        self._suspects.leave(self)
        self._release()
        if isinstance(outcome, Exception):
            self._sink.on_error(outcome)
        else:
            self._sink.on_end(outcome)

    def _end_cancelled(self) -> None:
        self._stop_timer()
        self._end(RemoteFailure("Cancelled", "the caller cancelled the request"))

    # -- where it may be what crashes workers -----------------------------------------------------------------------

    def _addresses(self, names: Iterable[str]) -> list[WorkerAddress]:
        return [worker for name in names if (worker := self._asked[name]) is not None]

    def _judge(self, worker: str, failure: RemoteFailure) -> Verdict:
        address = self._asked.get(worker)
        if address is None or failure.code not in CRASH_CODES:
            return Verdict.ANEW
        is_sure = failure.code == "EngineFailed"
        if is_sure:  # its process answers until it is replaced, and would refuse what is handed to it
            self._directory.set_failed(address)
        return self._suspects.judge(self, address, is_sure=is_sure)

    def _wait(self, worker: str, failure: RemoteFailure) -> None:
        """Until the handoff lets it go on, or somebody cancels it, or its time is over: who withdraws it decides."""
        logger.warning("request %s ran at %d crashes, as others did: they wait", self._request.request_id, MAX_CRASHES)
        self._waits_after = (worker, failure)
        self._timer = threading.Timer(max(0.0, self._deadline - time.monotonic()), self._on_deadline)
        self._timer.daemon = True
        self._suspects.wait(self)
        self._timer.start()  # not before: the deadline may be over
        if self._cancelled and self._suspects.withdraw(self):
            self._end_cancelled()
        else:
            self._release()

    def _on_deadline(self) -> None:
        """On the timer's thread."""
        if self._suspects.withdraw(self):
            late = RequestTimeout("the request's deadline passed while it waited to be tried after two crashes")
            self._post(lambda: self._end(late))

    def _post(self, end: Callable[[], None]) -> None:
        try:
            self._service.post(end)
        except EndpointClosed:
            end()

    def resume(self) -> None:
        """It waits no more. Raises what nobody expected, once the request has ended with it."""
        self._stop_timer()
        assert self._waits_after is not None
        try:
            self._begin_anew(*self._waits_after)
        except Exception as error:
            self._end(error)
            raise

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _excluded(self) -> set[str]:
        """Names of the workers that were lost; not of those that came back since, as another process."""
        return {name for name, worker in self._lost.items() if self._directory.get(name) == worker}


def _lost(worker: str, failure: RemoteFailure, when: str) -> WorkerLost:
    return WorkerLost(f"worker {worker} was lost {when} ({failure.code})")


def _differing() -> WorkerLost:
    return WorkerLost(
        "a worker was lost while it was answering, and the one that took over would have answered otherwise"
    )


def _seeded(request: ServedRequest) -> ServedRequest:
    """With a seed: any worker then says the same answer. At temperature 0 it may still say which masks are filled."""
    if request.sampling.seed is not None:
        return request
    return replace(request, sampling=replace(request.sampling, seed=secrets.randbits(63)))


def _digest(media: Sequence[bytes]) -> str:
    """Of all media of a request: equal ones go to the same cache, and one worker may go on where another stopped."""
    digest = xxhash.xxh3_128()
    for item in media:
        digest.update(len(item).to_bytes(8, "little"))
        digest.update(item)
    return digest.hexdigest()
