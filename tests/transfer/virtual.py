"""A virtual network: the real services, receivers and senders, joined without threads, sockets or a real clock.

Messages wait in one queue; `faults` may lose, repeat, reorder or corrupt them. A run is a pure function of its seed.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from transfer.config import TransferConfig
from transfer.connection import Connection, Frame
from transfer.endpoints.contract import Handler, Tick
from transfer.errors import TicketRejected
from transfer.memory.segment_guest import SegmentGuest
from transfer.memory.segment_host import RELEASE_S, SegmentHost
from transfer.memory.segment_passing import FetchedSegment
from transfer.memory.segment_server import SegmentOffer
from transfer.protocol.messages import Block, Filled, Message, Probe
from transfer.protocol.ticket import Ticket
from transfer.service.service import Service
from transfer.streams.stream_receiver import StreamReceiver
from transfer.streams.stream_sender import OutgoingStream, StreamSender
from transfer.tensors import PlaneSpec

PLANES = (
    PlaneSpec(name="embeddings", dtype="bfloat16", row_shape=(3,)),
    PlaneSpec(name="token_ids", dtype="int32", row_shape=()),
)


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Probabilities per message."""

    drop: float = 0.0
    repeat: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0


class VirtualNetwork:
    """One clock, one queue, any number of endpoints."""

    def __init__(self, seed: int = 0, faults: Faults | None = None) -> None:
        self.now = 1000.0
        self.faults = faults or Faults()
        self.fired: Counter[str] = Counter()
        self.rewrite: Callable[[Message, list[bytes]], tuple[Message, list[bytes]] | None] | None = None
        self.log: list[tuple[VirtualEndpoint, Connection, Message, list[bytes]]] = []
        self._random = random.Random(seed)
        self._queue: list[tuple[VirtualEndpoint, Connection, Message, list[bytes]]] = []
        self.endpoints: dict[str, VirtualEndpoint] = {}
        self.stopped: set[str] = set()  # endpoints whose process does not run: what comes for them waits, in order
        self._waiting: list[tuple[VirtualEndpoint, Connection, Message, list[bytes]]] = []

    def wake(self, address: str) -> None:
        """A stopped process runs again, and reads what waited."""
        self.stopped.discard(address)
        self._queue[:0] = [parcel for parcel in self._waiting if parcel[0].address == address]
        self._waiting = [parcel for parcel in self._waiting if parcel[0].address != address]

    def push(self, target: VirtualEndpoint, source: Connection, message: Message, frames: list[bytes]) -> None:
        if self.rewrite is not None:
            changed = self.rewrite(message, frames)
            if changed is None:
                self.fired["rewritten away"] += 1
                return
            message, frames = changed
        self.log.append((target, source, message, frames))
        roll = self._random.random
        if roll() < self.faults.drop:
            self.fired["drop"] += 1
            return
        if roll() < self.faults.repeat:
            self.fired["repeat"] += 1
            self._queue.append((target, source, message, frames))
        if isinstance(message, Block) and roll() < self.faults.corrupt:
            self.fired["corrupt"] += 1
            frames = [bytes([frames[0][0] ^ 1]) + frames[0][1:], *frames[1:]]
        if self._queue and roll() < self.faults.reorder:
            self.fired["reorder"] += 1
            self._queue.insert(self._random.randrange(len(self._queue)), (target, source, message, frames))
        else:
            self._queue.append((target, source, message, frames))

    def settle(self) -> None:
        """Deliver and run everything that is pending, without letting time pass."""
        while self._queue or any(e.posted for e in self.endpoints.values()):
            for endpoint in tuple(self.endpoints.values()):
                endpoint.run_posted()
            if self._queue:
                target, source, message, frames = self._queue.pop(0)
                if target.address in self.stopped:
                    self._waiting.append((target, source, message, frames))
                else:
                    target.deliver(source, message, frames)

    def advance(self, seconds: float, step: float = 0.05) -> None:
        """Let time pass in steps, with ticks."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step)
            for endpoint in tuple(self.endpoints.values()):
                if endpoint.address not in self.stopped:
                    endpoint.tick()
            self.settle()

    def run_until(self, condition: Callable[[], bool], limit_s: float = 3600.0) -> None:
        """Advance until `condition`; AssertionError after `limit_s` virtual seconds."""
        self.settle()
        end = self.now + limit_s
        while not condition():
            assert self.now < end, "the virtual time limit passed"
            self.advance(0.05)


class VirtualEndpoint:
    """Keeps the Endpoint contract over a VirtualNetwork.

    `encrypted`: as between hosts, where payloads are sealed and go over a path of their own.
    """

    encrypted = False

    def __init__(self, network: VirtualNetwork, address: str) -> None:
        self.network = network
        self._address = address
        self.posted: list[Callable[[], None]] = []
        self._handler: Handler | None = None
        self._tick: Tick | None = None
        network.endpoints[address] = self

    @property
    def address(self) -> str:
        return self._address

    @property
    def public_key(self) -> str | None:
        return "virtual key" if self.encrypted else None

    def start(
        self, handler: Handler, on_tick: Tick | None = None, on_restart: Callable[[], None] | None = None
    ) -> None:
        self._handler, self._tick = handler, on_tick

    def listen_sealed(self, max_frame_bytes: int) -> str | None:
        return f"{self._address}#token" if self.encrypted else None

    def connect(self, address: str, public_key: str | None = None) -> Connection:
        peer, _, token = address.partition("#")
        key = self._address.encode()
        return Connection(endpoint=self._address, peer=peer, key=key, outgoing=True, is_sealed_path=bool(token))

    def send(self, connection: Connection, message: Message, frames: Sequence[Frame] = ()) -> None:
        target = self.network.endpoints.get(connection.peer)
        if target is None:
            return
        if connection.is_sealed_path:
            assert isinstance(message, (Block, Probe)) and connection.outgoing
            peer, key = "who knows", b""  # that path does not tell
        else:
            peer, key = self._address, connection.key
        twin = Connection(
            endpoint=connection.peer,
            peer=peer,
            key=key,
            outgoing=not connection.outgoing,
            is_sealed_path=connection.is_sealed_path,
        )
        self.network.push(target, twin, message, [bytes(frame) for frame in frames])

    def post(self, callback: Callable[[], None]) -> None:
        self.posted.append(callback)

    def run_posted(self) -> None:
        for _ in range(len(self.posted)):
            self.posted.pop(0)()

    def deliver(self, source: Connection, message: Message, frames: list[bytes]) -> None:
        assert self._handler is not None
        if self.network.endpoints.get(self._address) is self:
            self._handler(source, message, [memoryview(frame) for frame in frames])

    def tick(self) -> None:
        self.run_posted()
        if self._tick is not None:
            self._tick(self.network.now)

    def allow(self, public_keys: Iterable[str]) -> None:
        pass

    def disconnect(self, connection: Connection) -> None:
        pass

    def close(self) -> None:
        self.run_posted()
        self.network.endpoints.pop(self._address, None)

    def stats(self) -> dict[str, int]:
        return {}


class Consumer:
    """A listener that copies rows out and checks that they come in order and once."""

    def __init__(self, receiver: StreamReceiver, stream_id: str, *, admit: bool = True) -> None:
        self.receiver, self.stream_id, self.admit = receiver, stream_id, admit
        self.total_rows: int | None = None
        self.items: Sequence[object] = ()
        self.rows: dict[str, list[torch.Tensor]] = {}
        self.num_rows = 0
        self.restarts = 0
        self.ends: list[object] = []

    def on_announce(self, total_rows: int, items: Sequence[object]) -> None:
        assert self.total_rows is None and not self.ends
        self.total_rows, self.items = total_rows, items
        if self.admit:
            self.receiver.admit(self.stream_id)

    def on_rows(self, first_row: int, planes: Mapping[str, torch.Tensor]) -> None:
        assert first_row == self.num_rows and not self.ends
        counts = {len(rows) for rows in planes.values()}
        assert len(counts) == 1
        self.num_rows += counts.pop()
        for name, rows in planes.items():
            self.rows.setdefault(name, []).append(rows.clone())

    def on_restart(self) -> None:
        assert self.total_rows is not None and not self.ends
        self.restarts += 1
        self.total_rows, self.items, self.num_rows = None, (), 0
        self.rows.clear()

    def on_complete(self, stats: object) -> None:
        self.ends.append(stats)

    def on_failed(self, error: Exception) -> None:
        self.ends.append(error)

    def tensor(self, name: str) -> torch.Tensor:
        return torch.cat(self.rows[name])


class VirtualLifeline:
    """Stands for the connection that shows that both ends live."""

    is_over = False

    def recv(self, num_bytes: int) -> bytes:
        if not self.is_over:
            raise BlockingIOError
        return b""

    def close(self) -> None:
        self.is_over = True


class VirtualPassing:
    """Stands for the socket that segments are passed over: at once, in this process, to holders of the ticket."""

    path = "/virtual/segments.sock"

    def __init__(self) -> None:
        self.offers: dict[str, SegmentOffer] = {}
        self.lifelines: dict[int, list[VirtualLifeline]] = {}
        self.on_lost: dict[int, Callable[[], None]] = {}

    def lose(self, number: int) -> None:
        """The lifelines of some segment end as if a process had."""
        generation = list(self.lifelines)[number % len(self.lifelines)]
        for lifeline in self.lifelines.pop(generation):
            lifeline.close()
        self.on_lost[generation]()

    def offer(self, offer: SegmentOffer) -> None:
        self.offers[offer.ticket.stream_id] = offer

    def withdraw(self, stream_id: str) -> None:
        self.offers.pop(stream_id, None)

    def hang_up(self, generation: int) -> None:
        self.offers = {key: offer for key, offer in self.offers.items() if offer.generation != generation}
        for lifeline in self.lifelines.pop(generation, []):
            lifeline.close()

    def stats(self) -> dict[str, int]:
        return {"segments_refused": 0}

    def close(self) -> None:
        for generation in tuple(self.lifelines):
            self.hang_up(generation)

    def fetch(self, path: str, ticket: Ticket, generation: int) -> FetchedSegment:
        offer = self.offers.get(ticket.stream_id)
        if path != self.path or offer is None or offer.ticket != ticket or offer.generation != generation:
            raise TicketRejected("no such segment")
        lifeline = VirtualLifeline()
        self.lifelines.setdefault(generation, []).append(lifeline)
        self.on_lost[generation] = offer.on_lost
        return FetchedSegment(os.dup(offer.fd), offer.num_bytes, lifeline)  # type: ignore[arg-type]


def sent_indexes(network: VirtualNetwork) -> list[int]:
    """The indexes of all blocks that were sent, in order, whichever way their rows went."""
    sent: list[int] = []
    for _, _, message, _ in network.log:
        if isinstance(message, Block):
            sent.append(message.index)
        elif isinstance(message, Filled):
            sent += range(message.first_index, message.first_index + len(message.block_ids))
    return sent


class Pair:
    """A receiving worker and a sending worker on one virtual network; `has_segments`: payload in shared memory."""

    has_segments = False

    def __init__(
        self,
        config: TransferConfig,
        *,
        network: VirtualNetwork | None = None,
        sender_config: TransferConfig | None = None,
    ) -> None:
        self.network = network or VirtualNetwork()
        self.config = config
        self.passing = VirtualPassing()
        self.receiver_service = self._service("virtual://receiver", config)
        self.sender_service = self._service("virtual://sender", sender_config or config)
        self.host = self._host(config) if self.has_segments else None
        self.receiver = StreamReceiver(self.receiver_service, config, PLANES, segments=self.host)
        self.sender = StreamSender(
            self.sender_service, sender_config or config, segments=self._guest(self.sender_service)
        )
        self.receiver_service.start()
        self.sender_service.start()

    def __del__(self) -> None:
        if getattr(self, "host", None) is not None:
            self.host.close()

    def _service(self, address: str, config: TransferConfig) -> Service:
        return Service(VirtualEndpoint(self.network, address), config, clock=lambda: self.network.now)

    def _host(self, config: TransferConfig) -> SegmentHost:
        config = replace(config, segment_tokens=config.pool_tokens)
        return SegmentHost(
            self.receiver_service, config, PLANES, folder=Path("/virtual"), open_server=lambda folder: self.passing
        )

    def _guest(self, service: Service) -> SegmentGuest | None:
        if not self.has_segments:
            return None
        return SegmentGuest(service, is_on=True, fetch=self.passing.fetch, run=lambda job: job())

    def listen(self, ticket: Ticket, *, admit: bool = True, **more: float) -> Consumer:
        """`more`: deadline_s, take_over_s."""
        consumer = Consumer(self.receiver, ticket.stream_id, admit=admit)
        self.receiver.open(ticket, consumer, **more)
        return consumer

    def send(
        self,
        ticket: Ticket,
        planes: Sequence[PlaneSpec] = PLANES,
        *,
        sender: StreamSender | None = None,
        content_key: str = "",
        deadline_s: float | None = None,
    ) -> OutgoingStream:
        sender = sender or self.sender
        return sender.open(ticket, "virtual://receiver", None, planes, content_key, deadline_s=deadline_s)

    def another_sender(self, address: str = "virtual://another") -> StreamSender:
        """A second sending worker."""
        service = self._service(address, self.config)
        sender = StreamSender(service, self.config, segments=self._guest(service))
        service.start()
        return sender

    def reissue(self, stream_id: str) -> Ticket | None:
        """The ticket of the next epoch."""
        tickets: list[Ticket | None] = []
        self.receiver.reissue(stream_id, tickets.append)
        self.network.settle()
        return tickets[0]

    def transfer(
        self, num_rows: int, *, admit: bool = True
    ) -> tuple[OutgoingStream, Consumer, dict[str, torch.Tensor]]:
        """Open a stream at both ends and write all its rows."""
        ticket = Ticket.issue("test")
        consumer = self.listen(ticket, admit=admit)
        stream = self.send(ticket)
        data = make_rows(num_rows)
        stream.announce(num_rows, [{"rows": num_rows}])
        if num_rows:
            stream.write(0, data)
        return stream, consumer, data

    def assert_ledger_zero(self) -> None:
        if self.has_segments:
            self.network.advance(RELEASE_S + 0.1)  # a lost Released is not waited for any longer
        stats = self.receiver.stats()
        for name in ("blocks_in_use", "streams_open", "tickets_open", "opens_parked", "segments_open"):
            assert stats[f"transfer_{name}"] == 0, (name, stats)
        assert self.sender.stats()["transfer_streams_sending"] == 0
        for service in (self.receiver_service, self.sender_service):
            assert service.stats()["calls_incoming"] == service.stats()["calls_outgoing"] == 0


def make_rows(num_rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random rows of PLANES."""
    generator = torch.Generator().manual_seed(seed + num_rows)
    return {
        "embeddings": torch.randn(num_rows, 3, generator=generator).bfloat16(),
        "token_ids": torch.arange(num_rows, dtype=torch.int32) + seed,
    }


def assert_rows_equal(consumer: Consumer, data: Mapping[str, torch.Tensor]) -> None:
    """Every row arrived, bit for bit."""
    if not len(data["token_ids"]):
        assert not consumer.rows
        return
    for name, rows in data.items():
        assert torch.equal(consumer.tensor(name), rows), name


__all__ = ["PLANES", "Consumer", "Faults", "Pair", "VirtualNetwork", "assert_rows_equal", "make_rows", "replace"]
