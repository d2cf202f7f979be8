"""VirtualNetwork: endpoints joined by links with latency, order and faults. Every message crosses it as real bytes.

A connection keeps its messages in order, as a socket does, until a fault says otherwise. Messages to a host that is
down are lost; those that are on their way when it comes up again reach its next life, as a reconnecting socket's do.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from transfer.config import TransferConfig
from transfer.connection import Connection, Frame
from transfer.endpoints.contract import Handler, Tick
from transfer.errors import EndpointClosed, MalformedMessage, Overloaded, PeerLost
from transfer.protocol.messages import Block, Message, Probe
from transfer.protocol.wire import decode_header, encode_header
from transfer.simulation.faults import Rates, corrupted, truncated
from transfer.simulation.timeline import Process, Timeline

SEALED_MARK = "#sealed"


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


@dataclass(slots=True)
class _Route:
    """One connection: who made it, to which address, and how often it broke."""

    connector: VirtualEndpoint
    address: str
    num_breaks: int = 0
    is_half_open: bool = False
    is_sealed_path: bool = False
    last_arrival_s: tuple[float, float] = (0.0, 0.0)  # to the connector, to the address


@dataclass(slots=True)
class _Parcel:
    connection: Connection  # as the receiving end sees it
    route: _Route
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
        self.endpoints: dict[str, VirtualEndpoint] = {}
        self.routes: dict[bytes, _Route] = {}
        self._dice = dice
        self._links: dict[tuple[str, str], Link] = {}

    def link(self, source: str, target: str) -> Link:
        """The link between two hosts, made when first asked for."""
        found = self._links.get((source, target))
        if found is None:
            found = self._links[source, target] = Link(latency_s=self._dice.choice((0.0002, 0.002, 0.02)))
        return found

    def break_route(self, route: _Route) -> None:
        """The connection is made anew: what was under way on it is lost, either way."""
        route.num_breaks += 1
        route.is_half_open = False

    def carry(self, source: VirtualEndpoint, connection: Connection, message: Message, frames: list[bytes]) -> None:
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
        if link.num_cuts or (route.is_half_open and not connection.outgoing):
            self.observer.disturbed(message, "partition" if link.num_cuts else "half_open")
        else:
            self._dispatch(parcel, link)
        self.on_carried(message)

    def _target(self, route: _Route | None, connection: Connection) -> VirtualEndpoint | None:
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


class VirtualEndpoint:
    """Keeps the Endpoint contract on the timeline of a run."""

    def __init__(
        self,
        network: VirtualNetwork,
        process: Process,
        address: str,
        config: TransferConfig,
        *,
        is_encrypted: bool = False,
    ) -> None:
        self.network = network
        self._is_encrypted = is_encrypted
        self.process = process
        self.config = config
        self.is_closed = False
        self._address = address
        self._handler: Handler | None = None
        self._tick: Tick | None = None
        self._on_restart: Callable[[], None] | None = None
        self._outgoing: dict[str, Connection] = {}
        self._num_connected = 0
        self._posted: deque[Callable[[], None]] = deque()
        self._counts = {"messages_received": 0, "dropped_malformed": 0}
        network.endpoints[address] = self

    @property
    def address(self) -> str:
        """virtual://HOST."""
        return self._address

    @property
    def public_key(self) -> str | None:
        """Something, where connections are to count as encrypted."""
        return "virtual key" if self._is_encrypted else None

    @property
    def num_waiting(self) -> int:
        """Messages and callbacks that a stopped program has not taken yet."""
        return self.process.num_waiting

    def start(
        self, handler: Handler, on_tick: Tick | None = None, on_restart: Callable[[], None] | None = None
    ) -> None:
        """Begin to hand on messages and ticks."""
        self._handler, self._tick, self._on_restart = handler, on_tick, on_restart
        self.process.on_loop_death = self.restart_loop
        self.process.after(self.config.tick_s, self._on_tick)

    def listen_sealed(self, max_frame_bytes: int) -> str | None:
        """A path of its own, where connections are to count as encrypted."""
        return f"{self._address}{SEALED_MARK}" if self._is_encrypted else None

    def connect(self, address: str, public_key: str | None = None) -> Connection:
        """The connection to `address`, one until it is disconnected."""
        connection = self._outgoing.get(address)
        if connection is None:
            self._num_connected += 1
            key = f"{self.process}>{address}>{self._num_connected}".encode()
            target = address.removesuffix(SEALED_MARK)
            is_sealed = target != address
            connection = Connection(
                endpoint=self._address, peer=address, key=key, outgoing=True, is_sealed_path=is_sealed
            )
            self._outgoing[address] = connection
            self.network.routes[key] = _Route(self, target, is_sealed_path=is_sealed)
        return connection

    def twin(self, connection: Connection) -> Connection:
        """How this end sees a connection of its peer's."""
        if connection.is_sealed_path:  # that path does not tell whose it is
            return Connection(endpoint=self._address, peer="sealed", key=b"", outgoing=False, is_sealed_path=True)
        peer = connection.endpoint if connection.outgoing else connection.peer.partition("<-")[0]
        if not connection.outgoing:
            return Connection(endpoint=self._address, peer=peer, key=connection.key, outgoing=True)
        return Connection(
            endpoint=self._address,
            peer=f"{self._address}<-{connection.key.decode()}",
            key=connection.key,
            outgoing=False,
        )

    def send(self, connection: Connection, message: Message, frames: Sequence[Frame] = ()) -> None:
        """Raises EndpointClosed, PeerLost, Overloaded."""
        if self.is_closed:
            raise EndpointClosed(f"{self._address} is closed")
        copies = [bytes(frame) for frame in frames]
        self.network.observer.sent(self.process, message, copies)
        self.process.touch()  # a loop that dies here has said it, and nobody heard
        self.network.carry(self, connection, message, copies)

    def deliver(self, connection: Connection, wire: Sequence[bytes]) -> None:
        """Decode what arrived and hand it on; what does not decode is dropped and counted."""
        if self.is_closed or self._handler is None:
            return
        if connection.outgoing and self._outgoing.get(connection.peer) != connection:
            return
        try:
            message = decode_header(wire[0], len(wire) - 1)
            if connection.is_sealed_path and not isinstance(message, (Block, Probe)):
                raise MalformedMessage("not for this path")
        except MalformedMessage:
            self._counts["dropped_malformed"] += 1
            return
        self._counts["messages_received"] += 1
        self.network.observer.arriving(self.process, message, wire[1:])
        self._handler(connection, message, [memoryview(frame) for frame in wire[1:]])

    def post(self, callback: Callable[[], None]) -> None:
        """Run `callback` a moment later, in order. Raises EndpointClosed."""
        if self.is_closed:
            raise EndpointClosed(f"{self._address} is closed")
        self._posted.append(callback)
        self.process.after(0.0, self._run_posted, 1)

    def allow(self, public_keys: Iterable[str]) -> None:
        """Nothing to do."""

    def disconnect(self, connection: Connection) -> None:
        """Forget a peer; what is under way on the connection is lost."""
        route = self.network.routes.get(connection.key)
        if route is not None and connection.outgoing:
            del self.network.routes[connection.key]
            self.network.break_route(route)
            if self._outgoing.get(connection.peer) == connection:
                del self._outgoing[connection.peer]

    def close(self) -> None:
        """Run what was posted; then nothing is sent or taken any more."""
        self._run_posted(len(self._posted))
        self.is_closed = True
        if self.network.endpoints.get(self._address) is self:
            del self.network.endpoints[self._address]

    def stats(self) -> dict[str, int]:
        """Counters since the start."""
        return dict(self._counts)

    def restart_loop(self) -> None:
        """The I/O loop died and runs again: what was on its way to it is lost."""
        for route in self.network.routes.values():
            if route.address == self._address:
                self.network.break_route(route)
        self.network.observer.loop_restarted(self.process)
        if self._on_restart is not None:
            self._on_restart()

    def _run_posted(self, count: int) -> None:
        for _ in range(min(count, len(self._posted))):
            self._posted.popleft()()

    def _on_tick(self) -> None:
        if self.is_closed:
            return
        self.process.after(self.config.tick_s, self._on_tick)
        if self._tick is not None:
            self._tick(self.process.now())
