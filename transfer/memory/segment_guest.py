"""SegmentGuest: the segments of receivers on this host that one sender has mapped.

A receiver's invitation names its segment and where to get it. Getting it may wait for another process, so a thread of
its own does that; everything else runs on the service's I/O thread. A segment is kept for the streams to come, until
its receiver hangs up or its connection is given up; a receiver may have a few, for new streams get a new one while
slots of the old one are not let go of. Where it cannot be had, the next streams to that receiver do not ask again for
a while: their payload goes over the wire.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from transfer.config import TransferConfig
from transfer.connection import Connection
from transfer.errors import EndpointClosed, RemoteProtocolError, TicketRejected, TransferError
from transfer.memory.buffers import PlaneBuffers
from transfer.memory.segment_passing import Lifeline, fetch, is_lifeline_over
from transfer.memory.segments import Segment, SegmentLayout, is_supported
from transfer.protocol.messages import Body
from transfer.protocol.negotiate import Offer
from transfer.protocol.ticket import Ticket
from transfer.service.service import Service

RETRY_S = 30.0  # how long a receiver whose segment could not be had is not asked again
REFUSED_S = 2.0  # and how long one that is there, and refused: that segment may have been given up meanwhile
MAX_PATH_CHARS = 108
MAX_MAPPED = 8  # of one receiver

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class MappedSegment:
    """A receiver's segment in this process; kept by whoever uses it."""

    segment: Segment
    buffers: PlaneBuffers
    has_checksums: bool
    lifeline: Lifeline

    @property
    def generation(self) -> int:
        """The segment's."""
        return self.segment.generation

    def close(self) -> None:
        """Hang up. The memory stays for the streams that still hold this."""
        self.lifeline.close()


class Fetched(Protocol):
    """A FetchedSegment, or what stands for it."""

    @property
    def lifeline(self) -> Lifeline: ...
    def attach(self, layout: SegmentLayout, generation: int) -> Segment: ...


OnAnswer: TypeAlias = Callable[[MappedSegment | None], None]
Fetch: TypeAlias = Callable[[str, Ticket, int], Fetched]


