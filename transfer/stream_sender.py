"""StreamSender: the shell round sender sessions: service, row buffers and clock.

Producers write tensors from any thread; their bytes are kept by reference until acknowledged and leave as views.
Sessions decide, this class executes, on the service's I/O thread.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from transfer.actions import Dropped, Failed, Finished, ReleaseRows, Send, SendBlock, SenderAction, StreamStats, Timers
from transfer.buffers import RowQueue, Tensor
from transfer.config import TransferConfig
from transfer.connection import Connection
from transfer.errors import (
    EndpointClosed,
    LocalProtocolError,
    Overloaded,
    PeerLost,
    StreamAborted,
    StreamTimeout,
    TransferError,
)
from transfer.integrity import block_tag, tag_seed
from transfer.messages import Abort, Ack, Block, Body, Close, Grant, StreamMessage
from transfer.sender_session import SenderSession
from transfer.service import Service
from transfer.state import TERMINAL
from transfer.tensors import PlaneSpec, check_block_bytes
from transfer.ticket import Ticket

logger = logging.getLogger(__name__)


class OutgoingStream:
    """One stream being sent. All methods may be called from any thread, none blocks but result()."""

    def __init__(self, sender: StreamSender, session: SenderSession, connection: Connection) -> None:
        self.stream_id = session.ticket.stream_id
        self.session = session
        self.connection = connection
        self.rows = RowQueue(session.planes)
        self.seed = tag_seed(session.ticket)
        self._sender = sender
        self._lock = threading.Lock()
        self._num_written = 0
        self._total_rows: int | None = None
        self._outcome: StreamStats | TransferError | None = None
        self._ended = threading.Event()
        self._callbacks: list[Callable[[OutgoingStream], None]] = []

    def announce(self, total_rows: int, items: Sequence[Body] = ()) -> None:
        """The totals are known; blocks leave from now on. LocalProtocolError when repeated or out of range."""
        with self._lock:
            if self._total_rows is not None or type(total_rows) is not int or total_rows < self._num_written:
                raise LocalProtocolError(
                    f"stream {self.stream_id}: total_rows {total_rows!r} after {self._num_written} rows written "
                    f"and {self._total_rows} announced; announce once, an int not below what is written"
                )
            self._total_rows = total_rows
        self._soon(lambda now: self.session.announce(total_rows, items, now))

    def write(self, first_row: int, planes: Mapping[str, Tensor]) -> None:
        """Rows first_row ... of every plane: contiguous CPU tensors [n, *row_shape], kept by reference.

        They must not change until the stream ends. Rows come in order. Raises LocalProtocolError for rows out of order,
        beyond the announced total, or other than the opened planes.
        """
        num_rows, chunk = self.rows.check(planes)

        def add(now: float) -> list[SenderAction]:
            self.rows.append(num_rows, chunk)
            return self.session.rows_written(num_rows, now)

        with self._lock:
            end = self._num_written + num_rows
            if first_row != self._num_written or (self._total_rows is not None and end > self._total_rows):
                raise LocalProtocolError(
                    f"stream {self.stream_id}: {num_rows} rows written at {first_row}; {self._num_written} are there "
                    f"and {self._total_rows} announced"
                )
            self._num_written = end
            closed = self._sender.run_soon(self, add)  # under the lock: rows stay in order whoever writes them
        if closed is not None:
            self.finish(closed)

    def abort(self, code: str, message: str) -> None:
        """End the stream; both ends get the error. Nothing happens when it is over."""
        self._soon(lambda now: self.session.fail(StreamAborted(code, message)))

    def result(self, timeout_s: float) -> StreamStats:
        """Wait for the end. Raises what ended it, or StreamTimeout when it goes on after `timeout_s`."""
        if not self._ended.wait(timeout_s):
            raise StreamTimeout(f"stream {self.stream_id} is not over after {timeout_s:g} s: wait on, or abort it")
        if isinstance(self._outcome, StreamStats):
            return self._outcome
        assert self._outcome is not None
        raise self._outcome

    def on_done(self, callback: Callable[[OutgoingStream], None]) -> None:
        """Run `callback(stream)` once when the stream is over (result(0) then tells how); at once if it is."""
        with self._lock:
            if not self._ended.is_set():
                self._callbacks.append(callback)
                return
        callback(self)

    def finish(self, outcome: StreamStats | TransferError) -> None:
        """For the sender: the stream is over."""
        with self._lock:
            if self._ended.is_set():
                return
            self._outcome = outcome
            self._ended.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(self)
            except Exception:
                logger.exception("on_done of stream %s failed", self.stream_id)

    def _soon(self, event: Callable[[float], list[SenderAction]]) -> None:
        closed = self._sender.run_soon(self, event)
        if closed is not None:
            self.finish(closed)


class StreamSender:
    """Sends streams over a service, to any number of receivers.

    A connection that no stream used for idle_timeout_s is given up, unless calls go over it: receivers come and go.
    """

    def __init__(self, service: Service, config: TransferConfig) -> None:
        self._service = service
        self._config = config
        self._timers = Timers.of(config)
        self._streams: dict[str, OutgoingStream] = {}
        self._num_using: Counter[Connection] = Counter()  # open streams by connection, and since when there are none
        self._idle_since: dict[Connection, float] = {}
        self._lock = threading.Lock()
        self._dropped: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        service.attach((Grant, Ack, Close, Abort), self)

    def open(
        self,
        ticket: Ticket,
        receiver_address: str,
        receiver_public_key: str | None,
        planes: Sequence[PlaneSpec],
        content_key: str = "",
    ) -> OutgoingStream:
        """Open the stream of `ticket` at its receiver, whether that knows the ticket already or will soon.

        Raises ConfigError for an address that cannot be reached or a block that fits no message, LocalProtocolError
        when the stream is open here, Overloaded beyond max_streams, EndpointClosed.
        """
        check_block_bytes(planes, self._config)
        session = SenderSession(
            ticket,
            block_size=self._config.block_size,
            planes=planes,
            content_key=content_key,
            timers=self._timers,
            now=self._service.now(),
        )
        with self._lock:
            if ticket.stream_id in self._streams:
                raise LocalProtocolError(f"stream {ticket.stream_id} is open here already")
            if len(self._streams) >= self._config.max_streams:
                raise Overloaded(f"{len(self._streams)} streams are open: raise max_streams, or try later")
            connection = self._service.endpoint.connect(receiver_address, receiver_public_key)
            stream = self._streams[ticket.stream_id] = OutgoingStream(self, session, connection)
            self._num_using[connection] += 1
            self._idle_since.pop(connection, None)
        try:
            self._service.post(lambda: self._run(stream, session.start(self._service.now())))
        except EndpointClosed:
            self._remove(stream)
            raise
        return stream

    def stats(self) -> dict[str, int]:
        """Streams being sent, dropped messages by reason, and totals."""
        return {
            "transfer_streams_sending": len(self._streams),
            **{f"transfer_{name}_total": count for name, count in tuple(self._totals.items())},
            **{f"transfer_dropped_{reason}": count for reason, count in tuple(self._dropped.items())},
        }

    def run_soon(self, stream: OutgoingStream, event: Callable[[float], list[SenderAction]]) -> EndpointClosed | None:
        """For OutgoingStream: apply an event on the I/O thread; ignored when the stream is over.

        Returns the error when the service is closed; the caller ends the stream with it, holding no lock.
        """

        def step() -> None:
            if stream.session.state in TERMINAL:
                return
            try:
                actions = event(self._service.now())
            except TransferError as error:
                actions = stream.session.fail(error)
            self._run(stream, actions)

        try:
            self._service.post(step)
        except EndpointClosed as error:
            return error
        return None

    # -- the service's side, on the I/O thread --------------------------------------------------------------------

    def on_message(self, connection: Connection, message: StreamMessage, frames: Sequence[memoryview]) -> bool:
        """Grant, Ack, Close or Abort of a receiver; see service.StreamSide."""
        stream = self._streams.get(message.stream_id)
        if stream is None or stream.connection != connection:
            if not isinstance(message, Abort):
                self._dropped["unknown_stream" if stream is None else "foreign_connection"] += 1
            return not isinstance(message, Abort)
        self._run(stream, stream.session.receive(message, self._service.now()))
        return True

    def on_tick(self, now: float) -> None:
        """Probes and time limits, of streams and of connections; see service.StreamSide."""
        for stream in tuple(self._streams.values()):
            actions = stream.session.tick(now)
            if actions:
                self._run(stream, actions)
        self._release_idle(now)

    def on_peer_lost(self, connection: Connection, error: PeerLost) -> None:
        """Streams to a lost peer fail; see service.StreamSide."""
        with self._lock:  # a stream that opens meanwhile is among these, or has a new connection
            lost = [stream for stream in self._streams.values() if stream.connection == connection]
        for stream in lost:
            self._run(stream, stream.session.fail(error, tell_peer=False))
        with self._lock:
            self._idle_since.pop(connection, None)

    def on_close(self) -> None:
        """Every stream fails with EndpointClosed; see service.StreamSide."""
        for stream in tuple(self._streams.values()):
            self._run(stream, stream.session.fail(EndpointClosed("the sending service was closed")))

    # -- helpers --------------------------------------------------------------------------------------------------

    def _run(self, stream: OutgoingStream, actions: Sequence[SenderAction]) -> None:
        for action in actions:
            match action:
                case SendBlock():
                    if stream.session.state not in TERMINAL:  # the block before it may have ended the stream
                        self._send_block(stream, action)
                case Send(message):
                    self._send(stream, message)
                case ReleaseRows(before_row):
                    stream.rows.release(before_row)
                case Dropped(reason):
                    self._dropped[reason] += 1
                case Finished(stats):
                    self._totals["streams_sent"] += 1
                    self._remove(stream)
                    stream.finish(stats)
                case Failed(error):
                    self._totals["streams_unsent"] += 1
                    self._remove(stream)
                    stream.finish(error)

    def _send_block(self, stream: OutgoingStream, block: SendBlock) -> None:
        ticket = stream.session.ticket
        frames = stream.rows.frames(block.first_row, block.num_rows)
        index, block_id, first_row, num_rows = block.index, block.block_id, block.first_row, block.num_rows
        tag = block_tag(stream.seed, ticket.stream_id, ticket.epoch, index, block_id, first_row, num_rows, frames)
        message = Block(
            stream_id=ticket.stream_id,
            epoch=ticket.epoch,
            index=index,
            block_id=block_id,
            first_row=first_row,
            num_rows=num_rows,
            tag=tag,
        )
        self._totals["blocks_sent"] += 1
        self._send(stream, message, frames)

    def _send(self, stream: OutgoingStream, message: StreamMessage, frames: Sequence[memoryview] = ()) -> None:
        try:
            self._service.endpoint.send(stream.connection, message, frames)
        except LocalProtocolError as error:  # too large, or nothing that can travel: repeating it would not help
            self._dropped["unsent"] += 1
            self._run(stream, stream.session.fail(error))
        except TransferError as error:  # as if lost on the way: probes repeat it, and the idle limit ends it
            self._dropped["unsent"] += 1
            logger.info("a %s of stream %s did not leave: %s", type(message).__name__, stream.stream_id, error)

    def _release_idle(self, now: float) -> None:
        """Give up connections that no stream used for a while; under the lock, so that none opens on them meanwhile."""
        with self._lock:
            for connection, since in tuple(self._idle_since.items()):
                if now - since < self._config.idle_timeout_s:
                    continue
                del self._idle_since[connection]
                if not self._service.carries_calls(connection):
                    self._service.endpoint.disconnect(connection)

    def _remove(self, stream: OutgoingStream) -> None:
        stream.rows.clear()
        with self._lock:
            if self._streams.get(stream.stream_id) is stream:
                del self._streams[stream.stream_id]
                self._num_using[stream.connection] -= 1
                if not self._num_using[stream.connection]:
                    del self._num_using[stream.connection]
                    self._idle_since[stream.connection] = self._service.now()
