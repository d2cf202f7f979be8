"""VirtualPassing: what the kernel is between processes of one machine: it passes segments and ends their lifelines.

Stands for the Unix sockets of `memory.segment_passing` and `memory.segment_server`. Nothing here knows links: who
shares a machine hears of the other's end at once, whatever becomes of messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from transfer.errors import ConfigError, PeerLost, RemoteProtocolError, TicketRejected
from transfer.memory.segment_server import SegmentOffer
from transfer.memory.segments import Segment, SegmentLayout
from transfer.protocol.ticket import Ticket
from transfer.simulation.segments import OnSeal, VirtualMapping, VirtualSegment
from transfer.simulation.timeline import Process


class VirtualLifeline:
    """The connection that shows a sender and a receiver that the other one lives."""

    def __init__(self, guest: Process, server: VirtualServer, offer: SegmentOffer) -> None:
        self.guest = guest
        self.server = server
        self.offer = offer
        self.is_over = False

    def recv(self, num_bytes: int, /) -> bytes:
        """As a socket's that does not block."""
        if not self.is_over:
            raise BlockingIOError
        return b""

    def close(self) -> None:
        """The sender hangs up, or is gone."""
        if not self.is_over:
            self.is_over = True
            self.server.process.after(0.0, self.offer.on_lost)


@dataclass(frozen=True, slots=True)
class VirtualFetched:
    """Stands for a FetchedSegment."""

    segment: VirtualSegment
    lifeline: VirtualLifeline
    on_seal: OnSeal

    def attach(self, layout: SegmentLayout, generation: int) -> Segment:
        """See FetchedSegment."""
        if layout != self.segment.layout or generation != self.segment.generation or not self.segment.is_open:
            self.lifeline.close()
            raise RemoteProtocolError("another segment came than was agreed on")
        return VirtualMapping(self.segment, self.on_seal)


class VirtualServer:
    """Stands for the SegmentServer of one process."""

    def __init__(self, passing: VirtualPassing, process: Process) -> None:
        self.process = process
        self.offers: dict[str, SegmentOffer] = {}
        self.path = f"/virtual/{process}/segments.sock"
        self._passing = passing

    def offer(self, offer: SegmentOffer) -> None:
        """See SegmentServer."""
        self.offers[offer.ticket.stream_id] = offer

    def withdraw(self, stream_id: str) -> None:
        """See SegmentServer."""
        self.offers.pop(stream_id, None)

    def hang_up(self, generation: int) -> None:
        """See SegmentServer."""
        self.offers = {key: offer for key, offer in self.offers.items() if offer.generation != generation}
        self._passing.hang_up(self, generation)

    def close(self) -> None:
        """See SegmentServer."""
        for generation in {lifeline.offer.generation for lifeline in self._passing.lifelines}:
            self.hang_up(generation)

    def stats(self) -> dict[str, int]:
        """See SegmentServer."""
        return {"segments_refused": 0}


class VirtualPassing:
    """Servers by path, segments by generation, and the lifelines that live. `local_hosts`: who share one machine."""

    def __init__(self, local_hosts: Iterable[str], fired: Counter[str]) -> None:
        self.lifelines: list[VirtualLifeline] = []
        self.out_of_order: Counter[str] = Counter()  # hosts that get no segment now, or can make none
        self._local_hosts = frozenset(local_hosts)
        self._fired = fired
        self._servers: dict[str, VirtualServer] = {}
        self._segments: dict[int, VirtualSegment] = {}

    def serve(self, process: Process) -> VirtualServer:
        """The server of a receiving process."""
        server = VirtualServer(self, process)
        self._servers[server.path] = server
        return server

    def make(self, host: str, layout: SegmentLayout, generation: int) -> VirtualSegment:
        """A new segment on this host. ConfigError where the system has none."""
        if self.out_of_order[host]:
            self._fired["segment_refused"] += 1
            raise ConfigError(f"no shared memory of {layout.num_bytes} bytes: the fault says so")
        segment = self._segments[generation] = VirtualSegment(layout, generation)
        return segment

    def fetch(self, guest: Process, path: str, ticket: Ticket, generation: int, *, on_seal: OnSeal) -> VirtualFetched:
        """Get a segment as `guest`. Raises PeerLost, TicketRejected; see segment_passing.fetch."""
        server = self._servers.get(path)
        if server is None or guest.host not in self._local_hosts or not server.process.is_alive:
            raise PeerLost(f"nobody of this machine answers at {path}")
        if self.out_of_order[guest.host]:
            self._fired["segment_refused"] += 1
            raise PeerLost(f"no descriptor is left for {path}: the fault says so")
        if server.process.is_stopped:
            raise PeerLost(f"nobody answered at {path} in time")
        offer, segment = server.offers.get(ticket.stream_id), self._segments.get(generation)
        if segment is None or offer is None or offer.ticket != ticket or offer.generation != generation:
            raise TicketRejected(f"{path} refuses the segment {generation:016x} for stream {ticket.stream_id}")
        lifeline = VirtualLifeline(guest, server, offer)
        self._forget_ends()
        self.lifelines.append(lifeline)
        return VirtualFetched(segment, lifeline, on_seal)

    def live(self) -> list[VirtualLifeline]:
        """Lifelines that are not over."""
        self._forget_ends()
        return list(self.lifelines)

    def num_lifelines(self, guest: Process) -> int:
        """Of this process that live."""
        return sum(lifeline.guest is guest for lifeline in self.live())

    def hang_up(self, server: VirtualServer, generation: int) -> None:
        """A receiver let go of a segment: its sender hears it, and nobody else."""
        for lifeline in self.lifelines:
            if lifeline.server is server and lifeline.offer.generation == generation:
                lifeline.is_over = True
        self._segments.pop(generation, None)

    def died(self, process: Process) -> None:
        """Every lifeline of a process that is gone ends."""
        for lifeline in self.lifelines:
            if process in (lifeline.guest, lifeline.server.process):
                lifeline.close()

    def _forget_ends(self) -> None:
        self.lifelines = [lifeline for lifeline in self.lifelines if not lifeline.is_over]