class SegmentGuest:
    """Mapped segments by connection. `run(job)` runs a job that may wait; `fetch` gets a segment."""

    def __init__(
        self,
        service: Service,
        *,
        is_on: bool,
        fetch: Fetch = fetch,
        run: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self._service = service
        self._is_on = is_on
        self._fetch = fetch
        self._run_job = run or _run_in_thread
        self._mapped: dict[Connection, dict[int, MappedSegment]] = {}  # by generation
        self._waiting: dict[tuple[Connection, int], list[OnAnswer]] = {}
        self._not_before: dict[Connection, float] = {}

    def payload(self, connection: Connection) -> tuple[str, ...]:
        """The ways that payload can take to a receiver; from any thread."""
        if not self._is_on or self._service.now() < self._not_before.get(connection, 0.0):
            return ("wire",)
        return "shm", "wire"

    def accept(self, connection: Connection, ticket: Ticket, body: Body, offer: Offer, on_answer: OnAnswer) -> None:
        """An invitation came: `on_answer(mapped or None)`, at once where that is known. RemoteProtocolError."""
        path, generation, layout, has_checksums = _read_invitation(body, offer)
        of_receiver = self._mapped.get(connection, {})
        if generation in of_receiver:
            on_answer(of_receiver[generation])
            return
        if len(of_receiver) >= MAX_MAPPED:
            on_answer(None)
            return
        waiting = self._waiting.setdefault((connection, generation), [])
        waiting.append(on_answer)
        if len(waiting) > 1:
            return  # another stream is getting it

        def job() -> None:
            found: MappedSegment | None = None
            pause_s = RETRY_S
            try:
                found = self._get(path, ticket, generation, layout, has_checksums)
            except (TransferError, OSError) as error:
                logger.info("payload of stream %s goes over the wire: %s", ticket.stream_id, error)
                pause_s = REFUSED_S if isinstance(error, TicketRejected) else RETRY_S
            except Exception as error:  # whatever it is: those who wait get an answer
                logger.warning("payload for %s goes over the wire: %s", connection.peer, error)
            try:
                self._service.post(lambda: self._answer(connection, generation, found, pause_s))
            except EndpointClosed:
                if found is not None:
                    found.close()

        try:
            self._run_job(job)
        except RuntimeError as error:
            logger.warning("payload for %s goes over the wire: %s", connection.peer, error)
            self._answer(connection, generation, None, RETRY_S)

    def tick(self) -> None:
        """Let go of the segments whose receiver hung up."""
        for connection, of_receiver in tuple(self._mapped.items()):
            for mapped in tuple(of_receiver.values()):
                if is_lifeline_over(mapped.lifeline):
                    mapped.close()
                    del of_receiver[mapped.generation]
            if not of_receiver:
                self.forget(connection)

    def forget(self, connection: Connection) -> None:
        """The connection was given up."""
        self._not_before.pop(connection, None)
        for mapped in self._mapped.pop(connection, {}).values():
            mapped.close()

    def shares_memory(self, connection: Connection) -> bool:
        """Whether a segment of that receiver is mapped."""
        return connection in self._mapped

    def close(self) -> None:
        """Let go of everything."""
        self._is_on = False
        for connection in tuple(self._mapped):
            self.forget(connection)

    @property
    def num_mapped(self) -> int:
        """Segments of receivers that are mapped here."""
        return sum(map(len, self._mapped.values()))

    def _get(
        self, path: str, ticket: Ticket, generation: int, layout: SegmentLayout, has_checksums: bool
    ) -> MappedSegment:
        fetched = self._fetch(path, ticket, generation)
        segment = fetched.attach(layout, generation)
        buffers = PlaneBuffers.over(
            segment.memory, layout.plane_offsets, layout.num_slots, layout.block_size, layout.planes
        )
        return MappedSegment(segment, buffers, has_checksums, fetched.lifeline)

    def _answer(self, connection: Connection, generation: int, found: MappedSegment | None, pause_s: float) -> None:
        waiting = self._waiting.pop((connection, generation), [])
        if found is None:
            self._not_before[connection] = self._service.now() + pause_s
        elif not self._is_on:
            found.close()
            found = None
        else:
            self._mapped.setdefault(connection, {})[generation] = found
        for on_answer in waiting:
            on_answer(found)


def _read_invitation(body: Body, offer: Offer) -> tuple[str, int, SegmentLayout, bool]:
    path, generation, num_slots, checksum = (body.get(key) for key in ("path", "generation", "num_slots", "checksum"))
    if (
        not isinstance(path, str)
        or not path.startswith("/")
        or len(path) > MAX_PATH_CHARS
        or "\0" in path
        or type(generation) is not int
        or not 0 < generation < 1 << 63
        or type(num_slots) is not int
        or type(checksum) is not bool
        or len(body) != 4
    ):
        raise RemoteProtocolError("the receiver's invitation to its segment makes no sense: run equal versions")
    try:
        layout = SegmentLayout(num_slots=num_slots, block_size=offer.block_size, planes=offer.planes)
    except TransferError as error:
        raise RemoteProtocolError(f"the receiver's segment cannot be: {error}") from error
    return path, generation, layout, checksum


def _run_in_thread(job: Callable[[], None]) -> None:
    thread = threading.Thread(target=_quietly, args=(job,), name="fetch segment", daemon=True)
    thread.start()


def _quietly(job: Callable[[], None]) -> None:
    with contextlib.suppress(EndpointClosed):
        job()


def guest_for(service: Service, config: TransferConfig) -> SegmentGuest:
    """The guest of a sender: on where receivers can be on the same host and shared memory is wanted."""
    is_on = config.shared_memory and is_supported() and service.endpoint.address.startswith(("ipc://", "tcp://"))
    return SegmentGuest(service, is_on=is_on)
