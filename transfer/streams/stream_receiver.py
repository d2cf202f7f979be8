"""StreamReceiver: streams into one pool of blocks: what users call, and what the service hands over.

Owns the receive pool of one worker. Sessions decide, `incoming_streams` executes; everything runs on the service's I/O
thread except the methods users call, which only post to it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from transfer.config import TransferConfig
from transfer.connection import Connection
from transfer.errors import EndpointClosed, LocalProtocolError, Overloaded, PeerLost, StreamAborted, TransferError
from transfer.memory.receive_area import ReceiveArea
from transfer.memory.segment_area import SegmentArea
from transfer.memory.segment_host import SegmentHost, host_for
from transfer.protocol.actions import Failed, Timers
from transfer.protocol.messages import (
    Abort,
    Announce,
    Attached,
    Block,
    Filled,
    Open,
    Probe,
    Released,
    Revoked,
    StreamMessage,
)
from transfer.protocol.negotiate import SEALED, Offer
from transfer.protocol.payload import incoming_payload, integrity_offered
from transfer.protocol.receiver_session import ReceiverSession
from transfer.protocol.refusals import refusal_of
from transfer.protocol.state import TERMINAL, ReceiverState
from transfer.protocol.ticket import Ticket, open_is_proven
from transfer.service.service import Service
from transfer.streams.incoming_streams import IncomingStream, IncomingStreams, NobodyListens, StreamListener
from transfer.streams.receive_areas import ReceiveAreas
from transfer.tensors import SEAL_BYTES, PlaneSpec, check_block_bytes

logger = logging.getLogger(__name__)

__all__ = ["StreamListener", "StreamReceiver"]


class StreamReceiver:
    """Receives streams of fixed `planes` into one pool of blocks. ConfigError when a block fits no message.

    `next_ticket` issues the tickets of later epochs (a simulation draws their secrets from its seed);
    `segments`: in place of those that the configuration asks for.
    """

    def __init__(
        self,
        service: Service,
        config: TransferConfig,
        planes: Sequence[PlaneSpec],
        device: str = "cpu",
        *,
        next_ticket: Callable[[Ticket], Ticket] = Ticket.next_epoch,
        segments: SegmentHost | None = None,
    ) -> None:
        integrity = integrity_offered(is_encrypted=service.endpoint.public_key is not None, config=config)
        seal_bytes = SEAL_BYTES if SEALED in integrity else 0
        check_block_bytes(planes, config, seal_bytes)
        self._service = service
        self._config = config
        self._streams = IncomingStreams(service, self._ended)
        self._area = wire = ReceiveArea.of_wire(config.num_pool_blocks, config.block_size, planes, device)
        self._areas = ReceiveAreas(wire, segments or host_for(service, config, planes), self._streams)
        self._offer = Offer(
            block_size=config.block_size,
            planes=tuple(planes),
            integrity=integrity,
            payload=self._areas.payload,
            max_frame_bytes=config.max_message_bytes,
            credit=config.credit_window_blocks,
        )
        block_bytes = max(plane.row_bytes for plane in planes) * config.block_size
        self._sealed_address = service.endpoint.listen_sealed(block_bytes + SEAL_BYTES)
        self._timers = Timers.of(config)
        self._tickets: dict[str, StreamListener] = {}  # streams open for their consumer; guarded by the lock
        self._lock = threading.Lock()
        self._next_ticket = next_ticket
        service.attach((Open, Attached, Announce, Block, Filled, Released, Probe, Revoked, Abort), self)

    # -- any thread -----------------------------------------------------------------------------------------------

    def open(
        self, ticket: Ticket, listener: StreamListener, *, deadline_s: float | None = None, take_over_s: float = 0.0
    ) -> None:
        """Expect the stream of `ticket`; its default blocks are granted when its sender opens it.

        `deadline_s`: the stream fails when it is not complete after so long. `take_over_s`: when its sender is lost,
        another one (see `reissue`) has so long to take it over; 0 means that the stream fails at once.
        Raises LocalProtocolError when the stream is open here, Overloaded beyond max_streams, EndpointClosed.
        """
        with self._lock:
            if ticket.stream_id in self._tickets:
                raise LocalProtocolError(f"stream {ticket.stream_id} is open here already")
            if len(self._tickets) >= self._config.max_streams:
                raise Overloaded(f"{len(self._tickets)} streams are open: raise max_streams, or try later")
            self._tickets[ticket.stream_id] = listener
        deadline = None if deadline_s is None else self._service.now() + deadline_s
        try:
            self._service.post(lambda: self._register(ticket, deadline, take_over_s))
        except EndpointClosed:
            self._forget_ticket(ticket.stream_id)
            raise

    def admit(self, stream_id: str, total_rows: int | None = None, *, num_restarts: int | None = None) -> None:
        """The consumer has room for every announced row: hand them over as they come.

        `total_rows`: what room was made for; given, a stream that has started over with another total meanwhile is not
        admitted. `num_restarts`: how often the listener had been told to start over when room was made; given, a stream
        that has started over since is not admitted. Unknown streams are ignored.
        """
        self._service.post(lambda: self._admit(stream_id, total_rows, num_restarts))

    def reissue(self, stream_id: str, on_ticket: Callable[[Ticket | None], None]) -> None:
        """End the sender's epoch and issue the ticket of the next, for another sender: `on_ticket(ticket)`.

        `on_ticket(None)` when the stream is over, or needs no sender any more. Runs on the I/O thread.
        """
        self._service.post(lambda: self._reissue(stream_id, on_ticket))

    def sender_lost(self, stream_id: str, reason: str = "its sender was lost") -> None:
        """The consumer learned that the sender is gone: as if this side had noticed. Unknown streams are ignored."""
        self._service.post(lambda: self._sender_lost(stream_id, reason))

    def abort(self, stream_id: str, code: str, message: str) -> None:
        """End a stream; the sender gets the error, the listener is not called again. Unknown streams are ignored."""
        nobody = NobodyListens(StreamAborted(code, message))
        with self._lock:  # now, not when the callback runs
            if stream_id in self._tickets:
                self._tickets[stream_id] = nobody
            stream = self._streams.by_id.get(stream_id)
            if stream is not None:
                stream.listener = nobody
        self._service.post(lambda: self._end_quietly(stream_id, nobody.error))

    def close(self, stream_id: str) -> None:
        """The consumer is done with a stream, complete or not."""
        self.abort(stream_id, "Cancelled", "the receiver no longer wants the stream")

    def stats(self) -> dict[str, int]:
        """The ledger (zero when nothing is under way), dropped messages by reason, and totals."""
        streams = self._streams
        return {
            **self._areas.stats(),
            "transfer_streams_open": len(streams.by_id),
            "transfer_tickets_open": len(self._tickets),
            "transfer_opens_parked": streams.strays.num_parked,
            **{f"transfer_{name}_total": count for name, count in tuple(streams.totals.items())},
            **{f"transfer_dropped_{reason}": count for reason, count in tuple(streams.dropped.items())},
        }

    # -- the service's side, on the I/O thread --------------------------------------------------------------------

    def on_message(self, connection: Connection, message: StreamMessage, frames: Sequence[memoryview]) -> bool:
        """A message of a sender; see service.StreamSide."""
        streams, now = self._streams, self._service.now()
        stream = self._wanted(message.stream_id)
        if isinstance(message, Released):
            self._areas.released(connection, message)
            self._areas.plan()
            return True
        is_apart = connection.is_sealed_path
        if is_apart:
            sender = streams.sender_of(message)
            if sender is None:
                streams.dropped[_no_sender(stream, message)] += 1
                return True
            connection = sender
        if stream is None:
            reply = streams.strays.answer(connection, message, now)
            if reply is not None:
                streams.send(connection, reply)
            return not isinstance(message, Abort)  # that one may be for a sender in this process
        session = stream.session
        if isinstance(message, Open) and stream.connection in (None, connection):
            self._open(stream, connection, message, now)
        elif stream.connection != connection:
            if isinstance(message, Abort):
                return False  # as above
            streams.dropped["foreign_connection"] += 1
            if isinstance(message, Open) or (isinstance(message, Probe) and message.epoch < session.facts.ticket.epoch):
                streams.send(connection, refusal_of(message))  # bound to another sender, or an epoch that is over
            return True
        elif isinstance(message, Filled):
            self._areas.filled(stream, message, now)
        elif isinstance(message, Attached):
            self._areas.attached(stream, message, now)
        elif _is_astray(stream, message, is_apart):
            streams.dropped["wrong_path"] += 1
        elif isinstance(message, Block):
            streams.run(stream, session.block(message, frames, now))
        else:
            streams.run(stream, _told(session, message, now))
        self._areas.plan()
        return True

    def on_tick(self, now: float) -> None:
        """Time limits, late acknowledgements, parked opens; see service.StreamSide."""
        self._streams.tick(now)
        self._areas.tick(now)
        self._areas.plan()

    def on_peer_lost(self, connection: Connection, error: PeerLost) -> None:
        """Streams of a lost peer fail, or wait for another sender; see service.StreamSide."""
        for stream in tuple(self._streams.by_id.values()):
            if stream.connection == connection:
                self._streams.run(
                    stream, stream.session.lost(error, self._service.now(), tell_peer=False), is_decided=True
                )
        self._areas.peer_lost(connection)
        self._areas.plan()

    def on_close(self) -> None:
        """Every stream fails with EndpointClosed; see service.StreamSide."""
        error = EndpointClosed("the receiving service was closed")
        for stream in tuple(self._streams.by_id.values()):
            self._streams.run(stream, stream.session.fail(error))
        self._streams.strays.clear()
        self._areas.close()

    def restart_loop(self) -> None:
        """The endpoint's loop died and runs again: build every session from its record; probes bring what was lost."""
        self._streams.restart(lambda stream: self._session(stream.record.facts.ticket), self._service.now())
        self._areas.restarted()
        self._areas.plan()

    # -- helpers --------------------------------------------------------------------------------------------------

    def _register(self, ticket: Ticket, deadline: float | None, take_over_s: float) -> None:
        session = self._session(ticket, deadline=deadline, take_over_s=take_over_s)
        with self._lock:  # its consumer may have given it up already
            listener = self._tickets[ticket.stream_id]
            stream = IncomingStream(session, listener, next(self._streams.turns), self._areas.wire, session.record())
            self._streams.add(stream)
        parked = self._streams.strays.opened(ticket.stream_id)
        if parked is not None:
            connection, messages = parked
            for message in messages:
                self.on_message(connection, message, ())

    def _open(self, stream: IncomingStream, connection: Connection, message: Open, now: float) -> None:
        session = stream.session
        is_first = session.facts.opened is None
        if is_first and not open_is_proven(session.ticket, message):
            self._streams.dropped["bad_proof"] += 1  # it takes nobody's place: the right one is still to come
            self._streams.send(connection, refusal_of(message))
            return
        stream.connection = connection
        segment = self._areas.invite(stream, connection, message)
        self._streams.run(stream, session.open(message, now, segment=segment, data_address=self._sealed_address))
        if is_first and session.state not in TERMINAL:
            self._areas.opened(stream)

    def _session(self, ticket: Ticket, **more: Any) -> ReceiverSession:
        return ReceiverSession(
            ticket,
            offer=self._offer,
            default_blocks=self._config.default_blocks,
            timers=self._timers,
            now=self._service.now(),
            next_ticket=self._next_ticket,
            payload=lambda facts: incoming_payload(facts, self._area.targets),
            **more,
        )

    def _wanted(self, stream_id: str) -> IncomingStream | None:
        """An open stream that somebody listens to; one that was given up ends here, before anything completes it."""
        stream = self._streams.by_id.get(stream_id)
        if stream is not None and isinstance(stream.listener, NobodyListens):
            self._end_quietly(stream_id, stream.listener.error)
            return None
        return stream

    def _admit(self, stream_id: str, total_rows: int | None, num_restarts: int | None) -> None:
        stream = self._wanted(stream_id)
        if stream is None:
            return  # it ended meanwhile
        session = stream.session
        if total_rows not in (None, session.total_rows) or num_restarts not in (None, stream.num_restarts):
            return  # it started over meanwhile
        try:
            self._streams.run(stream, session.admit(self._service.now()), is_decided=True)
        except LocalProtocolError:
            logger.exception("stream %s was admitted at the wrong time", stream_id)
        self._areas.plan()

    def _reissue(self, stream_id: str, on_ticket: Callable[[Ticket | None], None]) -> None:
        stream = self._streams.by_id.get(stream_id)
        if stream is None or stream.session.state in TERMINAL or not stream.session.needs_sender:
            on_ticket(None)
            return
        self._streams.run(stream, stream.session.reissue(self._service.now()), is_decided=True)
        on_ticket(stream.session.ticket)
        self._areas.plan()

    def _sender_lost(self, stream_id: str, reason: str) -> None:
        stream = self._streams.by_id.get(stream_id)
        if stream is not None and stream.session.state is not ReceiverState.ORPHANED:
            self._streams.run(stream, stream.session.lost(PeerLost(reason), self._service.now()), is_decided=True)
            self._areas.plan()

    def _end_quietly(self, stream_id: str, error: TransferError) -> None:
        stream = self._streams.by_id.get(stream_id)
        if stream is not None:
            self._streams.run(stream, [a for a in stream.session.fail(error) if not isinstance(a, Failed)])
            self._areas.plan()

    def _ended(self, stream_id: str) -> None:
        self._areas.ended(stream_id)
        self._forget_ticket(stream_id)

    def _forget_ticket(self, stream_id: str) -> None:
        with self._lock:
            self._tickets.pop(stream_id, None)


def _no_sender(stream: IncomingStream | None, message: StreamMessage) -> str:
    """Why what came over the path of sealed payloads is nobody's."""
    if stream is None:
        return "unknown_stream"
    return "wrong_path" if message.epoch == stream.session.facts.ticket.epoch else "stale_epoch"


def _is_astray(stream: IncomingStream, message: StreamMessage, is_apart: bool) -> bool:
    if isinstance(message, Block) and isinstance(stream.area, SegmentArea):
        return True  # its rows are to lie in the segment
    return isinstance(message, (Block, Probe)) and stream.has_sealed_path and not is_apart


def _told(session: ReceiverSession, message: StreamMessage, now: float) -> Sequence[Any]:
    if isinstance(message, Probe):
        return session.probe(message, now)
    if isinstance(message, Announce):
        return session.announce(message, now)
    if isinstance(message, Revoked):
        return session.revoked(message, now)
    assert isinstance(message, Abort)
    return session.aborted(message, now)
