"""InprocEndpoint: endpoints of one process, first class: no encoding, no sockets, the same threads and bounds.

Message objects and frames are handed over as they are. A network (the process-wide one by default) maps names to
endpoints; tests give it a `fault` to lose, repeat, reorder or change what passes.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from transfer.config import TransferConfig
from transfer.connection import Connection, Frame
from transfer.endpoints.endpoint_base import EndpointBase
from transfer.errors import ConfigError, EndpointClosed, MessageTooLarge, Overloaded, PeerLost
from transfer.protocol.messages import Message

BATCH = 64  # messages taken from the inbox at once

Parcel: TypeAlias = tuple[Message, Sequence[memoryview]]
Fault: TypeAlias = Callable[[str, str, Message, Sequence[memoryview]], list[Parcel]]
"""(from address, to address, message, frames) -> what arrives instead."""


class InprocNetwork:
    """Names to endpoints, and the fault that may be switched on between them."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self._endpoints: dict[str, InprocEndpoint] = {}
        self._lock = threading.Lock()

    def bind(self, endpoint: InprocEndpoint) -> None:
        """Raises ConfigError when the name is taken."""
        with self._lock:
            if endpoint.address in self._endpoints:
                raise ConfigError(f"{endpoint.address} is in use in this process: choose another name")
            self._endpoints[endpoint.address] = endpoint

    def unbind(self, endpoint: InprocEndpoint) -> None:
        """Nothing happens when it is not bound."""
        with self._lock:
            if self._endpoints.get(endpoint.address) is endpoint:
                del self._endpoints[endpoint.address]

    def find(self, address: str) -> InprocEndpoint | None:
        """The endpoint bound to `address`."""
        return self._endpoints.get(address)


PROCESS_NETWORK = InprocNetwork()


class InprocEndpoint(EndpointBase):
    """An endpoint of `network`; see `connection.Endpoint` for the contract."""

    def __init__(self, address: str, config: TransferConfig, network: InprocNetwork = PROCESS_NETWORK) -> None:
        super().__init__(config)
        self._address = address
        self._network = network
        self._news = threading.Condition(self._lock)
        self._inbox: deque[tuple[Connection, Message, Sequence[memoryview], int]] = deque()
        self._inbox_bytes = 0
        self._routes: dict[bytes, tuple[InprocEndpoint, Connection]] = {}  # key -> peer, and its handle of us
        self._outgoing: dict[str, Connection] = {}
        self._numbers = itertools.count()
        network.bind(self)

    @property
    def address(self) -> str:
        """inproc://NAME."""
        return self._address

    @property
    def public_key(self) -> str | None:
        """Always None: nothing leaves the process."""
        return None

    def listen_sealed(self, max_frame_bytes: int) -> str | None:
        """Always None: there is no wire."""
        return None

    def connect(self, address: str, public_key: str | None = None) -> Connection:
        """The peer need not exist yet; sending to it before raises PeerLost."""
        if not address.startswith("inproc://"):
            raise ConfigError(f"{self._address} cannot reach {address!r}: both ends must be inproc://")
        with self._news:
            if address not in self._outgoing:
                key = f"{self._address} {next(self._numbers)} {id(self)}".encode()
                self._outgoing[address] = Connection(endpoint=self._address, peer=address, key=key, outgoing=True)
            return self._outgoing[address]

    def send(self, connection: Connection, message: Message, frames: Sequence[Frame] = ()) -> None:
        """Put it into the peer's inbox."""
        if self._closed:
            raise EndpointClosed(f"{self._address} is closed")
        peer, twin = self._route(connection)
        views = [memoryview(frame) for frame in frames]
        fault = self._network.fault
        parcels = [(message, views)] if fault is None else fault(self._address, peer.address, message, views)
        for parcel_message, parcel_frames in parcels:
            peer._accept(twin, parcel_message, parcel_frames)

    def _route(self, connection: Connection) -> tuple[InprocEndpoint, Connection]:
        route = self._routes.get(connection.key)
        if route is not None:
            return route
        peer = self._network.find(connection.peer) if connection.outgoing else None
        if peer is None:
            raise PeerLost(f"{connection.peer} is not there")
        back = connection.key + b"<"
        twin = Connection(endpoint=peer.address, peer=self._address, key=back, outgoing=False)
        peer._routes[back] = (self, connection)
        route = self._routes[connection.key] = (peer, twin)
        return route

    def _accept(self, connection: Connection, message: Message, frames: Sequence[memoryview]) -> None:
        size, limit = sum(len(frame) for frame in frames), self._config.max_outbound_bytes
        if size > limit:
            raise MessageTooLarge(
                f"a message of {size} bytes for {self._address} is beyond max_outbound_bytes ({limit})"
            )
        with self._news:
            if self._closing:
                raise PeerLost(f"{self._address} is closed")
            full = len(self._inbox) >= self._config.max_outbound_messages
            if full or self._inbox_bytes + size > limit:
                raise Overloaded(f"{len(self._inbox)} messages wait for {self._address}: slow down")
            self._inbox.append((connection, message, frames, size))
            self._inbox_bytes += size
            if len(self._inbox) == 1:
                self._news.notify()

    def allow(self, public_keys: Iterable[str]) -> None:
        """Nothing to do."""

    def disconnect(self, connection: Connection) -> None:
        """Forget a peer, and its way back to us."""
        with self._news:
            route = self._routes.pop(connection.key, None)
            if route is not None:
                route[0]._routes.pop(route[1].key, None)
            if self._outgoing.get(connection.peer) == connection:
                del self._outgoing[connection.peer]

    def close(self) -> None:
        """Run what was posted, then stop."""
        with self._news:
            self._closing = True
            self._news.notify_all()
        self._network.unbind(self)
        if self._thread is None:
            self._run_posted()
        elif not self._on_thread():
            self._thread.join()
        self._closed = True
        with self._news:
            self._inbox.clear()
            self._routes.clear()
            self._outgoing.clear()

    def stats(self) -> dict[str, int]:
        """Counters since the start."""
        return dict(self._counts)

    def _run(self) -> None:
        while True:
            with self._news:
                if not (self._inbox or self._posted or self._closing):
                    self._news.wait(self._seconds_to_tick())
                parcels = [self._take() for _ in range(min(BATCH, len(self._inbox)))]
                if self._closing and not self._posted:
                    return
            self._run_posted()
            for connection, message, frames in parcels:
                self._dispatch(connection, message, frames)
            self._maybe_tick()

    def _wake(self) -> None:
        with self._news:
            self._news.notify()

    def _take(self) -> tuple[Connection, Message, Sequence[memoryview]]:
        connection, message, frames, size = self._inbox.popleft()
        self._inbox_bytes -= size
        return connection, message, frames


def open_inproc(address: str, config: TransferConfig, curve: bool | None) -> InprocEndpoint:
    """For `endpoint.open_endpoint`. ConfigError when CURVE is asked for."""
    if curve:
        raise ConfigError(f"{address} has no wire to encrypt: leave curve off")
    return InprocEndpoint(address, config)
