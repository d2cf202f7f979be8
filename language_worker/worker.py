"""LanguageWorker: an engine on its own thread behind a service endpoint, in one of three roles.

    language   takes embeddings, computes prompts and goes on to tokens        "generate", "reissue"
    prefill    takes embeddings, computes prompts, sends their KV              "prefill", "reissue"
    decode     takes KV, goes on to tokens                                     "generate"

Threads: the endpoint's I/O thread takes calls and rows, the engine thread steps and answers. Owns the life cycle;
answers "stats", too ("reissue": a ticket for another sender of a request's media, null when none is needed). Knows
nothing of Ray, HTTP and who its peers are.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from language_worker.api import GenerateRequest
from language_worker.config import EngineConfig
from language_worker.delivery import Delivery
from language_worker.engine_builder import build_engine
from language_worker.errors import EngineError, EngineStopped, InvalidRequest
from language_worker.handover.exports import KVExport
from language_worker.handover.prefill import PrefillSide
from language_worker.media_stream import embedding_streams, kv_streams
from transfer.config import TransferConfig
from transfer.endpoints.contract import Endpoint
from transfer.errors import TransferError, error_code
from transfer.protocol.ticket import Ticket
from transfer.service.calls import IncomingCall
from transfer.service.service import Service

logger = logging.getLogger(__name__)

Role = Literal["language", "prefill", "decode"]


class LanguageWorker:
    """Loads the model on construction (typed errors), serves between `start` and `close`."""

    def __init__(
        self,
        model_path: str | Path,
        config: EngineConfig,
        transfer: TransferConfig,
        endpoint: Endpoint,
        role: Role = "language",
    ) -> None:
        self._role: Role = role
        self._endpoint = endpoint
        self._engine = build_engine(model_path, config, input_buffer_tokens=transfer.input_buffer_tokens)
        self._service = Service(endpoint, transfer)
        self._streams = (kv_streams if role == "decode" else embedding_streams)(self._service, self._engine, transfer)
        self._prefills = PrefillSide(self._service, self._engine, transfer) if role == "prefill" else None
        self._delivery = Delivery(self._service, self._streams, max_frame_bytes=transfer.max_message_bytes // 2)
        self._service.register("prefill" if role == "prefill" else "generate", self._on_request)
        if role != "decode":
            self._service.register("reissue", self._on_reissue)
        self._service.register("stats", lambda call: call.end(self.stats()))
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="language-engine", daemon=True)
        self._is_over = False  # the engine thread's work
        self._ending = threading.Lock()
        self._failure: str | None = None

    @property
    def address(self) -> str:
        """Where the worker's endpoint listens."""
        return self._endpoint.address

    @property
    def public_key(self) -> str | None:
        return self._endpoint.public_key

    @property
    def max_model_len(self) -> int:
        """Prompt and generated tokens of one sequence at most."""
        return self._engine.limits.max_model_len

    @property
    def is_healthy(self) -> bool:
        """The engine thread is alive and has not failed."""
        return self._failure is None and self._thread.is_alive()

    def start(self) -> None:
        """Start the engine and I/O threads."""
        self._thread.start()
        self._service.start()

    def close(self) -> None:
        """Fail what is running with EngineStopped, stop both threads; closing twice does nothing."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._engine.wake()
        if self._thread.is_alive():
            self._thread.join()
        self._service.close()

    def stats(self) -> dict[str, Any]:
        """Gauges and counters of the engine, the stream ledger and the service."""
        figures = Counter(self._streams.stats())
        if self._prefills is not None:
            figures.update(self._prefills.stats())  # both ends count what they dropped
        return {**self._service.stats(), **figures, **self._engine.stats()}

    def _on_request(self, call: IncomingCall) -> None:
        """On the I/O thread: check the form, open the streams, hand over to the engine."""
        export: KVExport | None = None
        imports_kv = self._role == "decode"
        try:
            request = GenerateRequest.from_body(call.body)
            ticket = _kv_ticket(call.body, request) if imports_kv else _ticket(call.body, request)
            if request.request_id in self._delivery:
                raise InvalidRequest(f"request_id {request.request_id!r} is already running on this worker")
            if self._stopping.is_set() or self._failure is not None:
                raise EngineStopped(self._failure or "the worker is closing")
            if self._prefills is not None:
                export = self._prefills.open(request.request_id, call.body, request.deadline_ms)
            if ticket is not None:
                self._streams.open(request.request_id, ticket)
        except (EngineError, TransferError) as error:
            code, message = (error.code if isinstance(error, EngineError) else error_code(error)), str(error)
            call.fail(code, message)
            if export is not None:
                export.abort(code, message)
            return
        self._delivery.add(request.request_id, call, export, tokens_per_part=request.tokens_per_part)
        self._engine.submit(request, export=export, imports_kv=imports_kv)
        if self._is_over:  # the engine ended since it was asked above: nobody else takes what was submitted
            self._end()
        if self._prefills is not None and export is not None:
            self._prefills.watch(export)
        call.on_cancel(lambda: self._engine.cancel(request.request_id))

    def _on_reissue(self, call: IncomingCall) -> None:
        request_id = call.body.get("request_id")
        if set(call.body) != {"request_id"} or not isinstance(request_id, str):
            call.fail(InvalidRequest.__name__, "reissue needs request_id, a string, and nothing else")
            return
        try:
            self._streams.reissue(
                request_id, lambda ticket: call.end({"ticket": None if ticket is None else ticket.to_body()})
            )
        except TransferError as error:
            call.fail(error_code(error), str(error))

    def _run(self) -> None:
        """The engine thread."""
        try:
            self._engine.runner.warm_up()
            while not self._stopping.is_set():
                report = self._engine.step()
                self._delivery.deliver(report.outputs)
                if not report.did_run and not self._stopping.is_set():
                    self._engine.wait()
        except Exception as error:
            self._failure = f"the engine failed: {type(error).__name__}: {error}"
            logger.exception("the engine thread failed; everything on this worker fails with it")
        self._end()
        self._is_over = True
        self._end()  # what was submitted meanwhile

    def _end(self) -> None:
        """Fail everything that the engine has, and say so."""
        with self._ending:
            self._delivery.deliver(self._engine.close(self._failure))


def _ticket(body: Mapping[str, Any], request: GenerateRequest) -> Ticket | None:
    """The ticket of a request with media; InvalidRequest when it is missing, malformed, or there are no media."""
    value = body.get("ticket")
    if (value is not None) != (request.num_media > 0):
        raise InvalidRequest(f"num_media is {request.num_media} and a ticket is {'' if value else 'not '}given")
    return None if value is None else Ticket.from_body(value)


def _kv_ticket(body: Mapping[str, Any], request: GenerateRequest) -> Ticket:
    """The ticket of the stream that brings the prompt's KV; its logits are known to who computed that."""
    if request.return_logits or request.sampling.prompt_logprobs is not None:
        raise InvalidRequest("this worker has no logits of prompts; ask the one that prefills")
    return Ticket.from_body(body.get("kv_ticket"))
