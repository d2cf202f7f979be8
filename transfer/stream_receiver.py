"""StreamReceiver: streams into one pool of blocks: what users call, and what the service hands over.

Owns the receive pool of one worker. Sessions decide, `incoming_streams` executes; everything runs on the service's I/O
thread except the methods users call, which only post to it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from transfer.actions import Failed, Timers
from transfer.config import TransferConfig
from transfer.connection import Connection
from transfer.errors import EndpointClosed, LocalProtocolError, Overloaded, PeerLost, StreamAborted, TransferError
from transfer.incoming_streams import IncomingStream, IncomingStreams, NobodyListens, StreamListener
from transfer.messages import Abort, Announce, Block, Open, Probe, Revoked, StreamMessage
from transfer.negotiate import Offer
from transfer.receive_area import ReceiveArea
from transfer.receiver_session import ReceiverSession, refusal_of
from transfer.service import Service
from transfer.state import TERMINAL, ReceiverState
from transfer.tensors import PlaneSpec, check_block_bytes
from transfer.ticket import Ticket

logger = logging.getLogger(__name__)

__all__ = ["StreamListener", "StreamReceiver"]


class StreamReceiver:
    """Receives streams of fixed `planes` into one pool of blocks. ConfigError when a block fits no message."""

    def __init__(
        self, service: Service, config: TransferConfig, planes: Sequence[PlaneSpec], device: str = "cpu"
    ) -> None:
        check_block_bytes(planes, config)
        self._service = service
        self._config = config
        self._offer = Offer(
            block_size=config.block_size,
            planes=tuple(planes),
            max_frame_bytes=config.max_message_bytes,
            credit=config.credit_window_blocks,
        )
        self._area = ReceiveArea(config.num_pool_blocks, config.block_size, self._offer.planes, device)
        self._timers = Timers.of(config)
        self._streams = IncomingStreams(service, self._forget_ticket)
        self._tickets: set[str] = set()  # streams open for their consumer; guarded by the lock
        self._lock = threading.Lock()
        self._ages = 0
        service.attach((Open, Announce, Block, Probe, Revoked, Abort), self)

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
            self._tickets.add(ticket.stream_id)
        deadline = None if deadline_s is None else self._service.now() + deadline_s
        try:
            self._service.post(lambda: self._register(ticket, listener, deadline, take_over_s))
        except EndpointClosed:
            self._forget_ticket(ticket.stream_id)
            raise

    def admit(self, stream_id: str, total_rows: int | None = None) -> None:
        """The consumer has room for every announced row: hand them over as they come.

        `total_rows`: what room was made for; given, a stream that has started over with another total meanwhile is not
        admitted. Unknown streams are ignored.
        """
        self._service.post(lambda: self._admit(stream_id, total_rows))

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
        stream = self._streams.by_id.get(stream_id)
        if stream is not None:
            stream.listener = NobodyListens()  # now, not when the callback runs
        self._service.post(lambda: self._end_quietly(stream_id, StreamAborted(code, message)))

    def close(self, stream_id: str) -> None:
        """The consumer is done with a stream, complete or not."""
        self.abort(stream_id, "Cancelled", "the receiver no longer wants the stream")

    def stats(self) -> dict[str, int]:
        """The ledger (zero when nothing is under way), dropped messages by reason, and totals."""
        streams = self._streams
        return {
            "transfer_blocks_in_use": self._area.pool.num_in_use,
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
        stream = streams.by_id.get(message.stream_id)
        if stream is None:
            reply = streams.strays.answer(connection, message, now)
            if reply is not None:
                streams.send(connection, reply)
            return not isinstance(message, Abort)  # that one may be for a sender in this process
        session = stream.session
        if isinstance(message, Open) and stream.connection in (None, connection):
            stream.connection = connection
            streams.run(stream, session.open(message, now))
            if session.facts.opened is None:
                stream.connection = None  # a stale Open: the right one is still to come
        elif stream.connection != connection:
            if isinstance(message, Abort):
                return False  # as above
            streams.dropped["foreign_connection"] += 1
            if isinstance(message, Open) or (isinstance(message, Probe) and message.epoch < session.facts.ticket.epoch):
                streams.send(connection, refusal_of(message))  # bound to another sender, or an epoch that is over
            return True
        elif isinstance(message, Block):
            streams.run(stream, session.block(message, frames, now))
        else:
            streams.run(stream, _told(session, message, now))
        streams.plan(self._area)
        return True

    def on_tick(self, now: float) -> None:
        """Time limits, late acknowledgements, parked opens; see service.StreamSide."""
        self._streams.tick(now)
        self._streams.plan(self._area)

    def on_peer_lost(self, connection: Connection, error: PeerLost) -> None:
        """Streams of a lost peer fail, or wait for another sender; see service.StreamSide."""
        for stream in tuple(self._streams.by_id.values()):
            if stream.connection == connection:
                self._streams.run(
                    stream, stream.session.lost(error, self._service.now(), tell_peer=False), is_decided=True
                )
        self._streams.plan(self._area)

    def on_close(self) -> None:
        """Every stream fails with EndpointClosed; see service.StreamSide."""
        error = EndpointClosed("the receiving service was closed")
        for stream in tuple(self._streams.by_id.values()):
            self._streams.run(stream, stream.session.fail(error))
        self._streams.strays.clear()

    def restart_loop(self) -> None:
        """The endpoint's loop died and runs again: build every session from its record; probes bring what was lost."""
        self._streams.restart(lambda stream: self._session(stream.record.facts.ticket), self._service.now())
        self._streams.plan(self._area)

    # -- helpers --------------------------------------------------------------------------------------------------

    def _register(self, ticket: Ticket, listener: StreamListener, deadline: float | None, take_over_s: float) -> None:
        self._ages += 1
        session = self._session(ticket, deadline=deadline, take_over_s=take_over_s)
        stream = IncomingStream(session, listener, self._ages, self._area, session.record())
        self._streams.add(stream)
        parked = self._streams.strays.opened(ticket.stream_id)
        if parked is not None:
            connection, messages = parked
            for message in messages:
                self.on_message(connection, message, ())

    def _session(self, ticket: Ticket, **more: Any) -> ReceiverSession:
        return ReceiverSession(
            ticket,
            offer=self._offer,
            default_blocks=self._config.default_blocks,
            timers=self._timers,
            now=self._service.now(),
            **more,
        )

    def _admit(self, stream_id: str, total_rows: int | None) -> None:
        stream = self._streams.by_id.get(stream_id)
        if stream is None:
            return  # it ended meanwhile
        session = stream.session
        if total_rows is not None and total_rows != session.total_rows:
            return  # it started over meanwhile
        try:
            self._streams.run(stream, session.admit(self._service.now()), is_decided=True)
        except LocalProtocolError:
            logger.exception("stream %s was admitted at the wrong time", stream_id)
        self._streams.plan(self._area)

    def _reissue(self, stream_id: str, on_ticket: Callable[[Ticket | None], None]) -> None:
        stream = self._streams.by_id.get(stream_id)
        if stream is None or stream.session.state in TERMINAL or not stream.session.needs_sender:
            on_ticket(None)
            return
        self._streams.run(stream, stream.session.reissue(self._service.now()), is_decided=True)
        on_ticket(stream.session.ticket)
        self._streams.plan(self._area)

    def _sender_lost(self, stream_id: str, reason: str) -> None:
        stream = self._streams.by_id.get(stream_id)
        if stream is not None and stream.session.state is not ReceiverState.ORPHANED:
            self._streams.run(stream, stream.session.lost(PeerLost(reason), self._service.now()), is_decided=True)
            self._streams.plan(self._area)

    def _end_quietly(self, stream_id: str, error: TransferError) -> None:
        stream = self._streams.by_id.get(stream_id)
        if stream is not None:
            self._streams.run(stream, [a for a in stream.session.fail(error) if not isinstance(a, Failed)])
            self._streams.plan(self._area)
        else:
            self._forget_ticket(stream_id)

    def _forget_ticket(self, stream_id: str) -> None:
        with self._lock:
            self._tickets.discard(stream_id)


def _told(session: ReceiverSession, message: StreamMessage, now: float) -> Sequence[Any]:
    if isinstance(message, Probe):
        return session.probe(message, now)
    if isinstance(message, Announce):
        return session.announce(message, now)
    if isinstance(message, Revoked):
        return session.revoked(message, now)
    assert isinstance(message, Abort)
    return session.aborted(message, now)
