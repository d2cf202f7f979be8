"""VirtualEndpoint: keeps the Endpoint contract on the timeline of a run, over a VirtualNetwork."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from transfer.config import TransferConfig
from transfer.connection import Connection, Frame
from transfer.endpoints.contract import Handler, Tick
from transfer.errors import EndpointClosed, MalformedMessage
from transfer.protocol.messages import Block, Message, Probe
from transfer.protocol.wire import decode_header
from transfer.simulation.network import Route, VirtualNetwork
from transfer.simulation.timeline import Process

SEALED_MARK = "#sealed"


class VirtualEndpoint:
    """One program's way to all others; `is_encrypted`: its connections count as encrypted."""

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
            self.network.routes[key] = Route(self, target, is_sealed_path=is_sealed)
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
