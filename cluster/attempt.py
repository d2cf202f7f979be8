"""Attempt: one request on one set of workers.

Calls "generate", "prefill" where another worker computes the prompt, and "embed" for a request with media, all at the
same moment, each two with one ticket; gathers the outcome of all. When one leg fails the others are cancelled; a leg
that only reports that its stream broke waits for the others to say why. When the embedding worker is lost, who takes
its rows is asked for the next epoch's ticket ("reissue") and another embedding worker goes on with it: the embed leg of
the same attempt. Once the answer is complete, the figures of the other calls are waited for a moment, and what became
of them does not matter, unless they tell of the prompt. Everything here runs on the service's I/O thread but `start`
and `cancel`.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import Any, Protocol

from cluster.directory import WorkerAddress, WorkerDirectory
from cluster.errors import NoWorker
from cluster.legs import Bodies, Route
from cluster.served import RequestStats, ServedRequest
from language_worker.api import TokenChunk
from transfer.connection import Connection
from transfer.errors import EndpointClosed, RemoteFailure, TransferError, error_code
from transfer.service.outgoing_calls import OutgoingCall
from transfer.service.service import Service

logger = logging.getLogger(__name__)

STREAM_CODES = frozenset({"StreamAborted", "MediaFailed", "KVStreamFailed", "StreamTimeout", "TicketRejected"})
EMBED_LOST_CODES = frozenset({"PeerLost", "EmbedStopped", "StreamTimeout", "EndpointClosed"})
MAX_EMBED_TRIES = 3
LINK_CODES = frozenset({"PeerLost", "KVStreamFailed"})  # the link broke, perhaps nothing else
STOPPED_CODES = frozenset({"EngineStopped", "EngineFailed"})
LOST_CODES = LINK_CODES | STOPPED_CODES | {"EndpointClosed", "StreamTimeout", "EmbedStopped"}
FIGURES_GRACE_S = 0.05  # for the embed call's end, when all tokens have come: it is on its way, or will never come


class AttemptOwner(Protocol):
    """Hears how the attempt goes: chunks, then one end or one failure."""

    def on_taken(self, worker: WorkerAddress) -> None:
        """The worker was heard from after its call had left."""

    def on_chunk(self, chunk: TokenChunk) -> None: ...

    def on_end(self, stats: RequestStats) -> None: ...

    def on_failure(self, worker: str, failure: RemoteFailure) -> None: ...

    def next_embedding(self, lost: str, failure: RemoteFailure) -> str | None:
        """Another worker for the media of `lost`; None when there is none, or the attempt shall end."""


class Attempt:
    """All legs of one try. name: unlike every other attempt's, since a worker may still be ending an earlier one."""

    def __init__(
        self,
        service: Service,
        directory: WorkerDirectory,
        request: ServedRequest,
        name: str,
        route: Route,
        media_key: str,
        timeout_s: float,
        owner: AttemptOwner,
    ) -> None:
        self._service = service
        self._directory = directory
        self._request = request
        self._name = name
        self._owner = owner
        self._bodies = Bodies(request, name, media_key, max(1, int(timeout_s * 1e3)))
        self._deadline_s = time.monotonic() + timeout_s
        self._num_embed_tries = 1
        self._route = route
        self._names = route.legs
        wants_prompt = request.return_logits or request.sampling.prompt_logprobs is not None
        self._needs_prefill = route.prefill is not None and wants_prompt  # to its end: it tells about the prompt
        self._owes_prompt_logprobs = self._needs_prefill and request.sampling.prompt_logprobs is not None
        self._held: list[dict[str, Any]] = []  # parts that wait for what is to come with them
        self._lock = threading.Lock()  # guards the next two: start, cancel and ends meet on different threads
        self._calls: dict[str, OutgoingCall] = {}
        self._is_cancelled = False
        self._is_abandoned = False
        self._is_over = False
        self._ends: dict[str, dict[str, Any]] = {}
        self._failures: dict[str, RemoteFailure] = {}
        self._num_prompt_tokens = 0
        self._grace: threading.Timer | None = None
        self._started_s = 0.0
        self._ttft_ms: float | None = None
        self._logits: list[Any] = []
        self._prompt_logprobs: list[Any] = []  # slices that came before the chunk they belong to

    def start(self) -> None:
        """Make the calls. Raises NoWorker when a worker has just gone, or TransferError when one cannot be called; the
        owner then hears nothing of this attempt.
        """
        known = {leg: self._directory.get(name) for leg, name in self._names.items()}
        workers = {leg: worker for leg, worker in known.items() if worker is not None}
        if len(workers) < len(known):
            raise NoWorker("a worker was replaced a moment ago; try again")
        self._started_s = time.perf_counter()
        try:
            for leg, worker in workers.items():
                self._begin(leg, worker, self._bodies.of(leg, self._route, workers))
        except BaseException:
            self._is_abandoned = True
            self.cancel()
            raise

    def cancel(self) -> None:
        """Cancel what still runs; each leg then ends with Cancelled."""
        with self._lock:
            self._is_cancelled = True
            calls = list(self._calls.values())
        for call in calls:
            call.cancel()

    def _begin(self, leg: str, worker: WorkerAddress, body: dict[str, Any]) -> None:
        self._directory.add_running(worker.name, 1)
        try:
            connection = self._directory.connection(worker)
            call = self._service.call(
                connection,
                leg,
                body,
                self._request.media if leg == "embed" else (),
                on_part=self._on_part if leg != "embed" else None,
                on_end=lambda body, failure: self._hear_end(leg, body, failure),
            )
        except BaseException:
            self._directory.add_running(worker.name, -1)
            raise
        self._keep(leg, call)
        self._ask_whether_taken(worker, connection)

    def _ask_whether_taken(self, worker: WorkerAddress, connection: Connection) -> None:
        """With a ping behind the call: what was dead before the call came does not answer."""

        def on_end(body: dict[str, Any] | None, failure: RemoteFailure | None) -> None:
            if failure is None:
                self._owner.on_taken(worker)

        with suppress(EndpointClosed):  # then the call itself says so
            self._service.call(connection, "ping", {}, on_end=on_end)

    def _keep(self, leg: str, call: OutgoingCall) -> None:
        with self._lock:
            self._calls[leg] = call
            is_cancelled = self._is_cancelled
        if is_cancelled:  # while the call was being made
            call.cancel()

    def _on_part(self, body: dict[str, Any], frames: list[memoryview]) -> None:
        if self._is_abandoned:
            return
        if "logits_shape" in body:
            self._logits.append((body, frames[0]))
            return
        if "prompt_logprobs_slice" in body:
            self._prompt_logprobs += body["prompt_logprobs_slice"]
            return
        if self._owes_prompt_logprobs and "prefill" not in self._ends:
            self._held.append(body)
            return
        self._deliver(body)

    def _deliver(self, body: dict[str, Any]) -> None:
        """Hand out a part of the answer; the first of sample 0 with the prompt's log-probabilities, if they are due."""
        if self._owes_prompt_logprobs and body["index"] == 0:
            self._owes_prompt_logprobs = False
            body = {**body, "prompt_logprobs": []}
        if "prompt_logprobs" in body:
            body = {**body, "prompt_logprobs": self._prompt_logprobs + body["prompt_logprobs"]}
        if self._ttft_ms is None:
            self._ttft_ms = (time.perf_counter() - self._started_s) * 1e3
        self._num_prompt_tokens = body.get("num_prompt_tokens", self._num_prompt_tokens)
        self._owner.on_chunk(TokenChunk.from_body(self._request.request_id, body, self._num_prompt_tokens))

    def _hear_end(self, leg: str, body: dict[str, Any] | None, failure: RemoteFailure | None) -> None:
        """A lost peer's calls end one after another, the monitor's ping among them: once all have, it is known whether
        the worker is taken for dead, or only the link to it broke.
        """
        if failure is not None and failure.code == "PeerLost":
            with suppress(EndpointClosed):
                self._service.post(lambda: self._on_leg_end(leg, body, failure))
                return
        self._on_leg_end(leg, body, failure)

    def _on_leg_end(self, leg: str, body: dict[str, Any] | None, failure: RemoteFailure | None) -> None:
        self._directory.add_running(self._names[leg], -1)
        if failure is None:
            self._ends[leg] = body or {}
            if leg == "prefill":
                held, self._held = self._held, []
                for part in held:
                    self._deliver(part)
            self._maybe_wait()
        elif leg == "embed" and self._take_over(failure):
            return
        else:
            self._failures[leg] = failure
            # Rows that the language worker no longer wants: it answers, or answered, without them and says the rest.
            is_answering = self._ttft_ms is not None and not self._needs_prefill
            is_done_without = leg != "generate" and (is_answering or (leg == "embed" and failure.code == "Cancelled"))
            if failure.code not in STREAM_CODES and not is_done_without:
                self.cancel()
        self._maybe_end()

    def _maybe_wait(self) -> None:
        """The answer is complete: wait a moment for the figures of the others, or for what has to come from them."""
        num_over = len(self._ends) + len(self._failures)
        if "generate" not in self._ends or num_over == len(self._names) or self._grace is not None:
            return
        if not self._needs_prefill or "prefill" in self._ends:
            self._grace = threading.Timer(FIGURES_GRACE_S, self.cancel)
            self._grace.daemon = True
            self._grace.start()

    # -- another embedding worker -----------------------------------------------------------------------------------

    def _take_over(self, failure: RemoteFailure) -> bool:
        """Ask for the ticket of another embedding worker, if one can help; whether the embed leg goes on so."""
        if failure.code not in EMBED_LOST_CODES or self._ends or self._failures or self._ttft_ms is not None:
            return False  # it was not lost, or no more rows are needed
        if self._is_cancelled or self._num_embed_tries >= MAX_EMBED_TRIES or time.monotonic() >= self._deadline_s:
            return False
        taker = self._directory.get(self._names[self._route.rows_leg])
        name = self._owner.next_embedding(self._names["embed"], failure)
        if taker is None or name is None:
            return False
        self._num_embed_tries += 1
        try:
            call = self._service.call(
                self._directory.connection(taker),
                "reissue",
                {"request_id": self._name},
                on_end=lambda body, problem: self._on_ticket(name, failure, body, problem),
            )
        except TransferError:
            return False
        self._keep("embed", call)
        return True

    def _on_ticket(
        self, name: str, failure: RemoteFailure, body: dict[str, Any] | None, problem: RemoteFailure | None
    ) -> None:
        """The answer of who takes the rows: a ticket, or null when its stream is over or has all its rows."""
        ticket = None if body is None else body.get("ticket")
        taker, embedding = self._directory.get(self._names[self._route.rows_leg]), self._directory.get(name)
        if ticket is not None and taker is not None and embedding is not None and not self._is_cancelled:
            self._names["embed"] = name
            left_ms = max(1, int((self._deadline_s - time.monotonic()) * 1e3))
            try:
                self._begin("embed", embedding, self._bodies.embed(ticket, taker, left_ms))
            except TransferError as error:
                problem = RemoteFailure(error_code(error), str(error))
            else:
                logger.warning("request %s: %s takes over its media (%s)", self._name, name, failure)
                return
        self._failures["embed"] = failure
        if problem is not None or ticket is not None:
            self.cancel()
        self._maybe_end()

    # -- the end ----------------------------------------------------------------------------------------------------

    def _maybe_end(self) -> None:
        """Tell the owner once all legs are over; a leg may end another at once, while it still says why it ends."""
        if self._is_abandoned or self._is_over or len(self._ends) + len(self._failures) < len(self._names):
            return
        self._is_over = True
        if self._grace is not None:
            self._grace.cancel()
        if "generate" in self._ends and not (self._needs_prefill and "prefill" in self._failures):
            self._owner.on_end(self._stats())
        else:
            leg = min((name for name in self._names if name in self._failures), key=self._blame)
            failure = self._failures[leg]
            self._owner.on_failure(self._names.get(self._culprit(leg, failure.code), self._names[leg]), failure)

    def _culprit(self, leg: str, code: str) -> str:
        """Whose worker stopped: a broken stream of embeddings tells that to the leg at its other end, too."""
        if code == "EmbedStopped":
            return "embed"
        return self._route.rows_leg if code in STOPPED_CODES and leg == "embed" else leg

    def _blame(self, leg: str) -> int:
        """Order of the failures by how much they say about the cause."""
        code = self._failures[leg].code
        if code == "Cancelled":
            return 3
        if code in STREAM_CODES:
            return 1 if code in LOST_CODES else 2
        return 0

    def _stats(self) -> RequestStats:
        generated, embedded = self._ends["generate"], self._ends.get("embed", {})
        hops = {
            **embedded,
            **self._ends.get("prefill", {}),
            "prefill_and_decode_ms": generated["total_ms"],
            "ttft_ms": self._ttft_ms,
            "num_preemptions": generated["num_preemptions"],
            "language_worker": self._names["generate"],
            "embedding_worker": self._names.get("embed"),
        }
        if self._route.prefill is not None:
            hops["prefill_worker"] = self._route.prefill
        if generated.get("num_forwards"):
            hops["forwards"] = generated["num_forwards"]
            hops["forwarded_tokens"] = generated["num_forwarded_tokens"]
            hops["tokens_per_forward"] = generated["num_generated_tokens"] / generated["num_forwards"]
        if self._num_embed_tries > 1:
            hops["embed_takeovers"] = self._num_embed_tries - 1
        if self._logits:
            hops["logits"] = self._logits
        return RequestStats(
            num_prompt_tokens=generated["num_prompt_tokens"],
            num_generated_tokens=generated["num_generated_tokens"],
            hops=hops,
        )
