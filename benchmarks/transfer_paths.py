"""The paths that the transfer benchmark compares, each as a pair of ends with one interface. New paths go in PATHS."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable
from typing import Any, Protocol

from benchmarks import transfer_streams
from benchmarks.transfer_memory import Content, Pool
from benchmarks.transfer_raw import BareZmqReceiver, BareZmqSender, TcpReceiver, TcpSender, check_slots
from transfer.protocol.ticket import Ticket

Body = dict[str, Any]
TCP = "tcp://127.0.0.1:0"
WILD_TCP = "tcp://127.0.0.1:*"


class ReceiverPath(Protocol):
    """The receiving end."""

    address: str

    def allow(self, key: str) -> None:
        """Let a sender in."""

    def expect(self, first: int, count: int, ticket: Body | None, expected: Content | None) -> None:
        """Prepare for a request; `expected`: compare what comes."""

    def receive(self, first: int, count: int) -> bool:
        """Wait for a request that was expected; False when it was compared and is wrong."""

    def close(self) -> None: ...


class SenderPath(Protocol):
    """The sending end."""

    public_key: str | None

    def send(self, first: int, count: int, ticket: Body | None, is_open: bool) -> float:
        """One request of `count` blocks; seconds until its receiver has all of them."""

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Path:
    """receiver(pool, folder) and sender(pool, address, folder) make the ends. uses_tickets: Tandem's own path.

    hands_over: nothing is copied, so there is no rate: measured is how long a hand-over takes.
    """

    title: str
    receiver: Callable[[Pool, str], ReceiverPath]
    sender: Callable[[Pool, str, str], SenderPath]
    uses_tickets: bool = False
    hands_over: bool = False


class _RawReceiver:
    def __init__(self, pool: Pool, end: TcpReceiver | BareZmqReceiver) -> None:
        self._pool = pool
        self._end = end
        self._expected: Content | None = None
        self.address = end.address

    def allow(self, key: str) -> None:
        raise ValueError("a raw path has no keys")

    def expect(self, first: int, count: int, ticket: Body | None, expected: Content | None) -> None:
        self._expected = expected

    def receive(self, first: int, count: int) -> bool:
        self._end.receive(first, count)
        return self._expected is None or check_slots(self._pool, self._expected, first, count)

    def close(self) -> None:
        self._end.close()


class _RawSender:
    public_key: str | None = None

    def __init__(self, end: TcpSender | BareZmqSender) -> None:
        self._end = end

    def send(self, first: int, count: int, ticket: Body | None, is_open: bool) -> float:
        return self._end.send(first, count)

    def close(self) -> None:
        self._end.close()


class _StreamsReceiver:
    def __init__(self, end: transfer_streams.Receiver) -> None:
        self._end = end
        self.address = end.address

    def allow(self, key: str) -> None:
        self._end.allow(key)

    def expect(self, first: int, count: int, ticket: Body | None, expected: Content | None) -> None:
        self._end.expect(ticket_from(ticket), first, expected)

    def receive(self, first: int, count: int) -> bool:
        return self._end.receive()

    def close(self) -> None:
        self._end.close()


class _StreamsSender:
    def __init__(self, end: transfer_streams.Sender) -> None:
        self._end = end
        self.public_key = end.public_key

    def send(self, first: int, count: int, ticket: Body | None, is_open: bool) -> float:
        return self._end.send(ticket_from(ticket), first, count, is_open=is_open)

    def close(self) -> None:
        self._end.close()


def new_ticket() -> Body:
    """A ticket as JSON holds it."""
    body: Body = Ticket.issue("benchmark").to_body()
    return {**body, "secret": body["secret"].hex()}


def ticket_from(body: Body | None) -> Ticket:
    """The inverse of `new_ticket`."""
    if body is None:
        raise ValueError("a stream needs a ticket")
    return Ticket.from_body({**body, "secret": bytes.fromhex(body["secret"])})


def _raw(title: str) -> Path:
    return Path(
        title=title,
        receiver=lambda pool, folder: _RawReceiver(pool, TcpReceiver(pool)),
        sender=lambda pool, address, folder: _RawSender(TcpSender(pool, address)),
    )


def _bare(title: str, kind: str, transport: str) -> Path:
    def receiver(pool: Pool, folder: str) -> ReceiverPath:
        return _RawReceiver(pool, BareZmqReceiver(pool, kind, _address(transport, folder, WILD_TCP)))

    return Path(
        title=title,
        receiver=receiver,
        sender=lambda pool, address, folder: _RawSender(BareZmqSender(pool, kind, address)),
    )


def _streams(title: str, transport: str, **options: bool) -> Path:
    kind = transfer_streams.Kind(**options)

    def receiver(pool: Pool, folder: str) -> ReceiverPath:
        return _StreamsReceiver(transfer_streams.Receiver(pool.content.shape, _address(transport, folder, TCP), kind))

    def sender(pool: Pool, address: str, folder: str) -> SenderPath:
        return _StreamsSender(transfer_streams.Sender(pool, address, _address(transport, folder, TCP), kind))

    return Path(title=title, receiver=receiver, sender=sender, uses_tickets=True, hands_over=kind.in_place)


def _address(transport: str, folder: str, tcp: str) -> str:
    return tcp if transport == "tcp" else f"ipc://{folder}/{secrets.token_hex(8)}.sock"


PATHS: dict[str, Path] = {
    "tcp": _raw("raw TCP, sendmsg to recv_into"),
    "push-tcp": _bare("bare ZeroMQ PUSH/PULL, tcp", "push", "tcp"),
    "router-tcp": _bare("bare ZeroMQ DEALER/ROUTER, tcp", "router", "tcp"),
    "push-ipc": _bare("bare ZeroMQ PUSH/PULL, ipc", "push", "ipc"),
    "push-curve": _bare("bare ZeroMQ PUSH/PULL, tcp, CURVE", "curve", "tcp"),
    "streams-tcp": _streams("Tandem streams, tcp", "tcp"),
    "streams-ipc": _streams("Tandem streams, ipc", "ipc"),
    "streams-encrypted": _streams("Tandem streams, tcp, encrypted", "tcp", curve=True),
    "streams-shm": _streams("Tandem streams, shared memory, one copy", "ipc", is_shared=True),
    "streams-shm-sums": _streams("the same with payload checksums", "ipc", is_shared=True, has_checksums=True),
    "streams-in-place": _streams("Tandem streams, computed into the slots", "ipc", is_shared=True, in_place=True),
}
