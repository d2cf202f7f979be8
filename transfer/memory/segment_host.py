"""SegmentHost: the segments of one receiver, one for each peer on this host that can map it.

Runs on the service's I/O thread; only the news that a peer is gone comes from the server's. A segment is made for the
first stream of a peer, serves all its streams, and is closed when none came for a while. A peer that does not say that
it let go of the slots of streams that ended is asked again and again. While it is silent for long, its next streams get
a new segment and those in the old one go on there; where these have no slot left to go on with, or the peer is lost,
the segment is abandoned: nobody gets it any more, and who was granted nothing of it goes over the wire.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from transfer.config import TransferConfig
from transfer.connection import Connection
from transfer.errors import EndpointClosed, TransferError
from transfer.memory.segment_area import SegmentArea
from transfer.memory.segment_server import SegmentOffer, SegmentServer
from transfer.memory.segments import SegmentLayout, is_supported
from transfer.protocol.messages import Body
from transfer.protocol.ticket import Ticket
from transfer.service.service import Service
from transfer.tensors import PlaneSpec

MAX_SEGMENTS = 256
MAX_PEER_SEGMENTS = 4  # of one peer that does not let go of slots
RELEASE_S = 2.0  # how long the sender of streams that ended may take to let go of their slots
STUCK_S = 10.0  # and how long where other streams can do nothing without them
RETRY_S = 30.0  # how long nothing is tried after memory could not be made or offered

logger = logging.getLogger(__name__)


class Server(Protocol):
    """A SegmentServer, or what stands for it."""

    @property
    def path(self) -> str: ...
    def offer(self, offer: SegmentOffer) -> None: ...
    def withdraw(self, stream_id: str) -> None: ...
    def hang_up(self, generation: int) -> None: ...
    def close(self) -> None: ...
    def stats(self) -> dict[str, int]: ...


class SegmentHost:
    """Segments by peer. `open_server(folder)` starts what passes them, `make_area(layout)` makes one (a simulation has
    memory and passing of its own); `on_lost(area)` runs when its peer is gone.
    """

    def __init__(
        self,
        service: Service,
        config: TransferConfig,
        planes: Sequence[PlaneSpec],
        *,
        folder: Path,
        open_server: Callable[[Path], Server] = SegmentServer,
        make_area: Callable[[SegmentLayout], SegmentArea] | None = None,
    ) -> None:
        self._service = service
        self._config = config
        self._layout = SegmentLayout(
            num_slots=config.num_segment_blocks, block_size=config.block_size, planes=tuple(planes)
        )
        self._folder = folder
        self.on_lost: Callable[[SegmentArea], None] = lambda area: None
        self._open_server = open_server
        self._make_area = make_area or partial(SegmentArea, has_checksums=config.shm_checksum)
        self._server: Server | None = None
        self._is_closed = False
        self._not_before = 0.0  # it did not work here, and is not tried again until then
        self._trouble = ""  # why
        self._current: dict[Connection, SegmentArea] = {}
        self._peers: dict[int, tuple[SegmentArea, Connection]] = {}  # every segment that is not closed, by generation
        self._num_abandoned = 0

    # -- streams --------------------------------------------------------------------------------------------------

    def invite(self, connection: Connection, ticket: Ticket) -> tuple[Body, SegmentArea] | None:
        """What the peer's segment is and where it gets it; the stream of `ticket` counts as in it from now on.

        None where there is none to be had: the payload then goes over the wire.
        """
        if self._is_closed or self._service.now() < self._not_before:
            return None
        area = self._current.get(connection)
        try:
            if self._server is None:
                self._server = self._open_server(self._folder)
            if area is None or not area.is_open or area.silence_s(self._service.now()) >= RELEASE_S:
                num_of_peer = sum(peer == connection for _, peer in self._peers.values())
                if len(self._peers) >= MAX_SEGMENTS or num_of_peer >= MAX_PEER_SEGMENTS:
                    return None
                area = self._make_area(self._layout)
        except (TransferError, OSError, RuntimeError) as error:  # no descriptors, no threads
            is_known, self._trouble = self._trouble == str(error), str(error)
            level = logging.DEBUG if is_known else logging.WARNING
            logger.log(level, "payload goes over the wire, for shared memory does not work here: %s", error)
            self._not_before = self._service.now() + RETRY_S
            return None
        generation, server = area.segment.generation, self._server
        self._current[connection] = area
        self._peers[generation] = area, connection
        area.bind(ticket)
        if not area.is_attached:
            offer = SegmentOffer(
                ticket=ticket,
                generation=generation,
                fd=area.segment.fd,
                num_bytes=self._layout.num_bytes,
                on_lost=lambda: self._later(lambda: self._abandon(generation)),
            )
            server.offer(offer)
        body: Body = {
            "path": server.path,
            "generation": generation,
            "num_slots": self._layout.num_slots,
            "checksum": area.has_checksums,
        }
        return body, area

    def answered(self, stream_id: str) -> None:
        """The stream's sender answered, or the stream is over: nobody fetches a segment with its ticket any more."""
        if self._server is not None:
            self._server.withdraw(stream_id)

    def declined(self, stream_id: str, area: SegmentArea) -> None:
        """The stream's sender cannot use its segment; one that nobody uses goes at once."""
        area.end(stream_id)
        if not area.is_attached and not area.num_streams and area.segment.generation in self._peers:
            self._close(area.segment.generation)

    def released(self, connection: Connection, stream_id: str, epoch: int) -> None:
        """The peer let go of the slots of a stream that ended."""
        for area, peer in self._peers.values():
            if peer == connection:
                area.release(stream_id, epoch)

    # -- ends -----------------------------------------------------------------------------------------------------

    def drop(self, connection: Connection) -> None:
        """A peer was lost."""
        for generation, (_, peer) in tuple(self._peers.items()):
            if peer == connection:
                self._abandon(generation)

    def tick(self, now: float, is_over: Callable[[str, int], bool]) -> list[tuple[Connection, str, int]]:
        """Close what was not used for a while, or is not let go of. Whom to ask whether it let go: peer, stream, epoch.

        `is_over(stream_id, epoch)`: the receiver ended that epoch.
        """
        asked: list[tuple[Connection, str, int]] = []
        for generation, (area, connection) in tuple(self._peers.items()):
            asked += [(connection, stream_id, epoch) for stream_id, epoch in area.unheard(now, is_over)]
            if area.num_streams:
                if area.is_stuck and area.silence_s(now) >= STUCK_S:
                    self._abandon(generation)
                continue
            if area.idle_since is None:
                area.idle_since = now
            idle_s = now - area.idle_since
            limit_s = RELEASE_S if area.book.num_fenced else self._config.idle_timeout_s
            if idle_s >= limit_s or not area.is_open:
                self._close(generation)
        return asked

    def close(self) -> None:
        """Let go of everything."""
        for generation in tuple(self._peers):
            self._close(generation)
        if self._server is not None:
            self._server.close()
            self._server = None
        self._is_closed = True

    # -- what there is --------------------------------------------------------------------------------------------

    def areas(self) -> Iterator[SegmentArea]:
        """Every segment that is not closed."""
        return (area for area, _ in tuple(self._peers.values()))

    def stats(self) -> dict[str, int]:
        """Segments that streams use or hold slots of, those kept for the next stream, and totals."""
        areas, server = tuple(self.areas()), self._server
        num_open = sum(area.num_streams > 0 or area.book.num_fenced > 0 for area in areas)
        return {
            "transfer_segments_open": num_open,
            "transfer_segments_cached": len(areas) - num_open,
            "transfer_slots_fenced": sum(area.book.num_fenced for area in areas),
            "transfer_segments_abandoned_total": self._num_abandoned,
            "transfer_segment_requests_refused_total": 0 if server is None else server.stats()["segments_refused"],
        }

    # -- helpers --------------------------------------------------------------------------------------------------

    def _later(self, callback: Callable[[], None]) -> None:
        with contextlib.suppress(EndpointClosed):
            self._service.post(callback)

    def _abandon(self, generation: int) -> None:
        found = self._peers.get(generation)
        if found is None:
            return
        area, connection = found
        if area.is_open:
            self._num_abandoned += 1
            area.book.abandon()
            self.on_lost(area)
        if self._current.get(connection) is area:
            del self._current[connection]
        if not area.num_streams and generation in self._peers:
            self._close(generation)

    def _close(self, generation: int) -> None:
        area, connection = self._peers.pop(generation)
        if self._current.get(connection) is area:
            del self._current[connection]
        if area.book.num_fenced and area.is_open:
            self._num_abandoned += 1
        if self._server is not None:
            self._server.hang_up(generation)
        area.close()


def host_for(service: Service, config: TransferConfig, planes: Sequence[PlaneSpec]) -> SegmentHost | None:
    """The host of a receiver, where peers can be on the same host and shared memory is wanted; else None."""
    address = service.endpoint.address
    if not config.shared_memory or not is_supported() or not address.startswith(("ipc://", "tcp://")):
        return None
    if address.startswith("ipc://"):
        folder = Path(address.removeprefix("ipc://")).parent
    else:
        folder = Path(tempfile.gettempdir()) / f"tandem-{os.geteuid()}"
    return SegmentHost(service, config, planes, folder=folder)
