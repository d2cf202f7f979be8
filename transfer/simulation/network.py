"""VirtualNetwork: joins endpoints by links with latency, order and faults. Every message crosses it as real bytes.

A connection keeps its messages in order, as a socket does, until a fault says otherwise. Messages to a host that is
down are lost; those that are on their way when it comes up again reach its next life, as a reconnecting socket's do.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from transfer.config import TransferConfig
from transfer.connection import Connection
from transfer.errors import Overloaded, PeerLost
from transfer.protocol.messages import Filled, Grant, Message, Released
from transfer.protocol.wire import encode_header
from transfer.simulation.faults import Rates, corrupted, truncated
from transfer.simulation.timeline import Process, Timeline

MAX_TOLD = 8  # of one stream


class Observer(Protocol):
    """Who sees every message: as it leaves, as something happens to it, and as it arrives."""

    def sent(self, process: Process, message: Message, frames: Sequence[bytes]) -> None:
        """A program handed a message to its endpoint."""

    def disturbed(self, message: Message, kind: str) -> None:
        """A fault met this message."""

    def loop_restarted(self, process: Process) -> None:
        """The I/O loop of a program died and runs again."""

    def arriving(self, process: Process, message: Message, frames: Sequence[bytes]) -> None:
        """A message was decoded and is handled next."""


@dataclass(slots=True)
class Link:
    """One direction between two hosts."""

    latency_s: float
    num_cuts: int = 0  # partitions that lie over it
    num_mutes: int = 0  # faults that lose every Released on it
    num_replays: int = 0  # faults that repeat what was said before of blocks that are granted anew


class Port(Protocol):
    """An endpoint, as far as a network knows it."""

    process: Process
    config: TransferConfig

    @property
    def address(self) -> str: ...
    @property
    def num_waiting(self) -> int: ...
    def twin(self, connection: Connection) -> Connection: ...
    def deliver(self, connection: Connection, wire: Sequence[bytes]) -> None: ...


@dataclass(slots=True)
class Route:
    """One connection: who made it, to which address, and how often it broke."""

    connector: Port
    address: str
    num_breaks: int = 0
    is_half_open: bool = False
    is_sealed_path: bool = False
    last_arrival_s: tuple[float, float] = (0.0, 0.0)  # to the connector, to the address


@dataclass(slots=True)
class _Parcel:
    connection: Connection  # as the receiving end sees it
    route: Route
    num_breaks: int
    message: Message
    wire: Sequence[bytes]


class VirtualNetwork:
    """All links and endpoints of a run, and the faults that meet single messages."""

    def __init__(
        self, timeline: Timeline, observer: Observer, dice: random.Random, rates: Rates, lossy_until_s: float
    ) -> None:
        self.timeline = timeline
        self.observer = observer
        self.rates = rates
        self.lossy_until_s = lossy_until_s
        self.fired: Counter[str] = Counter()
        self.num_messages = 0
        self.rewrite: Callable[[Message], Message] = lambda message: message
        self.on_carried: Callable[[Message], None] = lambda message: None
        self.endpoints: dict[str, Port] = {}
        self.routes: dict[bytes, Route] = {}
        self._dice = dice
        self._told: dict[str, deque[_Parcel]] = {}  # the last Filled messages, by stream
        self._links: dict[tuple[str, str], Link] = {}

    def link(self, source: str, target: str) -> Link:
        """The link between two hosts, made when first asked for."""
        found = self._links.get((source, target))
        if found is None:
            found = self._links[source, target] = Link(latency_s=self._dice.choice((0.0002, 0.002, 0.02)))
        return found

    def break_route(self, route: Route) -> None:
        """The connection is made anew: what was under way on it is lost, either way."""
        route.num_breaks += 1
        route.is_half_open = False

    def carry(self, source: Port, connection: Connection, message: Message, frames: list[bytes]) -> None:
        """Take a message from an endpoint; it arrives at the other end of the connection, or not."""
        route = self.routes.get(connection.key)
        target = self._target(route, connection)
        if route is None or target is None:
            raise PeerLost(f"{connection.peer} is not there")
        if target.num_waiting >= target.config.max_outbound_messages:
            raise Overloaded(f"{target.num_waiting} messages wait for {target.address}")
        self.num_messages += 1
        wire = [encode_header(self.rewrite(message)), *frames]
        parcel = _Parcel(target.twin(connection), route, route.num_breaks, message, wire)
        link = self.link(source.process.host, target.process.host)
        if isinstance(message, Filled):
            self._told.setdefault(message.stream_id, deque(maxlen=MAX_TOLD)).append(parcel)
        elif isinstance(message, Grant):
            self._replay(message, self.link(target.process.host, source.process.host))
        if link.num_mutes and isinstance(message, Released):
            self.fired["released_lost"] += 1
            self.observer.disturbed(message, "released_lost")
        elif link.num_cuts or (route.is_half_open and not connection.outgoing):
            self.observer.disturbed(message, "partition" if link.num_cuts else "half_open")
        else:
            self._dispatch(parcel, link)
        self.on_carried(message)

    def _replay(self, grant: Grant, link: Link) -> None:
        """Blocks are granted anew, and the old word that they were filled comes once more."""
        indexes = set(range(grant.first_index, grant.first_index + len(grant.block_ids)))
        for parcel in self._told.get(grant.stream_id, ()) if link.num_replays else ():
            filled = parcel.message
            assert isinstance(filled, Filled)
            if indexes & set(range(filled.first_index, filled.first_index + len(filled.block_ids))):
                self.fired["replay"] += 1
                self.observer.disturbed(filled, "replay")
                self.timeline.after(link.latency_s, self._arrive, parcel)

    def _target(self, route: Route | None, connection: Connection) -> Port | None:
        if route is None:
            return None
        return self.endpoints.get(route.address) if connection.outgoing else route.connector

    def _dispatch(self, parcel: _Parcel, link: Link) -> None:
        kind = self.rates.draw(self._dice) if self.timeline.now < self.lossy_until_s else None
        delay_s = 0.0
        if kind is not None:
            self.fired[kind] += 1
            self.observer.disturbed(parcel.message, kind)
            if kind == "drop":
                return
            if kind == "truncate":
                parcel.wire = truncated(parcel.wire, self._dice)
            elif kind == "corrupt":
                parcel.wire = corrupted(parcel.wire, self._dice)
            elif kind == "duplicate":
                self.timeline.after(link.latency_s + self._dice.expovariate(1.0), self._arrive, parcel)
            elif kind == "reorder":
                self.timeline.after(link.latency_s + self._dice.expovariate(20.0), self._arrive, parcel)
                return
            elif kind == "delay":
                delay_s = self._dice.expovariate(2.0)
        side = int(not parcel.connection.outgoing)
        last = parcel.route.last_arrival_s
        arrival_s = max(self.timeline.now + link.latency_s + delay_s, last[side])
        parcel.route.last_arrival_s = (last[0], arrival_s) if side else (arrival_s, last[1])
        self.timeline.after(arrival_s - self.timeline.now, self._arrive, parcel)

    def _arrive(self, parcel: _Parcel) -> None:
        target = self.endpoints.get(parcel.route.address)
        if parcel.connection.outgoing:
            target = parcel.route.connector
        if target is not None and parcel.num_breaks == parcel.route.num_breaks:
            target.process.run(target.deliver, (parcel.connection, parcel.wire))
