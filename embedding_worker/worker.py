"""EmbeddingWorker: the pipeline behind a service endpoint, one outgoing stream per request.

An `embed` call opens its stream at once, so that the receiver's grant travels while headers are read; totals are
announced before anything is decoded; rows follow in prompt order; the call ends when the receiver has acknowledged
all of them. A call with a ticket of a later epoch takes over another worker's stream: it begins when the receiver has
said what it has already, and leaves that out. Owns the life cycle; answers "embed" and "stats". Knows nothing of Ray,
HTTP and who its peers are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from embedding_worker.api import EmbedItem, EmbedRequest, EncodeSummary
from embedding_worker.config import EmbedConfig
from embedding_worker.errors import EmbedError, InvalidEmbedRequest, TooManyImages
from embedding_worker.pipeline import EmbedPipeline
from embedding_worker.runner import VisionRunner
from transfer.config import TransferConfig
from transfer.endpoints.contract import Endpoint
from transfer.errors import TransferError, error_code
from transfer.protocol.actions import StreamStats
from transfer.service.calls import IncomingCall
from transfer.service.service import Service
from transfer.streams.stream_sender import OutgoingStream, StreamSender
from transfer.tensors import PlaneSpec

logger = logging.getLogger(__name__)

STREAM_DEADLINE_SLACK_S = 5.0  # the request's own deadline comes first, and has the better error


class EmbeddingWorker:
    """Loads the vision half on construction (typed errors), serves between `start` and `close`."""

    def __init__(
        self, model_path: str | Path, config: EmbedConfig, transfer: TransferConfig, endpoint: Endpoint
    ) -> None:
        self._config = config
        self._endpoint = endpoint
        self._runner = VisionRunner.load(model_path, config)
        self._pipeline = EmbedPipeline(self._runner, config)
        dtype, shape = self._runner.dtype_name, (self._runner.embedding_dim,)
        self._planes = tuple(PlaneSpec(name=name, dtype=dtype, row_shape=shape) for name in self._runner.planes)
        self._service = Service(endpoint, transfer)
        self._sender = StreamSender(self._service, transfer)
        self._service.register("embed", self._on_embed)
        self._service.register("stats", lambda call: call.end(self.stats()))

    @property
    def address(self) -> str:
        """Where the worker's endpoint listens."""
        return self._endpoint.address

    @property
    def public_key(self) -> str | None:
        """The endpoint's CURVE public key, None where CURVE is off."""
        return self._endpoint.public_key

    @property
    def is_healthy(self) -> bool:
        """The encoding thread is alive."""
        return self._pipeline.is_alive

    def start(self) -> None:
        """Start the pipeline's and the I/O threads."""
        self._pipeline.start()
        self._service.start()

    def close(self) -> None:
        """Fail what is running, stop all threads; closing twice does nothing."""
        self._pipeline.close()
        self._service.close()

    def stats(self) -> dict[str, Any]:
        """Gauges and counters of the pipeline, the sender's ledger and the service."""
        return {**self._service.stats(), **self._sender.stats(), **self._pipeline.stats()}

    def _on_embed(self, call: IncomingCall) -> None:
        """On the I/O thread: check the form, open the stream, hand over to the pipeline."""
        try:
            request = self._checked(call)
            stream = self._sender.open(
                request.ticket,
                request.receiver_address,
                request.receiver_public_key,
                self._planes,
                self._runner.stream_key(request.media_key),
                deadline_s=request.deadline_ms / 1e3 + STREAM_DEADLINE_SLACK_S,
            )
        except (EmbedError, TransferError) as error:
            call.fail(error_code(error), str(error))
            return
        job = _EmbedCall(call, stream, self._runner.planes, time.monotonic() + request.deadline_ms / 1e3)
        if request.ticket.epoch == 1:
            self._submit(job)
        else:
            stream.on_accepted(lambda _: self._submit(job))

    def _submit(self, job: _EmbedCall) -> None:
        try:
            self._pipeline.submit(job)
        except EmbedError as error:
            job.on_failed(error)

    def _checked(self, call: IncomingCall) -> EmbedRequest:
        request = EmbedRequest.from_body(call.body)
        if request.num_items != len(call.frames):
            raise InvalidEmbedRequest(f"num_items is {request.num_items}, the call carries {len(call.frames)} media")
        if request.num_items > self._config.max_images_per_request:
            raise TooManyImages(request.num_items, self._config.max_images_per_request)
        return request


class _EmbedCall:
    """One `embed` call as the pipeline's job: rows go to the stream; the stream's end, or an error, ends the call."""

    def __init__(self, call: IncomingCall, stream: OutgoingStream, planes: Sequence[str], deadline: float) -> None:
        self.media: Sequence[memoryview] = call.frames
        self.deadline = deadline
        self._call = call
        self._stream = stream
        self._planes = planes
        self._summary: EncodeSummary | None = None
        self._sent: StreamStats | None = None
        self._lock = threading.Lock()
        self._over = threading.Event()
        call.on_cancel(self._on_cancel)
        stream.on_done(self._on_stream_done)

    @property
    def first_row(self) -> int:
        return self._stream.first_row or 0

    def is_alive(self) -> bool:
        return not self._over.is_set()

    def on_items(self, items: tuple[EmbedItem, ...]) -> None:
        self._stream.announce(sum(item.num_rows for item in items), [item.to_body() for item in items])

    def on_rows(self, first_row: int, rows: torch.Tensor) -> None:
        parts = (rows,) if rows.dim() == 2 else rows.unbind(1)
        self._stream.write(first_row, dict(zip(self._planes, parts, strict=True)))

    def on_encoded(self, summary: EncodeSummary) -> None:
        with self._lock:
            self._summary = summary
        self._maybe_end()

    def on_failed(self, error: EmbedError) -> None:
        if self._over.is_set():
            return
        self._over.set()
        self._call.fail(type(error).__name__, str(error))
        self._stream.abort(type(error).__name__, str(error))

    def _on_cancel(self) -> None:
        if not self._over.is_set():
            self._over.set()
            self._stream.abort("Cancelled", "the caller cancelled the embed call")

    def _on_stream_done(self, stream: OutgoingStream) -> None:
        if self._over.is_set():
            return
        try:
            sent = stream.result(0)
        except TransferError as error:
            logger.info("embedding stream %s failed: %s", stream.stream_id, error)
            self._over.set()
            self._call.fail(error_code(error), str(error))
            return
        with self._lock:
            self._sent = sent
        self._maybe_end()

    def _maybe_end(self) -> None:
        """End the call once both are in, whichever thread is later: the receiver's last word and our own figures."""
        with self._lock:
            summary, sent = self._summary, self._sent
            if summary is None or sent is None or self._over.is_set():
                return
            self._over.set()
        self._call.end(
            {
                "encode_ms": summary.encode_ms,
                "preprocess_ms": summary.preprocess_ms,
                "rows": summary.num_rows,
                "cache_hits": summary.num_cache_hits,
                "blocks": sent.blocks,
                "bytes": sent.num_bytes,
                "grant_rounds": sent.grant_rounds,
            }
        )
