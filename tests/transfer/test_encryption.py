"""Off-host connections: CURVE without being asked for, nobody in who is not listed, nothing readable on the wire."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
import zmq

from tests.transfer.clocks import HandClock
from tests.transfer.test_endpoints import CONFIG, TIMED, WAIT_S, Answers, CuttingProxy, wait_for
from tests.transfer.virtual import PLANES, Consumer, assert_rows_equal, make_rows
from transfer.endpoints.addresses import is_loopback, tcp_host
from transfer.endpoints.endpoint import open_endpoint
from transfer.endpoints.peer_book import KEY_BYTES
from transfer.errors import ConfigError, TransferError
from transfer.protocol.ticket import Ticket
from transfer.service.calls import IncomingCall
from transfer.service.service import Service
from transfer.streams.stream_receiver import StreamReceiver
from transfer.streams.stream_sender import StreamSender

MARKER = b"this text must not be readable on the wire" * 20


def outside_address() -> str:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # chooses a route; nothing is sent
        except OSError:
            pytest.skip("this machine has loopback addresses only")
        host: str = sock.getsockname()[0]
    if is_loopback(host):
        pytest.skip("this machine has loopback addresses only")
    return host


class Worker:
    """A service with both sides of streams, at an address that others could reach; curve is left to the default."""

    def __init__(self, host: str) -> None:
        self.clock = HandClock(runs=True)
        self.service = Service(open_endpoint(f"tcp://{host}:0", TIMED), TIMED, clock=self.clock)
        self.endpoint = self.service.endpoint
        self.receiver = StreamReceiver(self.service, TIMED, PLANES)
        self.sender = StreamSender(self.service, TIMED)
        self.service.register("echo", lambda call: call.end(call.body))
        self.service.start()

    @property
    def key(self) -> str:
        assert self.endpoint.public_key is not None
        return self.endpoint.public_key

    def ask(self, peer: Worker, *, address: str | None = None, key: str | None = None) -> Answers:
        answers = Answers()
        connection = self.endpoint.connect(address or peer.endpoint.address, key or peer.key)
        self.service.call(connection, "echo", {"x": MARKER}, on_end=answers.on_end)
        return answers


@pytest.fixture
def pair() -> Iterator[tuple[Worker, Worker]]:
    """Two workers that were told of each other, as the controller does it."""
    host = outside_address()
    one, two = Worker(host), Worker(host)
    for worker in (one, two):
        worker.endpoint.allow([one.key, two.key])
    yield one, two
    one.service.close()
    two.service.close()


def assert_works(one: Worker, two: Worker) -> None:
    answers = one.ask(two)
    assert answers.ended.wait(WAIT_S) and answers.ends == [({"x": MARKER}, None)]


def test_two_workers_with_an_address_off_this_host_use_curve(pair: tuple[Worker, Worker]) -> None:
    one, two = pair
    assert not is_loopback(tcp_host(one.endpoint.address)) and len(one.key) == len(two.key) == 40 and one.key != two.key
    for source, target in (pair, pair[::-1]):
        ticket, data = Ticket.issue("test"), make_rows(200)
        consumer = Consumer(target.receiver, ticket.stream_id)
        target.receiver.open(ticket, consumer)
        stream = source.sender.open(ticket, target.endpoint.address, target.key, PLANES)
        stream.announce(200)
        stream.write(0, data)
        stream.result(WAIT_S)
        wait_for(lambda c=consumer: bool(c.ends))  # type: ignore[misc]
        assert_rows_equal(consumer, data)
        assert_works(source, target)
    with pytest.raises(ConfigError, match="its public key is needed"):
        one.endpoint.connect("tcp://192.0.2.77:5555")
    assert one.endpoint.stats()["refused_keys"] == two.endpoint.stats()["refused_keys"] == 0


def test_a_worker_that_nobody_was_told_of_gets_nothing_and_is_counted(pair: tuple[Worker, Worker]) -> None:
    one, two = pair
    seen: list[IncomingCall] = []
    two.service.register("steal", seen.append)
    stranger = Worker(outside_address())
    try:
        ticket = Ticket.issue("stolen")  # even with a ticket
        consumer = Consumer(two.receiver, ticket.stream_id)
        two.receiver.open(ticket, consumer)
        stream = stranger.sender.open(ticket, two.endpoint.address, two.key, PLANES)
        stream.announce(3)
        stream.write(0, make_rows(3))
        answers = stranger.ask(two)
        connection = stranger.endpoint.connect(two.endpoint.address, two.key)
        stranger.service.call(connection, "steal", {}, on_end=Answers().on_end)
        wait_for(lambda: two.endpoint.stats()["refused_keys"] > 0)
        stranger.clock.advance_until(answers.ended.is_set)
        assert answers.failure().code == "PeerLost"
        assert_works(one, two)
        with pytest.raises(TransferError):
            stream.result(WAIT_S)
        assert not seen and consumer.total_rows is None and not consumer.ends
        assert two.receiver.stats()["transfer_opens_parked"] == 0
        two.receiver.close(ticket.stream_id)
    finally:
        stranger.service.close()


def test_a_client_without_encryption_gets_nothing(pair: tuple[Worker, Worker]) -> None:
    one, two = pair
    before = two.endpoint.stats()
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.ROUTING_ID, os.urandom(KEY_BYTES))
    monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_DISCONNECTED)
    dealer.connect(two.endpoint.address)
    with suppress(zmq.Again):  # it may be refused, and its way closed, before it says anything
        dealer.send(b"\x01\x80", zmq.NOBLOCK)
    assert monitor.poll(int(WAIT_S * 1000)), "the handshake was not refused"
    assert_works(one, two)
    assert two.endpoint.stats()["dropped_malformed"] == before["dropped_malformed"], "its message came in"
    dealer.disable_monitor()
    context.destroy(linger=0)


def test_who_listens_at_the_address_without_its_private_key_gets_nothing(pair: tuple[Worker, Worker]) -> None:
    one, two = pair
    impostor = Worker(outside_address())
    try:
        impostor.endpoint.allow([one.key])  # it would gladly take the call
        answers = one.ask(two, address=impostor.endpoint.address, key=two.key)
        one.clock.advance_until(answers.ended.is_set)
        assert answers.failure().code == "PeerLost"
        assert impostor.endpoint.stats()["messages_received"] == 0
        assert_works(one, two)
    finally:
        impostor.service.close()


class RecordingProxy(CuttingProxy):
    """Remembers what went over its links."""

    def __init__(self, target: str) -> None:
        self.recorded: list[bytes] = []
        super().__init__(target)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        recorded = self.recorded

        class Tap:
            def recv(self, num_bytes: int) -> bytes:
                recorded.append(data := source.recv(num_bytes))
                return data

            def shutdown(self, how: int) -> None:
                source.shutdown(how)

        super()._pump(Tap(), target)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_encrypted", [True, False])
def test_nothing_is_readable_on_the_wire(is_encrypted: bool) -> None:
    """And the recording shows that it would be seen: without CURVE the same call is."""
    one, two = (Service(open_endpoint("tcp://127.0.0.1:0", CONFIG, curve=is_encrypted), CONFIG) for _ in range(2))
    two.register("echo", lambda call: call.end(call.body))
    proxy = RecordingProxy(two.endpoint.address)
    try:
        two.endpoint.allow([key] if (key := one.endpoint.public_key) else [])
        one.start()
        two.start()
        answers = Answers()
        connection = one.endpoint.connect(proxy.address, two.endpoint.public_key)
        one.call(connection, "echo", {"x": MARKER}, on_end=answers.on_end)
        assert answers.ended.wait(WAIT_S) and answers.ends == [({"x": MARKER}, None)]
    finally:
        one.close()
        two.close()
        proxy.close()
    recorded = b"".join(proxy.recorded)
    assert (b"CURVE" in recorded) == is_encrypted
    assert (MARKER[:42] in recorded) != is_encrypted
