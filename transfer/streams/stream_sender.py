"""StreamSender: the shell round sender sessions: service, row buffers and clock.

Producers write tensors from any thread; their bytes are kept by reference until acknowledged and leave as views.
Sessions decide, this class executes, on the service's I/O thread.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from transfer.config import TransferConfig
from transfer.connection import Connection, Frame
from transfer.errors import (
    EndpointClosed,
    LocalProtocolError,
    Overloaded,
    PeerLost,
    StreamAborted,
    TicketRejected,
    TransferError,
)
from transfer.memory.segment_guest import SegmentGuest, guest_for
from transfer.protocol.actions import (
    Accepted,
    Dropped,
    Failed,
    Finished,
    ReleaseRows,
    Send,
    SendBlock,
    SenderAction,
    SendFilled,
    Timers,
    Withdrawn,
)
from transfer.protocol.messages import Abort, Block, Close, Probe, Revoked, StreamMessage
from transfer.protocol.negotiate import SEALED, Offer
from transfer.protocol.payload import integrity_offered, outgoing_payload
from transfer.protocol.schedule import Schedule
from transfer.protocol.sender_session import MESSAGES, SenderSession
from transfer.protocol.state import TERMINAL
from transfer.protocol.ticket import Ticket
from transfer.service.connection_use import ConnectionUse
from transfer.service.service import Service
from transfer.streams.outgoing_slots import OutgoingSlots
from transfer.streams.outgoing_stream import OutgoingStream
from transfer.tensors import SEAL_BYTES, PlaneSpec, check_block_bytes

if TYPE_CHECKING:
    from transfer.protocol.sealing import SealBuffers

logger = logging.getLogger(__name__)

__all__ = ["OutgoingStream", "StreamSender"]

NONCE_BYTES = 16
TOTALS = ("blocks_sent", "streams_sent", "streams_unsent")  # shown from the start


class StreamSender:
    """Sends streams over a service, to any number of receivers.

    A connection that no stream used for idle_timeout_s is given up, unless calls go over it: receivers come and go.
    `token_bytes` draws the nonces of streams (a simulation draws them from its seed).
    """

    def __init__(
        self,
        service: Service,
        config: TransferConfig,
        *,
        token_bytes: Callable[[int], bytes] = secrets.token_bytes,
        segments: SegmentGuest | None = None,
    ) -> None:
        self._service = service
        self._config = config
        self._token_bytes = token_bytes
        self._timers = Timers.of(config)
        self._integrity = integrity_offered(is_encrypted=service.endpoint.public_key is not None, config=config)
        self._buffers: SealBuffers | None = None  # what is sealed lies here until it is sent
        self._streams: dict[str, OutgoingStream] = {}
        self._use = ConnectionUse()  # guarded by the lock
        self._lock = threading.Lock()
        self._dropped: Counter[str] = Counter()
        self._totals: dict[str, int] = dict.fromkeys(TOTALS, 0)
        self._schedule = Schedule()
        self._guest = segments or guest_for(service, config)
        self._slots = OutgoingSlots(service, self._guest, self._run, self._send)
        service.attach(MESSAGES, self)

    def open(
        self,
        ticket: Ticket,
        receiver_address: str,
        receiver_public_key: str | None,
        planes: Sequence[PlaneSpec],
        content_key: str = "",
        *,
        deadline_s: float | None = None,
    ) -> OutgoingStream:
        """Open the stream of `ticket` at its receiver, whether that knows the ticket already or will soon.

        `content_key`: equal keys mean equal rows; another sender with the same (non-empty) key may go on where this one
        stops. `deadline_s`: both ends give up after so long. A ticket of a later epoch ends the stream of an earlier
        one that is still open here. Raises ConfigError for an address that cannot be reached or a block that fits no
        message, LocalProtocolError when the stream is open here, Overloaded beyond max_streams, EndpointClosed.
        """
        check_block_bytes(planes, self._config, SEAL_BYTES if SEALED in self._integrity else 0)
        now = self._service.now()
        with self._lock:
            earlier = self._streams.get(ticket.stream_id)
            if earlier is not None and earlier.session.ticket.epoch >= ticket.epoch:
                raise LocalProtocolError(f"stream {ticket.stream_id} is open here already")
            if len(self._streams) >= self._config.max_streams:
                raise Overloaded(f"{len(self._streams)} streams are open: raise max_streams, or try later")
            connection = self._service.endpoint.connect(receiver_address, receiver_public_key)
            session = SenderSession(
                ticket,
                offer=self._offer(planes, connection),
                nonce=self._token_bytes(NONCE_BYTES),
                content_key=content_key,
                timers=self._timers,
                now=now,
                deadline=None if deadline_s is None else now + deadline_s,
            )
            if earlier is not None:
                self._forget(earlier)
            stream = self._streams[ticket.stream_id] = OutgoingStream(self, session, connection)
            self._use.use(connection)

        def start() -> None:
            if earlier is not None:
                stale = TicketRejected(f"epoch {ticket.epoch} of stream {ticket.stream_id} was opened here")
                self._run(earlier, earlier.session.fail(stale, tell_peer=False))
            self._run(stream, session.start(self._service.now()))

        try:
            self._service.post(start)
        except EndpointClosed:
            self._remove(stream)
            raise
        return stream

    def _offer(self, planes: Sequence[PlaneSpec], connection: Connection) -> Offer:
        config = self._config
        return Offer(
            block_size=config.block_size,
            planes=tuple(planes),
            integrity=self._integrity,
            payload=self._guest.payload(connection),
            max_frame_bytes=config.max_message_bytes,
            credit=config.credit_window_blocks,
        )

    def stats(self) -> dict[str, int]:
        """Streams being sent, dropped messages by reason, and totals."""
        return {
            "transfer_streams_sending": len(self._streams),
            "transfer_segments_mapped": self._guest.num_mapped,
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
            except Exception as error:
                self._break(stream, error)
            else:
                self._run(stream, actions)

        try:
            self._service.post(step)
        except EndpointClosed as error:
            return error
        return None

    # -- the service's side, on the I/O thread --------------------------------------------------------------------

    def on_message(self, connection: Connection, message: StreamMessage, frames: Sequence[memoryview]) -> bool:
        """A message of a receiver; see service.StreamSide."""
        stream = self._streams.get(message.stream_id)
        if isinstance(message, (Close, Abort)):
            self._slots.last_word(stream, connection, message)
        if stream is None or stream.connection != connection:
            if not isinstance(message, Abort):
                self._dropped["unknown_stream" if stream is None else "foreign_connection"] += 1
            return not isinstance(message, Abort)
        self._run(stream, self._slots.receive(stream, message))
        return True

    def on_tick(self, now: float) -> None:
        """Probes and time limits, of streams and of connections; see service.StreamSide."""
        for stream_id in self._schedule.take_due(now):
            stream = self._streams.get(stream_id)
            if stream is not None:
                self._run(stream, stream.session.tick(now))
        self._guest.tick()
        self._release_idle(now)

    def restart_loop(self) -> None:
        """Nothing to do: sessions are whole between two events, and ask for what was lost; see service.StreamSide."""

    def on_peer_lost(self, connection: Connection, error: PeerLost) -> None:
        """Streams to a lost peer fail; see service.StreamSide."""
        with self._lock:  # a stream that opens meanwhile is among these, or has a new connection
            lost = [stream for stream in self._streams.values() if stream.connection == connection]
        for stream in lost:
            self._run(stream, stream.session.fail(error, tell_peer=False))
        with self._lock:
            self._use.drop(connection)
        self._guest.forget(connection)

    def on_close(self) -> None:
        """Every stream fails with EndpointClosed; see service.StreamSide."""
        for stream in tuple(self._streams.values()):
            self._run(stream, stream.session.fail(EndpointClosed("the sending service was closed")))
        self._guest.close()

    # -- helpers --------------------------------------------------------------------------------------------------

    def _run(self, stream: OutgoingStream, actions: Sequence[SenderAction]) -> None:
        """Do what a session asks for, in order. What cannot be done ends the stream, at both ends."""
        try:
            for action in actions:
                self._execute(stream, action)
        except Exception as error:
            self._break(stream, error)
        if stream.session.state not in TERMINAL:
            self._schedule.at(stream.stream_id, stream.session.due())

    def _execute(self, stream: OutgoingStream, action: SenderAction) -> None:
        match action:
            case Accepted():
                self._accept(stream, action)
                self._slots.join(stream, action)
            case Withdrawn():
                self._slots.leave(stream)
            case SendBlock():
                if stream.session.state not in TERMINAL:  # the block before it may have ended the stream
                    self._send_block(stream, action)
            case SendFilled():
                if stream.session.state not in TERMINAL:
                    self._totals["blocks_sent"] += len(action.block_ids)
                    self._slots.send_filled(stream, action)
            case Send(Revoked() as message) if stream.slots is not None:
                self._slots.confirm(stream, message)
            case Send(message):
                self._send(stream, message)
            case ReleaseRows(before_row):
                stream.rows.release(before_row)
                if stream.slots is not None:
                    stream.slots.release(before_row)
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

    def _break(self, stream: OutgoingStream, error: Exception) -> None:
        """Something failed while it was done: the stream ends with that, once, whatever else fails then."""
        if not isinstance(error, TransferError):
            logger.exception("sending stream %s failed", stream.stream_id, exc_info=error)
            error = StreamAborted("InternalError", f"sending failed: {type(error).__name__}")
        actions = stream.session.fail(error)
        self._run(stream, actions or [Failed(error)])

    def _accept(self, stream: OutgoingStream, accepted: Accepted) -> None:
        """The two ends agreed: choose how rows travel. Raises what `connect` does."""
        session = stream.session
        stream.payload = outgoing_payload(session.ticket, session.nonce, accepted.terms, self._seal_buffers)
        if accepted.data_address is not None:
            with self._lock:
                path = stream.sealed_path = self._service.endpoint.connect(accepted.data_address)
                self._use.use(path)
        stream.accept(accepted)

    def _seal_buffers(self) -> SealBuffers:
        if self._buffers is None:
            from transfer.protocol.sealing import SealBuffers

            self._buffers = SealBuffers()
        return self._buffers

    def _send_block(self, stream: OutgoingStream, block: SendBlock) -> None:
        assert stream.payload is not None
        message, frames = stream.payload.block(block, stream.rows.frames(block.first_row, block.num_rows))
        self._totals["blocks_sent"] += 1
        self._send(stream, message, frames)

    def _send(self, stream: OutgoingStream, message: StreamMessage, frames: Sequence[Frame] = ()) -> None:
        path = stream.connection
        if isinstance(message, (Block, Probe)):
            if stream.sealed_path is not None and stream.slots is None:
                path = stream.sealed_path
            if isinstance(message, Probe) and stream.payload is not None:
                message = stream.payload.probe(message)
        try:
            self._service.endpoint.send(path, message, frames)
        except LocalProtocolError as error:  # too large, or nothing that can travel: repeating it would not help
            self._dropped["unsent"] += 1
            self._run(stream, stream.session.fail(error))
        except TransferError as error:  # as if lost on the way: probes repeat it, and the idle limit ends it
            self._dropped["unsent"] += 1
            logger.info("a %s of stream %s did not leave: %s", type(message).__name__, stream.stream_id, error)

    def _release_idle(self, now: float) -> None:
        """Give up connections that no stream used for a while; under the lock, so that none opens on them meanwhile."""
        with self._lock:
            for connection in self._use.take_idle(now, self._config.idle_timeout_s):
                if not self._service.carries_calls(connection):
                    self._guest.forget(connection)
                    self._service.endpoint.disconnect(connection)

    def _remove(self, stream: OutgoingStream) -> None:
        stream.rows.clear()
        self._slots.let_go(stream)
        with self._lock:
            if self._streams.get(stream.stream_id) is stream:
                self._schedule.remove(stream.stream_id)
                self._forget(stream)

    def _forget(self, stream: OutgoingStream) -> None:
        """Under the lock."""
        del self._streams[stream.stream_id]
        self._use.release((stream.connection, stream.sealed_path), self._service.now())
