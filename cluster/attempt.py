"""Attempt: one request on one pair of workers.

Calls "generate" and, for a request with media, "embed" at the same moment with the same ticket; gathers the outcome of
both. When one leg fails the other is cancelled; a leg that only reports that its stream broke waits for the other leg
to say why. When the embedding worker is lost, the language worker is asked for the next epoch's ticket ("reissue") and
another embedding worker goes on with it: the embed leg of the same attempt. Once the answer is complete, the embed
call's figures are waited for a moment, and what became of it does not matter. Everything here runs on the service's I/O
thread but `start` and `cancel`.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any, Protocol

from cluster.directory import WorkerAddress, WorkerDirectory
from cluster.errors import NoWorker
from cluster.served import RequestStats, ServedRequest
from language_worker.api import TokenChunk
from transfer.errors import RemoteFailure, TransferError, error_code
from transfer.protocol.ticket import Ticket
from transfer.service.outgoing_calls import OutgoingCall
from transfer.service.service import Service

logger = logging.getLogger(__name__)

STREAM_CODES = frozenset({"StreamAborted", "MediaFailed", "StreamTimeout", "TicketRejected"})
EMBED_LOST_CODES = frozenset({"PeerLost", "EmbedStopped", "StreamTimeout", "EndpointClosed"})
MAX_EMBED_TRIES = 3
LOST_CODES = frozenset({"PeerLost", "EngineStopped", "EndpointClosed", "StreamTimeout", "EmbedStopped"})
FIGURES_GRACE_S = 0.05  # for the embed call's end, when all tokens have come: it is on its way, or will never come
LEG_OF_CODE = {"EngineStopped": "generate", "EmbedStopped": "embed"}  # a broken stream tells them to the other leg too


class AttemptOwner(Protocol):
    """Hears how the attempt goes: chunks, then one end or one failure."""

    def on_chunk(self, chunk: TokenChunk) -> None: ...

    def on_end(self, stats: RequestStats) -> None: ...

    def on_failure(self, worker: str, failure: RemoteFailure) -> None: ...

    def next_embedding(self, lost: str) -> str | None:
        """Another worker for the media of `lost`; None when there is none."""


class Attempt:
    """Both legs of one try. name: unlike every other attempt's, since a worker may still be ending an earlier one."""

    def __init__(
        self,
        service: Service,
        directory: WorkerDirectory,
        request: ServedRequest,
        name: str,
        language: str,
        embedding: str | None,
        media_key: str,
        timeout_s: float,
        owner: AttemptOwner,
    ) -> None:
        self._service = service
        self._directory = directory
        self._request = request
        self._name = name
        self._owner = owner
        self._media_key = media_key
        self._timeout_ms = max(1, int(timeout_s * 1e3))
        self._deadline_s = time.monotonic() + timeout_s
        self._num_embed_tries = 1
        self._names = {"generate": language} | ({"embed": embedding} if embedding else {})
        self._lock = threading.Lock()  # guards the next two: start, cancel and ends meet on different threads
        self._calls: dict[str, OutgoingCall] = {}
        self._is_cancelled = False
        self._is_abandoned = False
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
        workers = {leg: self._directory.get(name) for leg, name in self._names.items()}
        language = workers["generate"]
        if language is None or None in workers.values():
            raise NoWorker("a worker was replaced a moment ago; try again")
        ticket = Ticket.issue(self._name).to_body() if self._request.media else None
        self._started_s = time.perf_counter()
        bodies = {
            "generate": self._generate_body(ticket),
            "embed": self._embed_body(ticket, language, self._timeout_ms),
        }
        try:
            for leg, worker in workers.items():
                assert worker is not None
                self._begin(leg, worker, bodies[leg])
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
            call = self._service.call(
                self._directory.connection(worker),
                leg,
                body,
                self._request.media if leg == "embed" else (),
                on_part=self._on_part if leg == "generate" else None,
                on_end=lambda body, failure: self._on_leg_end(leg, body, failure),
            )
        except BaseException:
            self._directory.add_running(worker.name, -1)
            raise
        self._keep(leg, call)

    def _keep(self, leg: str, call: OutgoingCall) -> None:
        with self._lock:
            self._calls[leg] = call
            is_cancelled = self._is_cancelled
        if is_cancelled:  # while the call was being made
            call.cancel()

    def _embed_body(self, ticket: dict[str, Any] | None, language: WorkerAddress, deadline_ms: int) -> dict[str, Any]:
        return {
            "ticket": ticket,
            "receiver": {"address": language.address, "public_key": language.public_key},
            "num_items": len(self._request.media),
            "deadline_ms": deadline_ms,
            "media_key": self._media_key,
        }

    def _generate_body(self, ticket: dict[str, Any] | None) -> dict[str, Any]:
        request = self._request
        return {
            "request_id": self._name,
            "prompt_token_ids": list(request.prompt_token_ids),
            "num_media": len(request.media),
            "sampling": request.sampling.to_body(),
            "ticket": ticket,
            "return_logits": request.return_logits,
            "deadline_ms": self._timeout_ms,
        }

    def _on_part(self, body: dict[str, Any], frames: list[memoryview]) -> None:
        if self._is_abandoned:
            return
        if "logits_shape" in body:
            self._logits.append((body, frames[0]))
            return
        if "prompt_logprobs_slice" in body:
            self._prompt_logprobs += body["prompt_logprobs_slice"]
            return
        if "prompt_logprobs" in body:
            body = {**body, "prompt_logprobs": self._prompt_logprobs + body["prompt_logprobs"]}
        if self._ttft_ms is None:
            self._ttft_ms = (time.perf_counter() - self._started_s) * 1e3
        self._num_prompt_tokens = body.get("num_prompt_tokens", self._num_prompt_tokens)
        self._owner.on_chunk(TokenChunk.from_body(self._request.request_id, body, self._num_prompt_tokens))

    def _on_leg_end(self, leg: str, body: dict[str, Any] | None, failure: RemoteFailure | None) -> None:
        self._directory.add_running(self._names[leg], -1)
        if failure is None:
            self._ends[leg] = body or {}
            if leg == "generate" and len(self._ends) + len(self._failures) < len(self._names):
                self._grace = threading.Timer(FIGURES_GRACE_S, self.cancel)
                self._grace.daemon = True
                self._grace.start()
        elif leg == "embed" and self._take_over(failure):
            return
        else:
            self._failures[leg] = failure
            # Rows that the language worker no longer wants: it answers, or answered, without them and says the rest.
            is_done_without = leg == "embed" and (self._ttft_ms is not None or failure.code == "Cancelled")
            if failure.code not in STREAM_CODES and not is_done_without:
                self.cancel()
        self._maybe_end()

    # -- another embedding worker -----------------------------------------------------------------------------------

    def _take_over(self, failure: RemoteFailure) -> bool:
        """Ask for the ticket of another embedding worker, if one can help; whether the embed leg goes on so."""
        if failure.code not in EMBED_LOST_CODES or self._ends or self._failures or self._ttft_ms is not None:
            return False  # it was not lost, or no more rows are needed
        if self._is_cancelled or self._num_embed_tries >= MAX_EMBED_TRIES or time.monotonic() >= self._deadline_s:
            return False
        language, name = self._directory.get(self._names["generate"]), self._owner.next_embedding(self._names["embed"])
        if language is None or name is None:
            return False
        self._num_embed_tries += 1
        try:
            call = self._service.call(
                self._directory.connection(language),
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
        """The language worker's answer: a ticket, or null when its stream is over or has all its rows."""
        ticket = None if body is None else body.get("ticket")
        language, embedding = self._directory.get(self._names["generate"]), self._directory.get(name)
        if ticket is not None and language is not None and embedding is not None and not self._is_cancelled:
            self._names["embed"] = name
            left_ms = max(1, int((self._deadline_s - time.monotonic()) * 1e3))
            try:
                self._begin("embed", embedding, self._embed_body(ticket, language, left_ms))
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
        """Tell the owner once both legs are over."""
        if self._is_abandoned or len(self._ends) + len(self._failures) < len(self._names):
            return
        if self._grace is not None:
            self._grace.cancel()
        if "generate" in self._ends:
            self._owner.on_end(self._stats())
        else:
            leg = min((name for name in self._names if name in self._failures), key=self._blame)
            culprit = LEG_OF_CODE.get(self._failures[leg].code, leg)
            self._owner.on_failure(self._names.get(culprit, self._names[leg]), self._failures[leg])

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
            "prefill_and_decode_ms": generated["total_ms"],
            "ttft_ms": self._ttft_ms,
            "num_preemptions": generated["num_preemptions"],
            "language_worker": self._names["generate"],
            "embedding_worker": self._names.get("embed"),
        }
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
