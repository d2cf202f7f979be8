"""ReceiveAreas: where the streams of one receiver put their blocks: the pool for the wire, or their sender's segment.

Decided once for every epoch of a stream: with the Accept where the sender has the segment already, with its answer
(`Attached`) where it is asked to map it, and until then the stream is granted nothing. Runs on the I/O thread.
"""

from __future__ import annotations

from collections.abc import Iterator

from transfer.connection import Connection
from transfer.errors import PeerLost
from transfer.memory.receive_area import ReceiveArea
from transfer.memory.segment_area import SegmentArea
from transfer.memory.segment_host import SegmentHost
from transfer.protocol.messages import Attached, Body, Filled, Open, Released
from transfer.protocol.ticket import open_is_proven
from transfer.streams.incoming_streams import IncomingStream, IncomingStreams

NO_SEGMENT = PeerLost("the memory shared with the sender is lost: its process ended, or let go of it")


class ReceiveAreas:
    """The wire's area, and the segments of `host` (None: everything goes over the wire)."""

    def __init__(self, wire: ReceiveArea, host: SegmentHost | None, streams: IncomingStreams) -> None:
        self.wire = wire
        self._host = host
        self._streams = streams
        if host is not None:
            host.on_lost = self.lost

    @property
    def payload(self) -> tuple[str, ...]:
        """The ways that payload can come."""
        return ("wire",) if self._host is None else ("shm", "wire")

    def invite(self, stream: IncomingStream, connection: Connection, message: Open) -> Body | None:
        """Before the session sees an Open: the segment to offer with the Accept, if any."""
        session = stream.session
        if self._host is None or session.facts.opened is not None or not open_is_proven(session.ticket, message):
            return None
        body, earlier = None, stream.invited
        invitation = self._host.invite(connection, session.ticket) if "shm" in message.offer.payload else None
        if invitation is not None:
            body, stream.invited = invitation
        else:
            stream.invited = None
        if earlier is not None and earlier not in (stream.invited, stream.area):
            earlier.end(message.stream_id)
        return body

    def opened(self, stream: IncomingStream) -> None:
        """A session took the first Open of an epoch: from here on its blocks are in the new sender's area."""
        invited, stream.placed_epoch = stream.invited, stream.session.ticket.epoch
        if stream.area is not None and stream.area is not invited:
            stream.area.end(stream.session.ticket.stream_id)
        if invited is None:
            self._use(stream, self.wire)
        elif invited.is_attached:
            self._use(stream, invited)
        else:
            stream.area = None

    def restarted(self) -> None:
        """Sessions were built anew: some may have been opened, and the loop died before `opened` was heard here."""
        for stream in tuple(self._streams.by_id.values()):
            facts = stream.session.facts
            if facts.opened is not None and stream.placed_epoch != facts.ticket.epoch:
                self.opened(stream)
        for area in () if self._host is None else self._host.areas():
            if not area.is_open:
                self.lost(area)  # not all of its streams may have heard

    def attached(self, stream: IncomingStream, message: Attached, now: float) -> None:
        """The sender mapped the segment it was invited to, or says that it cannot."""
        session, invited, generation = stream.session, stream.invited, message.generation
        if message.epoch != session.ticket.epoch:
            self._streams.dropped["stale_epoch"] += 1
            return
        if self._host is None or stream.area is self.wire or (stream.area is not None and generation):
            return  # known
        self._host.answered(message.stream_id)
        if generation == 0 and session.can_withdraw_segment:
            stream.area = stream.invited = None
            if invited is not None:
                self._host.declined(message.stream_id, invited)
            self._use(stream, self.wire)
        elif stream.area is None and invited is None:
            self._streams.run(stream, session.withdraw_segment())  # it did not hear that yet
        elif stream.area is None and invited is not None and generation == invited.segment.generation:
            invited.is_attached = True
            self._use(stream, invited)
        else:
            self._streams.run(stream, session.lost(NO_SEGMENT, now), is_decided=True)  # it has another, or lost it

    def filled(self, stream: IncomingStream, message: Filled, now: float) -> None:
        """Blocks that the sender wrote where they are."""
        if isinstance(stream.area, SegmentArea):
            self._streams.run(stream, stream.session.filled(message, stream.area.is_filled, now))
        else:
            self._streams.dropped["wrong_path"] += 1

    def released(self, connection: Connection, message: Released) -> None:
        """A sender let go of the slots of a stream that ended."""
        if self._host is not None:
            self._host.released(connection, message.stream_id, message.epoch)

    def ended(self, stream_id: str) -> None:
        """A stream is over, or its segment: nobody may fetch one for it any more."""
        if self._host is not None:
            self._host.answered(stream_id)

    def lost(self, area: SegmentArea) -> None:
        """A segment is abandoned: who was granted nothing of it goes over the wire, who was has lost its sender."""
        now = self._streams.now()
        for stream in tuple(self._streams.by_id.values()):
            if stream.connection is None or area is not (stream.area or stream.invited):
                continue
            if stream.session.can_withdraw_segment:
                self._withdraw(stream, area)
            else:
                self._streams.run(stream, stream.session.lost(NO_SEGMENT, now), is_decided=True)
        self.plan()

    def peer_lost(self, connection: Connection) -> None:
        """A peer is gone, and nobody writes its segments any more that we would believe."""
        if self._host is not None:
            self._host.drop(connection)

    def tick(self, now: float) -> None:
        """Close what is not used; senders that did not let go of their slots hear again that their epoch is over."""
        if self._host is None:
            return
        for connection, stream_id, epoch in self._host.tick(now, self._is_over):
            self._streams.send(connection, self._streams.strays.last_word(stream_id, epoch))

    def close(self) -> None:
        """Let go of every segment."""
        if self._host is not None:
            self._host.close()

    def plan(self) -> None:
        """Grant what is free, everywhere."""
        for area in self._all():
            self._streams.plan(area)

    def stats(self) -> dict[str, int]:
        """Blocks in use, and segments."""
        host = self._host
        in_use = sum(area.pool.num_in_use for area in self._all())
        segments = {"transfer_segments_open": 0} if host is None else host.stats()
        return {"transfer_blocks_in_use": in_use, **segments}

    def _is_over(self, stream_id: str, epoch: int) -> bool:
        stream = self._streams.by_id.get(stream_id)
        return stream is None or stream.session.ticket.epoch > epoch

    def _withdraw(self, stream: IncomingStream, area: SegmentArea) -> None:
        """Its sender is to go over the wire, and is granted nothing before it said that it does."""
        actions = stream.session.withdraw_segment()
        stream.area = stream.invited = None
        area.end(stream.session.ticket.stream_id)
        self.ended(stream.session.ticket.stream_id)
        self._streams.run(stream, actions, is_decided=True)

    def _use(self, stream: IncomingStream, area: ReceiveArea) -> None:
        stream.area, stream.wants_nothing = area, False
        stream.session.place_in(shared_memory=area is not self.wire)
        stream.record = stream.session.record()
        self._streams.settle(stream)

    def _all(self) -> Iterator[ReceiveArea]:
        yield self.wire
        if self._host is not None:
            yield from self._host.areas()
