"""IncomingStreams: the open streams of one receiver, and the execution of what their sessions ask for.

Owns each stream's session, listener, connection and record; knows how to send, place, hand on and free. Everything
here runs on the service's I/O thread.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from transfer.connection import Connection
from transfer.errors import StreamAborted, TransferError
from transfer.memory.buffers import Tensor
from transfer.memory.receive_area import ReceiveArea
from transfer.memory.segment_area import SegmentArea
from transfer.protocol.actions import (
    Announced,
    Deliver,
    Dropped,
    Failed,
    Finished,
    FreeBlocks,
    Place,
    Placed,
    ReceiverAction,
    Restarted,
    Send,
    StreamStats,
)
from transfer.protocol.messages import Abort, Ack, Body, Close, StreamMessage
from transfer.protocol.receiver_session import ReceiverSession
from transfer.protocol.schedule import Schedule
from transfer.protocol.state import TERMINAL, ReceiverState
from transfer.protocol.strays import Strays
from transfer.protocol.stream_record import StreamRecord
from transfer.service.service import Service

logger = logging.getLogger(__name__)

# Shown from the start: a rate needs the zero before the first.
TOTALS = ("blocks_received", "revocations", "streams_completed", "streams_failed", "streams_restarted")


class StreamListener(Protocol):
    """The consumer of one stream. Called on the I/O thread; must not block.

    After on_complete, on_failed, or an abort() or close() of its own, nothing more is called.
    """

    def on_announce(self, total_rows: int, items: Sequence[Body]) -> None:
        """The totals are known: reserve room, then admit()."""

    def on_rows(self, first_row: int, planes: Mapping[str, Tensor]) -> None:
        """The next rows, in order: views [n, *row_shape]. Copy them now; their block is freed on return."""

    def on_restart(self) -> None:
        """Another sender starts from row 0: forget the totals and every row; on_announce comes again.

        Only for streams opened with take_over_s.
        """

    def on_complete(self, stats: StreamStats) -> None:
        """Every row was handed over."""

    def on_failed(self, error: TransferError) -> None:
        """The stream is over without all its rows."""


class NobodyListens:
    """In the place of a listener that gave its stream up: it hears nothing more, whatever still happens. error: why."""

    def __init__(self, error: TransferError) -> None:
        self.error = error

    def on_announce(self, total_rows: int, items: Sequence[Body]) -> None:
        """See StreamListener."""

    def on_rows(self, first_row: int, planes: Mapping[str, Tensor]) -> None:
        """See StreamListener."""

    def on_restart(self) -> None:
        """See StreamListener."""

    def on_complete(self, stats: StreamStats) -> None:
        """See StreamListener."""

    def on_failed(self, error: TransferError) -> None:
        """See StreamListener."""


@dataclass(slots=True)
class IncomingStream:
    """One open stream. `record` and `delivered` are what a restart of the loop goes on from."""

    session: ReceiverSession
    listener: StreamListener
    turn: int  # of those that wait for blocks, the earliest comes first
    area: ReceiveArea | None  # None while its sender may still say whether it can use a segment
    record: StreamRecord
    connection: Connection | None = None
    former: Connection | None = None  # of the sender before, which may not know yet that its epoch is over
    delivered: int = 0  # blocks handed to the listener
    num_restarts: int = 0  # told to the listener
    invited: SegmentArea | None = None  # what the sender was asked to map
    placed_epoch: int = 0  # the last one of which it is known where its blocks are to be, or who is asked
    wants_nothing: bool = False  # and its area knows: admitted, and all it needs was granted

    @property
    def has_sealed_path(self) -> bool:
        """Whether its Blocks and Probes come over the path of sealed payloads, and not over the connection."""
        accept = self.session.facts.accept
        is_shared = isinstance(self.area, SegmentArea)  # then there are no payloads on any path
        return accept is not None and accept.data_address is not None and not is_shared


class IncomingStreams:
    """Streams by id; `on_end(stream_id)` runs when one is over."""

    def __init__(self, service: Service, on_end: Callable[[str], None]) -> None:
        self.by_id: dict[str, IncomingStream] = {}
        self.dropped: Counter[str] = Counter()
        self.totals: dict[str, int] = dict.fromkeys(TOTALS, 0)
        self.strays = Strays(self.dropped)
        self.turns = count(1)
        self._service = service
        self._on_end = on_end
        self._schedule = Schedule()

    def now(self) -> float:
        """The time, for events that do not come with one."""
        return self._service.now()

    def add(self, stream: IncomingStream) -> None:
        """A stream is expected from now on."""
        self.by_id[stream.session.ticket.stream_id] = stream
        self.settle(stream)

    def run(self, stream: IncomingStream, actions: Sequence[ReceiverAction], *, is_decided: bool = False) -> None:
        """Do what a session asks for, in order. A listener that raises ends its stream.

        `is_decided`: the event came from this side and would not come again, so a restart goes on after it.
        """
        session = stream.session
        if is_decided:
            stream.record = session.record()
        try:
            for action in actions:
                self._execute(stream, action)
        except Exception as error:
            logger.exception("the consumer of stream %s failed", session.ticket.stream_id)
            failure = StreamAborted("InternalError", f"the stream's consumer failed: {type(error).__name__}")
            self._abandon(stream, failure)
        state = session.facts.state
        if state in TERMINAL:
            self._remove(stream)
            return
        if state is ReceiverState.ORPHANED:
            stream.former, stream.connection = stream.connection or stream.former, None
        if not actions or not isinstance(actions[0], (Place, Placed)):
            stream.record = session.record()
            stream.wants_nothing = False
        self.settle(stream)

    def tick(self, now: float) -> None:
        """What is due: limits in time, late acknowledgements, early Opens to forget."""
        for stream_id in self._schedule.take_due(now):
            stream = self.by_id.get(stream_id)
            if stream is not None:
                self.run(stream, stream.session.tick(now))
        self.strays.expire(now)

    def plan(self, area: ReceiveArea) -> None:
        """Grant what is free, and ask back what others need more."""
        while True:
            grants, revocations = area.plan()
            if not grants and not revocations:
                return
            now = self._service.now()
            for stream_id, num_blocks in grants.items():
                stream = self.by_id[stream_id]
                self.run(stream, stream.session.grant(area.allocate(stream_id, num_blocks), now))
            for stream_id, num_blocks in revocations.items():
                stream = self.by_id[stream_id]
                actions = stream.session.revoke(num_blocks, now)
                self.totals["revocations"] += bool(actions)
                if stream.session.has_yielded and not stream.session.window.held:
                    stream.turn = next(self.turns)
                self.run(stream, actions)
            if not revocations:
                return

    def restart(self, begin: Callable[[IncomingStream], ReceiverSession], now: float) -> None:
        """Build every session anew from its record; the pool forgets what no record holds."""
        self._schedule = Schedule()
        for stream_id, stream in tuple(self.by_id.items()):
            if stream.record.facts.state is ReceiverState.FAILED:
                self._abandon(stream, StreamAborted("InternalError", "the receiving loop died while the stream failed"))
                continue
            stream.session = begin(stream)
            actions = stream.session.restore(stream.record, stream.delivered, now)
            window = stream.session.window
            held = [*window.held.values(), *(a.block_id for a in actions if isinstance(a, Deliver))]
            if stream.area is not None:
                held += () if window.pending is None else window.pending.withheld
                # what an epoch that goes on gave back was handed on, or its sender said that it will not fill it
                is_over = stream.record.facts.state is ReceiverState.ORPHANED
                stream.area.retain(stream_id, held, fenced=is_over)
            self.run(stream, actions)

    def sender_of(self, message: StreamMessage) -> Connection | None:
        """Whose a message on the path of sealed payloads says it is, if that can be; its seal has still to prove it."""
        stream = self.by_id.get(message.stream_id)
        if stream is None:
            return self.strays.sender_of(message.stream_id)
        if message.epoch == stream.session.facts.ticket.epoch:
            return stream.connection if stream.has_sealed_path else None
        return stream.former

    def send(self, connection: Connection, message: StreamMessage) -> None:
        """Send; what cannot leave now counts as lost on the way: the sender's probes ask again."""
        try:
            self._service.endpoint.send(connection, message)
        except TransferError as error:
            self.dropped["unsent"] += 1
            logger.info("a %s of stream %s did not leave: %s", type(message).__name__, message.stream_id, error)

    # -- helpers --------------------------------------------------------------------------------------------------

    def settle(self, stream: IncomingStream) -> None:
        """Something about a stream changed: its record, what it wants and when it is due follow."""
        session = stream.session
        if stream.area is not None and not stream.wants_nothing:
            stream.area.update(session, stream.turn)
            stream.wants_nothing = session.wants_nothing
        self._schedule.at(session.facts.ticket.stream_id, session.due())

    def _execute(self, stream: IncomingStream, action: ReceiverAction) -> None:
        area = stream.area
        match action:
            case Place(block_id, frames):
                assert area is not None, "only granted blocks are placed"
                if frames:
                    area.place(block_id, frames)
                stream.record = stream.session.record()  # now it is stored: only then it may be acknowledged
                self.totals["blocks_received"] += 1
            case Placed(num_blocks):
                stream.record = stream.session.record()
                self.totals["blocks_received"] += num_blocks
            case Deliver(index, block_id, first_row, num_rows, num_blocks):
                assert area is not None, "only granted blocks are handed on"
                stream.listener.on_rows(first_row, area.rows(block_id, num_rows))
                stream.delivered = index + 1
                area.free(stream.session.ticket.stream_id, range(block_id, block_id + num_blocks), fenced=False)
            case FreeBlocks(block_ids, fenced):
                stream.record = stream.session.record()  # first: a restart must not count on what is given away
                assert area is not None, "only granted blocks come back"
                area.free(stream.session.ticket.stream_id, block_ids, fenced=fenced)
            case Send(message):
                if not isinstance(message, Ack):  # what an Ack says was recorded when it was stored
                    stream.record = stream.session.record()  # first: the peer will count on it
                if isinstance(message, (Close, Abort)) and stream.session.state in TERMINAL:
                    self.strays.ended(message, stream.connection)
                if stream.connection is not None:
                    self.send(stream.connection, message)
            case Announced(total_rows, items):
                stream.record = stream.session.record()  # first: a restart must not tell the consumer twice
                stream.listener.on_announce(total_rows, items)
            case Restarted():
                stream.delivered = 0
                stream.num_restarts += 1
                stream.record = stream.session.record()
                self.totals["streams_restarted"] += 1
                stream.listener.on_restart()
            case Dropped(reason):
                self.dropped[reason] += 1
            case Finished(stats):
                self._remove(stream)
                self.totals["streams_completed"] += 1
                stream.listener.on_complete(stats)
            case Failed(error):
                self._remove(stream)
                self.totals["streams_failed"] += 1
                stream.listener.on_failed(error)

    def _abandon(self, stream: IncomingStream, error: TransferError) -> None:
        """The consumer raised: end its stream whatever state the actions were in."""
        session = stream.session
        session.fail(error, tell_peer=False)
        abort = session.abort_message(error)
        self.strays.ended(abort, stream.connection)
        if stream.connection is not None:
            self.send(stream.connection, abort)
        self._remove(stream)
        self.totals["streams_failed"] += 1
        try:
            stream.listener.on_failed(error)
        except Exception:
            logger.exception("on_failed of stream %s failed", session.ticket.stream_id)

    def _remove(self, stream: IncomingStream) -> None:
        stream_id = stream.session.ticket.stream_id
        if self.by_id.get(stream_id) is stream:
            for area in {stream.area, stream.invited} - {None}:  # first: where the loop dies here, the end comes again
                assert area is not None
                area.end(stream_id)
            del self.by_id[stream_id]
            self._schedule.remove(stream_id)
            self._on_end(stream_id)
