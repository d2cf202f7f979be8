"""InputStreams: what a worker's requests wait for, between the receiver's I/O thread and the engine: embeddings, or KV
that another engine computed.

Announcements and failures become engine commands; rows are copied straight into the request's input buffer. Owns which
stream belongs to which request. A stream whose sender is lost waits for another sender for a while (`reissue`), which
goes on where the rows end, or starts over; a stream of KV does not, so far: its request fails. Knows nothing of calls
and sampling.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from language_worker.engine import Engine
from language_worker.errors import EngineError, KVStreamFailed, MediaFailed
from language_worker.handover.rows import kv_transfer
from transfer.config import TransferConfig
from transfer.errors import EndpointClosed, TransferError, error_code
from transfer.memory.buffers import dtype_name
from transfer.protocol.ticket import Ticket
from transfer.service.service import Service
from transfer.streams.stream_receiver import StreamReceiver
from transfer.tensors import PlaneSpec

logger = logging.getLogger(__name__)


def embedding_streams(service: Service, engine: Engine, config: TransferConfig) -> InputStreams:
    """Streams from embedding workers, which may take over from each other."""
    dtype, shape = dtype_name(engine.dtype), (engine.spec.hidden_size,)
    planes = tuple(PlaneSpec(name=name, dtype=dtype, row_shape=shape) for name in engine.spec.media_planes)
    # As long as whoever has to find another sender may take to see that one is needed, and some more to find it.
    take_over_s = 2 * config.peer_timeout_s + config.idle_timeout_s
    return InputStreams(service, engine, config, planes, MediaFailed, take_over_s)


def kv_streams(service: Service, engine: Engine, config: TransferConfig) -> InputStreams:
    """Streams from prefill workers."""
    return InputStreams(service, engine, kv_transfer(config, engine.kv_plane), (engine.kv_plane,), KVStreamFailed, 0.0)


class InputStreams:
    """One StreamReceiver and the requests its streams feed. failure: what a broken stream is to its request."""

    def __init__(
        self,
        service: Service,
        engine: Engine,
        config: TransferConfig,
        planes: tuple[PlaneSpec, ...],
        failure: type[EngineError],
        take_over_s: float,
    ) -> None:
        self._engine = engine
        self.planes = tuple(plane.name for plane in planes)
        self.failure = failure
        self._receiver = StreamReceiver(service, config, planes, device=str(engine.runner.device))
        self._take_over_s = take_over_s
        self._num_takeovers = 0
        self._streams: dict[str, str] = {}  # request id -> stream id, while the stream may still be open
        self.grant_rounds: dict[str, int] = {}

    def open(self, request_id: str, ticket: Ticket) -> None:
        """Expect the request's stream; raises TransferError when the receiver cannot take it."""
        self._streams[request_id] = ticket.stream_id
        try:
            listener = _Listener(self, self._engine, request_id)
            self._receiver.open(ticket, listener, take_over_s=self._take_over_s)
        except BaseException:
            del self._streams[request_id]
            raise

    def admit(self, request_id: str, num_restarts: int) -> None:
        """The request's input buffer is reserved: let its rows come, unless the stream has started over since."""
        stream_id = self._streams.get(request_id)
        if stream_id is not None:
            with suppress(EndpointClosed):  # every stream fails then, and says so
                self._receiver.admit(stream_id, num_restarts=num_restarts)

    def reissue(self, request_id: str, on_ticket: Callable[[Ticket | None], None]) -> None:
        """End the sender's right to the request's stream; `on_ticket(ticket)` is for another one, None when the stream
        is over or has all its rows. Raises EndpointClosed.
        """

        def count(ticket: Ticket | None) -> None:
            self._num_takeovers += ticket is not None
            on_ticket(ticket)

        stream_id = self._streams.get(request_id)
        if stream_id is None:
            on_ticket(None)
        else:
            self._receiver.reissue(stream_id, count)

    def end(self, request_id: str, error: EngineError | None = None) -> int:
        """The request is over: end its stream if it is open. Returns the stream's grant rounds (0: none known)."""
        stream_id = self._streams.pop(request_id, None)
        if stream_id is not None:
            with suppress(EndpointClosed):
                if error is None:
                    self._receiver.close(stream_id)
                else:
                    self._receiver.abort(stream_id, error.code, error.message)
        return self.grant_rounds.pop(request_id, 0)

    def completed(self, request_id: str, grant_rounds: int) -> None:
        """All rows arrived; the stream has ended by itself."""
        if self._streams.pop(request_id, None) is not None:
            self.grant_rounds[request_id] = grant_rounds

    def failed(self, request_id: str) -> None:
        """The stream has ended by itself, without all its rows."""
        self._streams.pop(request_id, None)

    def stats(self) -> dict[str, float]:
        """The receiver's ledger and counters, and how many tickets were issued for other senders."""
        return {**self._receiver.stats(), "embed_takeovers_total": self._num_takeovers}


class _Listener:
    """Callbacks of one stream, on the I/O thread."""

    __slots__ = ("_engine", "_owner", "_request_id")

    def __init__(self, owner: InputStreams, engine: Engine, request_id: str) -> None:
        self._owner = owner
        self._engine = engine
        self._request_id = request_id

    def on_announce(self, total_rows: int, items: Sequence[Mapping[str, Any]]) -> None:
        self._engine.announce(self._request_id, total_rows, items)

    def on_rows(self, first_row: int, planes: Mapping[str, torch.Tensor]) -> None:
        buffer = self._engine.media_buffer(self._request_id)
        if buffer is None:
            return  # the request ended; its stream is being aborted
        try:
            buffer.write(first_row, *(planes[name] for name in self._owner.planes))
        except MediaFailed as error:
            self._engine.fail(self._request_id, error)
        self._engine.wake()

    def on_restart(self) -> None:
        self._engine.forget_media(self._request_id)

    def on_complete(self, stats: Any) -> None:
        self._owner.completed(self._request_id, int(getattr(stats, "grant_rounds", 0)))

    def on_failed(self, error: TransferError) -> None:
        self._owner.failed(self._request_id)
        what = f"the {self._owner.planes[0]} stream of request {self._request_id}"
        self._engine.fail(self._request_id, self._owner.failure(f"{what} failed ({error_code(error)}): {error}"))
