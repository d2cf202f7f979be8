"""StreamReceiver: the shell round receiver sessions: service, pool, buffers and clock.

Owns the receive pool of one worker. Sessions decide, this class executes; everything runs on the service's I/O
thread except the methods users call, which only post to it.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from transfer.actions import (
    Announced,
    Deliver,
    Dropped,
    Failed,
    Finished,
    FreeBlocks,
    Place,
    ReceiverAction,
    Send,
    StreamStats,
    Timers,
)
from transfer.block_pool import BlockPool
from transfer.buffers import PlaneBuffers, Tensor
from transfer.config import TransferConfig
from transfer.connection import Connection
from transfer.errors import EndpointClosed, LocalProtocolError, Overloaded, PeerLost, StreamAborted, TransferError
from transfer.grant_planner import GrantPlanner
from transfer.messages import Abort, Announce, Block, Body, Close, Open, StreamMessage
from transfer.receiver_session import ReceiverSession
from transfer.service import Service
from transfer.state import TERMINAL, ReceiverState
from transfer.strays import Strays
from transfer.tensors import PlaneSpec, check_block_bytes
from transfer.ticket import Ticket

logger = logging.getLogger(__name__)


class StreamListener(Protocol):
    """The consumer of one stream. Called on the I/O thread; must not block.

    After on_complete, on_failed, or an abort() or close() of its own, nothing more is called.
    """

    def on_announce(self, total_rows: int, items: Sequence[Body]) -> None:
        """The totals are known: reserve room, then admit()."""

    def on_rows(self, first_row: int, planes: Mapping[str, Tensor]) -> None:
        """The next rows, in order: views [n, *row_shape]. Copy them now; their block is freed on return."""

    def on_complete(self, stats: StreamStats) -> None:
        """Every row was handed over."""

    def on_failed(self, error: TransferError) -> None:
        """The stream is over without all its rows."""


@dataclass(slots=True)
class _Entry:
    session: ReceiverSession
    listener: StreamListener
    age: int
    connection: Connection | None = None


class StreamReceiver:
    """Receives streams of fixed `planes` into one pool of blocks. ConfigError when a block fits no message."""

    def __init__(
        self, service: Service, config: TransferConfig, planes: Sequence[PlaneSpec], device: str = "cpu"
    ) -> None:
        check_block_bytes(planes, config)
        self._service = service
        self._config = config
        self._planes = tuple(planes)
        self._pool = BlockPool(config.num_pool_blocks, config.block_size)
        self._buffers = PlaneBuffers(config.num_pool_blocks, config.block_size, self._planes, device)
        self._planner = GrantPlanner()
        self._timers = Timers.of(config)
        self._streams: dict[str, _Entry] = {}
        self._tickets: set[str] = set()  # streams open for their consumer; guarded by the lock
        self._lock = threading.Lock()
        self._ages = 0
        self._dropped: Counter[str] = Counter()
        self._strays = Strays(self._dropped)
        self._totals: Counter[str] = Counter()
        service.attach((Open, Announce, Block, Abort), self)

    # -- any thread -----------------------------------------------------------------------------------------------

    def open(self, ticket: Ticket, listener: StreamListener) -> None:
        """Expect the stream of `ticket`; its default blocks are granted when its sender opens it.

        Raises LocalProtocolError when the stream is open here, Overloaded beyond max_streams, EndpointClosed.
        """
        with self._lock:
            if ticket.stream_id in self._tickets:
                raise LocalProtocolError(f"stream {ticket.stream_id} is open here already")
            if len(self._tickets) >= self._config.max_streams:
                raise Overloaded(f"{len(self._tickets)} streams are open: raise max_streams, or try later")
            self._tickets.add(ticket.stream_id)
        try:
            self._service.post(lambda: self._register(ticket, listener))
        except EndpointClosed:
            self._forget_ticket(ticket.stream_id)
            raise

    def admit(self, stream_id: str) -> None:
        """The consumer has room for every announced row: hand them over as they come. Unknown streams are ignored."""
        self._service.post(lambda: self._admit(stream_id))

    def abort(self, stream_id: str, code: str, message: str) -> None:
        """End a stream; the sender gets the error, the listener is not called again. Unknown streams are ignored."""
        self._service.post(lambda: self._end_quietly(stream_id, StreamAborted(code, message)))

    def close(self, stream_id: str) -> None:
        """The consumer is done with a stream, complete or not."""
        self.abort(stream_id, "Cancelled", "the receiver no longer wants the stream")

    def stats(self) -> dict[str, int]:
        """The ledger (zero when nothing is under way), dropped messages by reason, and totals."""
        return {
            "transfer_blocks_in_use": self._pool.num_in_use,
            "transfer_streams_open": len(self._streams),
            "transfer_tickets_open": len(self._tickets),
            "transfer_opens_parked": self._strays.num_parked,
            **{f"transfer_{name}_total": count for name, count in tuple(self._totals.items())},
            **{f"transfer_dropped_{reason}": count for reason, count in tuple(self._dropped.items())},
        }

    # -- the service's side, on the I/O thread --------------------------------------------------------------------

    def on_message(self, connection: Connection, message: StreamMessage, frames: Sequence[memoryview]) -> bool:
        """Open, Announce, Block or Abort of a sender; see service.StreamSide."""
        entry = self._streams.get(message.stream_id)
        now = self._service.now()
        if entry is None:
            reply = self._strays.answer(connection, message, now)
            if reply is not None:
                self._send(connection, reply)
            return not isinstance(message, Abort)  # that one may be for a sender in this process
        if isinstance(message, Open) and entry.connection in (None, connection):
            entry.connection = connection
            self._run(entry, entry.session.open(message, now))
            if entry.session.state is ReceiverState.REGISTERED:
                entry.connection = None  # a stale Open: the right one is still to come
        elif entry.connection != connection:
            if isinstance(message, Abort):
                return False  # as above
            self._dropped["foreign_connection"] += 1
            if isinstance(message, Open):
                self._send(connection, _rejection(message))
            return True
        elif isinstance(message, Block):
            self._run(entry, entry.session.block(message, frames, now))
        elif isinstance(message, Announce):
            self._run(entry, entry.session.announce(message, now))
        elif isinstance(message, Abort):
            self._run(entry, entry.session.aborted(message))
        self._grant_blocks()
        return True

    def on_tick(self, now: float) -> None:
        """Time limits, late acknowledgements, parked opens; see service.StreamSide."""
        for entry in tuple(self._streams.values()):
            actions = entry.session.tick(now)
            if actions:
                self._run(entry, actions)
        self._strays.expire(now)
        self._grant_blocks()

    def on_peer_lost(self, connection: Connection, error: PeerLost) -> None:
        """Streams of a lost peer fail; see service.StreamSide."""
        for entry in tuple(self._streams.values()):
            if entry.connection == connection:
                self._run(entry, entry.session.fail(error, tell_peer=False))
        self._grant_blocks()

    def on_close(self) -> None:
        """Every stream fails with EndpointClosed; see service.StreamSide."""
        error = EndpointClosed("the receiving service was closed")
        for entry in tuple(self._streams.values()):
            self._run(entry, entry.session.fail(error))
        self._strays.clear()

    # -- helpers --------------------------------------------------------------------------------------------------

    def _register(self, ticket: Ticket, listener: StreamListener) -> None:
        self._ages += 1
        config = self._config
        session = ReceiverSession(
            ticket,
            block_size=config.block_size,
            planes=self._planes,
            default_blocks=config.default_blocks,
            credit=config.credit_window_blocks,
            timers=self._timers,
            now=self._service.now(),
        )
        entry = self._streams[ticket.stream_id] = _Entry(session, listener, self._ages)
        self._update_demand(entry)
        parked = self._strays.opened(ticket.stream_id)
        if parked is not None:
            connection, messages = parked
            for message in messages:
                self.on_message(connection, message, ())

    def _admit(self, stream_id: str) -> None:
        entry = self._streams.get(stream_id)
        if entry is None:
            return  # it ended meanwhile
        try:
            self._run(entry, entry.session.admit(self._service.now()))
        except LocalProtocolError:
            logger.exception("stream %s was admitted at the wrong time", stream_id)
        self._grant_blocks()

    def _end_quietly(self, stream_id: str, error: TransferError) -> None:
        entry = self._streams.get(stream_id)
        if entry is not None:
            self._run(entry, [a for a in entry.session.fail(error) if not isinstance(a, Failed)])
            self._grant_blocks()
        else:
            self._forget_ticket(stream_id)

    def _run(self, entry: _Entry, actions: Sequence[ReceiverAction]) -> None:
        session = entry.session
        try:
            for action in actions:
                self._execute(entry, action)
        except Exception as error:
            logger.exception("the consumer of stream %s failed", session.ticket.stream_id)
            failure = StreamAborted("InternalError", f"the stream's consumer failed: {type(error).__name__}")
            self._abandon(entry, failure)
        if session.state in TERMINAL:
            self._remove(entry)
        else:
            self._update_demand(entry)

    def _execute(self, entry: _Entry, action: ReceiverAction) -> None:
        match action:
            case Place(block_id, frames):
                self._buffers.place(block_id, frames)
                self._totals["blocks_received"] += 1
            case Deliver(block_id, first_row, num_rows):
                entry.listener.on_rows(first_row, self._buffers.rows(block_id, num_rows))
            case FreeBlocks(block_ids):
                self._pool.free_blocks(entry.session.ticket.stream_id, block_ids)
            case Send(message):
                if isinstance(message, (Close, Abort)) and entry.session.state in TERMINAL:
                    self._strays.ended(message)
                if entry.connection is not None:
                    self._send(entry.connection, message)
            case Announced(total_rows, items):
                entry.listener.on_announce(total_rows, items)
            case Dropped(reason):
                self._dropped[reason] += 1
            case Finished(stats):
                self._remove(entry)
                self._totals["streams_completed"] += 1
                entry.listener.on_complete(stats)
            case Failed(error):
                self._remove(entry)
                self._totals["streams_failed"] += 1
                entry.listener.on_failed(error)

    def _abandon(self, entry: _Entry, error: TransferError) -> None:
        """The consumer raised: end its stream whatever state the actions were in."""
        session = entry.session
        session.fail(error, tell_peer=False)
        self._pool.free_owner(session.ticket.stream_id)
        abort = session.abort_message(error)
        self._strays.ended(abort)
        if entry.connection is not None:
            self._send(entry.connection, abort)
        self._remove(entry)
        self._totals["streams_failed"] += 1
        try:
            entry.listener.on_failed(error)
        except Exception:
            logger.exception("on_failed of stream %s failed", session.ticket.stream_id)

    def _remove(self, entry: _Entry) -> None:
        stream_id = entry.session.ticket.stream_id
        if self._streams.get(stream_id) is entry:
            del self._streams[stream_id]
            self._planner.remove(stream_id)
            self._forget_ticket(stream_id)

    def _forget_ticket(self, stream_id: str) -> None:
        with self._lock:
            self._tickets.discard(stream_id)

    def _update_demand(self, entry: _Entry) -> None:
        session = entry.session
        self._planner.update(
            session.ticket.stream_id,
            rank=(not session.admitted, entry.age),
            wanted=session.wanted_blocks,
            empty=session.num_held == 0 and session.may_need_blocks,
        )

    def _grant_blocks(self) -> None:
        if not self._pool.num_free:
            return
        now = self._service.now()
        for stream_id, count in self._planner.plan(self._pool.num_free).items():
            entry = self._streams[stream_id]
            allocation = self._pool.allocate(count * self._config.block_size, stream_id)
            self._run(entry, entry.session.grant(allocation.block_ids, now))

    def _send(self, connection: Connection, message: StreamMessage) -> None:
        try:
            self._service.endpoint.send(connection, message)
        except TransferError as error:  # as if lost on the way: the sender's probes ask again
            self._dropped["unsent"] += 1
            logger.info("a %s of stream %s did not leave: %s", type(message).__name__, message.stream_id, error)


def _rejection(message: Open) -> Abort:
    text = "the stream is bound to another sender"
    return Abort(stream_id=message.stream_id, epoch=message.epoch, code="TicketRejected", message=text)
