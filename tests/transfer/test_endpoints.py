"""One conformance suite for every transport, on real threads and sockets; then what is special to sockets."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import os
import pickle
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import zmq

from tests.transfer.clocks import PATIENT, HandClock
from tests.transfer.virtual import PLANES, Consumer, assert_rows_equal, make_rows
from tests.waiting import eventually
from transfer.config import TransferConfig
from transfer.connection import Connection
from transfer.endpoints.contract import Endpoint
from transfer.endpoints.endpoint import open_endpoint
from transfer.endpoints.peer_book import KEY_BYTES
from transfer.endpoints.zmq_endpoint import ZmqEndpoint
from transfer.errors import (
    ConfigError,
    EndpointClosed,
    LocalProtocolError,
    MessageTooLarge,
    RemoteFailure,
    StreamAborted,
    TransferError,
)
from transfer.protocol.messages import Call
from transfer.protocol.ticket import Ticket
from transfer.service.calls import IncomingCall
from transfer.service.service import Service
from transfer.streams.stream_receiver import StreamReceiver
from transfer.streams.stream_sender import OutgoingStream, StreamSender

TRANSPORTS = ["inproc", "tcp", "ipc", "curve", "tcp+shm", "ipc+shm", "curve+shm"]
NAMES = itertools.count()
WAIT_S = 60.0
CONFIG = TransferConfig(
    block_size=16,
    default_allocate_tokens=100,
    pool_tokens=16 * 4,
    ping_interval_s=0.1,
    peer_timeout_s=60.0,
    tick_s=0.01,
)
TIMED = replace(CONFIG, **PATIENT)  # for those with a clock that is set forward


def wait_for(condition: Callable[[], bool]) -> None:
    eventually(condition, "waited in vain", WAIT_S)


@dataclass
class Workers:
    """Makes services of one transport and closes them all."""

    transport: str
    folder: Path
    made: list[Service] = field(default_factory=list)

    @property
    def scheme(self) -> str:
        return self.transport.removesuffix("+shm")

    @property
    def has_segments(self) -> bool:
        return self.transport.endswith("+shm")

    @property
    def config(self) -> TransferConfig:
        """For senders and receivers of streams."""
        return replace(CONFIG, shared_memory=self.has_segments, segment_tokens=CONFIG.pool_tokens)

    def endpoint(self, config: TransferConfig = CONFIG) -> Endpoint:
        address = {
            "inproc": f"inproc://conformance-{next(NAMES)}",
            "ipc": f"ipc://{self.folder}/s/{next(NAMES)}",
        }.get(self.scheme, "tcp://127.0.0.1:0")
        return open_endpoint(address, config, curve=True if self.scheme == "curve" else None)

    def service(self, config: TransferConfig = CONFIG, clock: Callable[[], float] = time.monotonic) -> Service:
        service = Service(self.endpoint(config), config, clock=clock)
        self.made.append(service)
        keys = [one.endpoint.public_key for one in self.made]
        for one in self.made:
            one.endpoint.allow([key for key in keys if key is not None])
        return service

    def connect(self, source: Service, target: Service) -> Connection:
        return source.endpoint.connect(target.endpoint.address, target.endpoint.public_key)


@pytest.fixture(params=TRANSPORTS)
def workers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workers]:
    folder = Path(os.path.relpath(tmp_path)).resolve()
    made = Workers(transport=request.param, folder=folder)
    yield made
    for service in made.made:
        service.close()
    assert not [t for t in threading.enumerate() if t.name.startswith(("transfer ", "segments "))], "a thread is left"


class Answers:
    """Collects what a call brings."""

    def __init__(self) -> None:
        self.parts: list[tuple[dict[str, object], list[bytes]]] = []
        self.ends: list[tuple[dict[str, object] | None, RemoteFailure | None]] = []
        self.ended = threading.Event()

    def on_part(self, body: dict[str, object], frames: list[memoryview]) -> None:
        self.parts.append((body, [bytes(f) for f in frames]))

    def on_end(self, body: dict[str, object] | None, failure: RemoteFailure | None) -> None:
        self.ends.append((body, failure))
        self.ended.set()

    def failure(self) -> RemoteFailure:
        assert self.ended.wait(WAIT_S)
        (end,) = self.ends
        assert end[1] is not None
        return end[1]


def call(workers: Workers, source: Service, target: Service, method: str, body: dict[str, object], frames=()):  # type: ignore[no-untyped-def]
    answers = Answers()
    handle = source.call(
        workers.connect(source, target), method, body, frames, on_part=answers.on_part, on_end=answers.on_end
    )
    return answers, handle


def assert_no_calls(*services: Service) -> None:
    wait_for(lambda: all(s.stats()["calls_incoming"] + s.stats()["calls_outgoing"] == 0 for s in services))


def test_calls_with_parts_and_frames(workers: Workers) -> None:
    server, client = workers.service(), workers.service()
    big = os.urandom(3_000_000)

    def echo(incoming: IncomingCall) -> None:
        for number, frame in enumerate(incoming.frames):
            incoming.reply({"n": number}, [frame, b"", b"tail"])
        incoming.end({"x": incoming.body["x"]})
        incoming.end({"x": "late"})
        incoming.reply({"x": "late"})

    server.register("echo", echo)
    server.start()
    client.start()
    answers, _ = call(workers, client, server, "echo", {"x": [1, "a", None, b"b", {"y": 2.5}]}, [b"small", big])
    assert answers.ended.wait(WAIT_S)
    assert answers.ends == [({"x": [1, "a", None, b"b", {"y": 2.5}]}, None)]
    assert answers.parts == [({"n": 0}, [b"small", b"", b"tail"]), ({"n": 1}, [big, b"", b"tail"])]
    assert_no_calls(server, client)


def test_answers_of_one_step_go_out_together(workers: Workers) -> None:
    config = replace(CONFIG, ping_interval_s=300.0, peer_timeout_s=900.0)  # nothing else is on its way meanwhile
    server, client = workers.service(config), workers.service(config)
    waiting: list[IncomingCall] = []
    server.register("wait", waiting.append)
    server.start()
    client.start()
    calls = [call(workers, client, server, "wait", {"n": n})[0] for n in range(50)]
    wait_for(lambda: len(waiting) == 50)
    before = client.stats()["messages_received"]
    server.reply_many([(incoming, {"token": incoming.body["n"]}) for incoming in waiting])
    wait_for(lambda: all(answers.parts for answers in calls))
    assert client.stats()["messages_received"] == before + 1
    for number, answers in enumerate(calls):
        assert answers.parts == [({"token": number}, [])]
    for incoming in waiting:
        incoming.end()
    assert all(answers.ended.wait(WAIT_S) for answers in calls)
    assert_no_calls(server, client)


def test_failures_are_typed_and_a_bad_handler_hurts_nobody(workers: Workers) -> None:
    server, client = workers.service(), workers.service()

    def broken(incoming: IncomingCall) -> None:
        raise ValueError(f"secret at {id(incoming):#x}")

    server.register("broken", broken)
    server.register("refuse", lambda incoming: incoming.fail("PromptTooLong", "9 tokens, 8 fit"))
    with pytest.raises(LocalProtocolError, match="already"):
        server.register("ping", broken)
    server.start()
    client.start()
    failure = call(workers, client, server, "broken", {})[0].failure()
    assert failure.code == "InternalError" and "0x" not in failure.message
    assert call(workers, client, server, "refuse", {})[0].failure().args == ("PromptTooLong", "9 tokens, 8 fit")
    assert call(workers, client, server, "nonsense", {})[0].failure().code == "UnknownMethod"
    assert call(workers, client, server, "ping", {"x": {1}} if workers.scheme != "inproc" else {})[0].ended.wait(WAIT_S)
    answers, _ = call(workers, client, server, "ping", {})
    assert answers.ended.wait(WAIT_S) and answers.ends == [({}, None)]
    assert_no_calls(server, client)


def test_cancel_reaches_the_far_end_and_ends_once(workers: Workers) -> None:
    server, client = workers.service(), workers.service()
    waiting: list[IncomingCall] = []
    cancelled = threading.Event()

    def wait(incoming: IncomingCall) -> None:
        incoming.on_cancel(cancelled.set)
        waiting.append(incoming)

    server.register("wait", wait)
    server.start()
    client.start()
    answers, handle = call(workers, client, server, "wait", {})
    wait_for(lambda: bool(waiting))
    handle.cancel()
    handle.cancel()
    assert answers.failure().code == "Cancelled"
    assert cancelled.wait(WAIT_S) and waiting[0].cancelled
    waiting[0].reply({"late": 1})
    waiting[0].end({"late": 1})
    call(workers, client, server, "ping", {})[0].ended.wait(WAIT_S)
    assert len(answers.ends) == 1 and not answers.parts
    assert_no_calls(server, client)


def test_a_vanished_caller_cancels_its_calls(workers: Workers) -> None:
    clock = HandClock()
    server, client = workers.service(TIMED, clock), workers.service()
    waiting: list[IncomingCall] = []
    server.register("wait", waiting.append)
    server.start()
    client.start()
    answers, _ = call(workers, client, server, "wait", {})
    wait_for(lambda: bool(waiting))
    client.endpoint.close()  # without a goodbye, as if killed
    clock.advance_until(lambda: waiting[0].cancelled)
    assert_no_calls(server)
    assert not answers.ends
    client.close()
    assert answers.failure().code == "EndpointClosed"


def test_a_vanished_server_fails_calls_and_drop_peer_does_so_at_once(workers: Workers) -> None:
    clock = HandClock()
    server, client = workers.service(), workers.service(TIMED, clock)
    waiting: list[IncomingCall] = []
    server.register("wait", waiting.append)
    server.start()
    client.start()
    first, _ = call(workers, client, server, "wait", {})
    wait_for(lambda: bool(waiting))
    client.drop_peer(workers.connect(client, server), "its actor died")
    assert first.failure().code == "PeerLost" and "its actor died" in first.failure().message
    second, _ = call(workers, client, server, "wait", {})
    wait_for(lambda: len(waiting) == 2)
    server.endpoint.close()
    clock.advance_until(second.ended.is_set)
    assert second.failure().code == "PeerLost"
    assert_no_calls(client)


def test_who_tries_again_when_told_of_a_loss_gets_a_new_connection(workers: Workers) -> None:
    server, client = workers.service(), workers.service()
    server.register("wait", lambda incoming: None)
    server.start()
    client.start()
    old, again, told = workers.connect(client, server), [], threading.Event()

    def on_end(body: object, failure: object) -> None:
        again.append(workers.connect(client, server))
        told.set()

    client.call(old, "wait", {}, on_end=on_end)
    client.drop_peer(old, "its actor died")
    assert told.wait(WAIT_S) and again[0] != old
    answers = Answers()
    client.call(again[0], "ping", {}, on_end=answers.on_end)
    assert answers.ended.wait(WAIT_S) and answers.ends == [({}, None)]


def test_a_long_call_survives_on_keep_alives(workers: Workers) -> None:
    clock = HandClock()
    server, client = workers.service(TIMED, clock), workers.service(TIMED, clock)
    waiting: list[IncomingCall] = []
    server.register("wait", waiting.append)
    server.start()
    client.start()
    answers, _ = call(workers, client, server, "wait", {})
    wait_for(lambda: bool(waiting))
    clock.advance(TIMED.ping_interval_s)
    wait_for(lambda: min(client._next_check, server._next_check) > clock())  # from now on they watch each other

    def received() -> list[int]:
        return [service.stats()["messages_received"] for service in (client, server)]

    for _ in range(int(3 * TIMED.peer_timeout_s / TIMED.ping_interval_s)):
        before = received()
        clock.advance(TIMED.ping_interval_s)  # who heard nothing for so long asks
        wait_for(lambda before=before: all(map(operator.gt, received(), before)))  # type: ignore[misc]
    assert not answers.ends and client.stats()["peers_lost"] == server.stats()["peers_lost"] == 0
    waiting[0].end({"ok": 1})
    assert answers.ended.wait(WAIT_S) and answers.ends == [({"ok": 1}, None)]


def test_close_ends_everything_once_and_refuses_more(workers: Workers) -> None:
    server, client = workers.service(), workers.service()
    cancelled = threading.Event()
    server.register("wait", lambda incoming: incoming.on_cancel(cancelled.set))
    server.start()
    client.start()
    answers, _ = call(workers, client, server, "wait", {})
    wait_for(lambda: server.stats()["calls_incoming"] == 1)
    client.close()
    client.close()
    assert answers.failure().code == "EndpointClosed"
    with pytest.raises(EndpointClosed):
        call(workers, client, server, "wait", {})
    server.close()
    assert cancelled.is_set()


def test_what_starts_while_a_service_closes_is_refused_or_ends(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = workers.service(), workers.service()
    server.register("hold", lambda incoming: None)
    sender, receiver = StreamSender(client, workers.config), StreamReceiver(client, workers.config, PLANES)
    server.start()
    client.start()
    target, close, refused = workers.connect(client, server), client.endpoint.close, []
    late, ticket = Answers(), Ticket.issue("late")
    starts: list[Callable[[], object]] = [
        lambda: client.call(target, "hold", {}, on_end=late.on_end),
        lambda: sender.open(ticket, server.endpoint.address, server.endpoint.public_key, PLANES),
        lambda: receiver.open(ticket, Consumer(receiver, ticket.stream_id)),
    ]

    def close_late() -> None:  # the moment between the end of everything and the end of the endpoint
        for start in starts:
            try:
                start()
            except EndpointClosed as error:
                refused.append(error)
        close()

    monkeypatch.setattr(client.endpoint, "close", close_late)
    answers: list[Answers] = []

    def keep_calling() -> None:
        with contextlib.suppress(EndpointClosed):
            while True:
                mine = Answers()
                client.call(target, "hold", {}, on_end=mine.on_end)
                answers.append(mine)

    threads = [threading.Thread(target=keep_calling, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(answers) > 20)
    client.close()
    for thread in threads:
        thread.join()
    assert len(refused) == 3 and not late.ends
    assert {len(a.ends) for a in answers} == {1}
    assert client.stats()["calls_outgoing"] == sender.stats()["transfer_streams_sending"] == 0
    assert receiver.stats()["transfer_tickets_open"] == receiver.stats()["transfer_streams_open"] == 0


@pytest.mark.parametrize("closed", ["service", "endpoint"])
def test_rows_written_after_the_close_block_nobody(workers: Workers, closed: str) -> None:
    server, client = workers.service(), workers.service()
    sender = StreamSender(client, workers.config)
    client.start()
    stream = sender.open(Ticket.issue("test"), server.endpoint.address, server.endpoint.public_key, PLANES)
    ends: list[Exception] = []

    def on_done(stream: OutgoingStream) -> None:
        with pytest.raises(EndpointClosed) as caught:
            stream.result(0)
        stream.abort("Again", "from inside the callback")
        ends.append(caught.value)

    stream.on_done(on_done)
    (client if closed == "service" else client.endpoint).close()
    writer = threading.Thread(target=stream.write, args=(0, make_rows(3)), daemon=True)
    writer.start()
    writer.join(WAIT_S)
    assert not writer.is_alive() and len(ends) == 1
    stream.announce(3)


def test_streams_both_ways_at_once(workers: Workers) -> None:
    one, two = workers.service(), workers.service()
    receivers = {s: StreamReceiver(s, workers.config, PLANES) for s in (one, two)}
    senders = {s: StreamSender(s, workers.config) for s in (one, two)}
    one.start()
    two.start()
    running = []
    for number in range(12):
        source, target = (one, two) if number % 2 else (two, one)
        ticket, data = Ticket.issue("test"), make_rows(37 * number)
        consumer = Consumer(receivers[target], ticket.stream_id)

        def listen(target: Service = target, ticket: Ticket = ticket, consumer: Consumer = consumer) -> None:
            receivers[target].open(ticket, consumer)

        if number % 3:
            listen()
        stream = senders[source].open(ticket, target.endpoint.address, target.endpoint.public_key, PLANES)
        if not number % 3:
            listen()
        stream.announce(37 * number)
        stream.write(0, data)
        running.append((stream, consumer, data))
    for stream, consumer, data in running:
        assert stream.result(WAIT_S).blocks == -(-len(data["token_ids"]) // 16)
        wait_for(lambda c=consumer: bool(c.ends))  # type: ignore[misc]
        assert_rows_equal(consumer, data)
    for service in (one, two):
        stats = receivers[service].stats()
        assert stats["transfer_blocks_in_use"] == stats["transfer_streams_open"] == stats["transfer_tickets_open"] == 0
        assert senders[service].stats()["transfer_streams_sending"] == 0
        assert senders[service].stats()["transfer_segments_mapped"] == workers.has_segments, "rows took the other path"
        wait_for(lambda s=service: receivers[s].stats()["transfer_segments_open"] == 0)  # type: ignore[misc]


class InPlace:
    """A producer on its own thread that computes its rows in the receiver's slots where it can, else elsewhere."""

    def __init__(self, stream: OutgoingStream, data: dict[str, torch.Tensor]) -> None:
        self.stream, self.data = stream, data
        self.num_in_place = 0
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            self.stream.wait_accepted(WAIT_S)
            row, total = 0, len(self.data["token_ids"])
            while row < total:
                views = self.stream.slot_rows(row, 40)
                if views is None:
                    end = min(total, row + 7)
                    self.stream.write(row, {name: rows[row:end].clone() for name, rows in self.data.items()})
                else:
                    end = row + len(views["token_ids"])
                    for name, view in views.items():
                        view.copy_(self.data[name][row:end])
                    self.stream.write(row, views)
                    self.num_in_place += 1
                row = end
        except TransferError as error:
            self.error = error
        finally:
            self.stream.drop_slots()


def test_rows_computed_where_the_receiver_wants_them(workers: Workers) -> None:
    one, two = workers.service(workers.config), workers.service(workers.config)
    receiver, sender = StreamReceiver(two, workers.config, PLANES), StreamSender(one, workers.config)
    one.start()
    two.start()

    def send(num_rows: int) -> tuple[OutgoingStream, Consumer, dict[str, torch.Tensor]]:
        ticket, data = Ticket.issue("test"), make_rows(num_rows, num_rows)
        consumer = Consumer(receiver, ticket.stream_id)
        receiver.open(ticket, consumer)
        stream = sender.open(ticket, two.endpoint.address, two.endpoint.public_key, PLANES)
        return stream, consumer, data

    first, consumer, data = send(64)
    if workers.has_segments:
        wait_for(lambda: first.slot_rows(0, 16) is not None)
        first.drop_slots()
    first.announce(64)
    producer = InPlace(first, data)
    running = [(producer, consumer)]
    if workers.has_segments:
        wait_for(lambda: running[0][0].num_in_place > 0)  # before others want these slots
    for number in range(1, 9):
        stream, consumer, data = send(29 * number)
        stream.announce(29 * number)
        running.append((InPlace(stream, data), consumer))
    for producer, consumer in running:
        producer.thread.join(WAIT_S)
        assert producer.error is None
        producer.stream.result(WAIT_S)
        wait_for(lambda c=consumer: bool(c.ends))  # type: ignore[misc]
        assert_rows_equal(consumer, producer.data)
    assert bool(running[0][0].num_in_place) == workers.has_segments
    wait_for(lambda: receiver.stats()["transfer_segments_open"] == 0)
    assert receiver.stats()["transfer_blocks_in_use"] == 0


def test_streams_may_end_under_producers_that_compute_in_slots(workers: Workers) -> None:
    one, two = workers.service(workers.config), workers.service(workers.config)
    receiver, sender = StreamReceiver(two, workers.config, PLANES), StreamSender(one, workers.config)
    one.start()
    two.start()
    ended: list[tuple[InPlace, Consumer]] = []
    for number in range(40):
        ticket, data = Ticket.issue("test"), make_rows(64, number)
        consumer = Consumer(receiver, ticket.stream_id)
        receiver.open(ticket, consumer)
        stream = sender.open(ticket, two.endpoint.address, two.endpoint.public_key, PLANES)
        stream.announce(64)
        ended.append((InPlace(stream, data), consumer))
        if number % 4 == 1:
            receiver.close(ticket.stream_id)
        elif number % 4 == 3:
            stream.abort("Cancelled", "not wanted")
    for number, (producer, consumer) in enumerate(ended):
        producer.thread.join(WAIT_S)
        assert isinstance(producer.error, StreamAborted | None), producer.error
        if number % 2 == 0:
            producer.stream.result(WAIT_S)
            wait_for(lambda c=consumer: bool(c.ends))  # type: ignore[misc]
            assert_rows_equal(consumer, producer.data)
    wait_for(lambda: receiver.stats()["transfer_streams_open"] == 0)
    wait_for(lambda: receiver.stats()["transfer_segments_open"] == 0)
    assert receiver.stats()["transfer_blocks_in_use"] == 0


def test_many_threads_may_send(workers: Workers) -> None:
    server, client = workers.service(), workers.service()
    server.register("echo", lambda incoming: incoming.end(incoming.body))
    server.start()
    client.start()
    results: list[Answers] = []

    def work(number: int) -> None:
        for n in range(100):
            results.append(call(workers, client, server, "echo", {"n": number * 1000 + n})[0])

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answers.ended.wait(WAIT_S) for answers in results)
    assert sorted(a.ends[0][0]["n"] for a in results) == sorted(t * 1000 + n for t in range(4) for n in range(100))  # type: ignore[index]
    assert_no_calls(server, client)


def test_a_name_or_socket_can_be_used_again(workers: Workers) -> None:
    for attempt in range(5):  # a stranger may take the free port first
        service = workers.service()
        address = service.endpoint.address
        service.start()
        with pytest.raises(ConfigError):
            open_endpoint(address, CONFIG, curve=True if workers.scheme == "curve" else None)
        service.close()
        try:
            again = open_endpoint(address, CONFIG, curve=True if workers.scheme == "curve" else None)
        except ConfigError:
            if attempt == 4:
                raise
        else:
            again.close()
            return


# -- sockets only --------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Service]:
    config = TransferConfig(max_message_bytes=1 << 20, tick_s=0.01)
    service = Service(open_endpoint("tcp://127.0.0.1:0", config), config)
    service.start()
    yield service
    service.close()


def answers_good_calls(server: Service) -> None:
    client = Service(open_endpoint("tcp://127.0.0.1:0", CONFIG), CONFIG)
    client.start()
    answers = Answers()
    client.call(client.endpoint.connect(server.endpoint.address), "ping", {}, on_end=answers.on_end)
    try:
        assert answers.ended.wait(WAIT_S) and answers.ends == [({}, None)]
    finally:
        client.close()


class Interrupted:
    """A socket's reading end that lets `during` happen before and after every read."""

    def __init__(self, sock: socket.socket, during: Callable[[], None]) -> None:
        self._sock, self._during = sock, during

    def recv(self, num_bytes: int) -> bytes:
        self._during()
        try:
            return self._sock.recv(num_bytes)
        finally:
            self._during()

    def close(self) -> None:
        self._sock.close()


def test_a_wake_up_while_the_last_one_is_read_is_not_swallowed() -> None:
    endpoint = ZmqEndpoint("tcp://127.0.0.1:0", CONFIG)
    done: list[int] = []
    endpoint._wake_read = Interrupted(endpoint._wake_read, lambda: endpoint.post(lambda: done.append(1)))  # type: ignore[assignment]
    endpoint.post(lambda: done.append(0))
    endpoint._read_ready(endpoint._wake_read)
    assert not endpoint._awake  # so that whoever posts from now on wakes the thread
    endpoint._run_posted()
    assert done == [0, 1, 1]
    endpoint.close()


def test_an_idle_endpoint_wakes_after_any_storm_of_posts() -> None:
    config = TransferConfig(tick_s=3600.0)  # no tick comes to the rescue
    endpoint = ZmqEndpoint("tcp://127.0.0.1:0", config)
    endpoint.start(lambda connection, message, frames: None)
    done: list[int] = []

    def storm() -> None:
        for number in range(3000):
            endpoint.post(functools.partial(done.append, number))

    threads = [threading.Thread(target=storm, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(20):
        ran = threading.Event()
        endpoint.post(ran.set)
        assert ran.wait(WAIT_S), "a post did not wake the thread"
        wait_for(lambda: not endpoint._awake)
    assert len(done) == 9000
    endpoint.close()


def test_connections_to_receivers_that_went_are_closed() -> None:
    client = Service(ZmqEndpoint("tcp://127.0.0.1:0", CONFIG), CONFIG)
    sender, endpoint = StreamSender(client, CONFIG), client.endpoint
    assert isinstance(endpoint, ZmqEndpoint)
    client.start()
    called = Service(open_endpoint("tcp://127.0.0.1:0", CONFIG), CONFIG)
    receivers = [called, *(Service(open_endpoint("tcp://127.0.0.1:0", CONFIG), CONFIG) for _ in range(3))]

    def transfer(service: Service, receiver: StreamReceiver) -> None:
        ticket, data = Ticket.issue("test"), make_rows(40)
        consumer = Consumer(receiver, ticket.stream_id)
        receiver.open(ticket, consumer)
        stream = sender.open(ticket, service.endpoint.address, None, PLANES)
        stream.announce(40)
        stream.write(0, data)
        stream.result(WAIT_S)
        assert_rows_equal(consumer, data)

    try:
        sides = [StreamReceiver(service, CONFIG, PLANES) for service in receivers]
        for service, receiver in zip(receivers, sides, strict=True):
            service.start()
            transfer(service, receiver)
        held = endpoint.connect(called.endpoint.address)
        first = Answers()
        client.call(held, "ping", {}, on_end=first.on_end)
        assert first.ended.wait(WAIT_S)
        receivers[1].close()
        assert len(endpoint._dealers) == len(receivers)
        sender._config = replace(CONFIG, idle_timeout_s=0.1)  # of connections; how long streams wait is settled before
        wait_for(lambda: set(endpoint._dealers) == {held})  # calls went over that one: it is not the streams' to close
        assert len(endpoint._peers) == 1
        transfer(receivers[2], sides[2])  # closed meanwhile, and made again
        second = Answers()
        client.call(held, "ping", {}, on_end=second.on_end)
        assert second.ended.wait(WAIT_S) and second.ends == [({}, None)]
    finally:
        for service in (client, *receivers):
            service.close()


class Bomb:
    """Runs code when unpickled."""

    fired: list[bool] = []  # noqa: RUF012

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Bomb.fired.append, (True,))


def test_pickles_and_junk_are_dropped_and_counted(server: Service) -> None:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.ROUTING_ID, os.urandom(KEY_BYTES))
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.connect(server.endpoint.address)
    junk = [pickle.dumps(Bomb()), b"\x01" + pickle.dumps(Bomb()), b"", b"\x01", b"\xff" * 1000, b"\x01\xc1"]
    for item in junk:
        dealer.send(item)
        dealer.send_multipart([item, item])
    dealer.send_multipart([b"\x01\x80"] + [b"x"] * 5000)
    wait_for(lambda: server.stats()["dropped_malformed"] == 2 * len(junk) + 1)
    assert not Bomb.fired
    assert server.stats()["handler_errors"] == 0
    answers_good_calls(server)
    context.destroy(linger=0)


def test_raw_bytes_on_the_port_hurt_nobody(server: Service) -> None:
    port = int(server.endpoint.address.rsplit(":", 1)[1])
    for payload in (b"GET / HTTP/1.1\r\n\r\n", pickle.dumps(Bomb()), os.urandom(5000), struct.pack("<Q", 1 << 62)):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(payload)
    answers_good_calls(server)
    assert not Bomb.fired


def test_an_oversized_frame_costs_its_sender_the_connection_only(server: Service) -> None:
    cap = 16 * 1024 * 1024  # the header cap is the larger one here
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.ROUTING_ID, os.urandom(KEY_BYTES))
    dealer.setsockopt(zmq.LINGER, 0)
    monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    dealer.connect(server.endpoint.address)
    dealer.send_multipart([b"\x01\x80", bytes(cap + 1)])
    assert monitor.poll(int(WAIT_S * 1000)), "the oversized frame was accepted"
    dealer.disable_monitor()
    context.destroy(linger=0)
    assert server.stats()["messages_received"] == 0
    answers_good_calls(server)
    with pytest.raises(MessageTooLarge, match="max_message_bytes"):
        connection = server.endpoint.connect("tcp://127.0.0.1:9")
        server.endpoint.send(connection, Call(call_id=1, method="m", body={}), [bytes((1 << 20) + 1)])


def test_a_key_that_is_not_listed_stays_out() -> None:
    clock = HandClock()
    server = Service(open_endpoint("tcp://127.0.0.1:0", CONFIG, curve=True), CONFIG)
    client = Service(open_endpoint("tcp://127.0.0.1:0", TIMED, curve=True), TIMED, clock=clock)
    server.start()
    client.start()
    try:
        target = client.endpoint.connect(server.endpoint.address, server.endpoint.public_key)
        refused = Answers()
        client.call(target, "ping", {}, on_end=refused.on_end)
        wait_for(lambda: server.stats()["refused_keys"] > 0)
        clock.advance_until(refused.ended.is_set)
        assert refused.failure().code == "PeerLost"
        assert server.stats()["messages_received"] == 0
        server.endpoint.allow([client.endpoint.public_key or ""])
        target = client.endpoint.connect(server.endpoint.address, server.endpoint.public_key)
        admitted = Answers()
        client.call(target, "ping", {}, on_end=admitted.on_end)
        assert admitted.ended.wait(WAIT_S) and admitted.ends == [({}, None)]
        plain = zmq.Context()
        dealer = plain.socket(zmq.DEALER)
        dealer.setsockopt(zmq.ROUTING_ID, os.urandom(KEY_BYTES))
        dealer.connect(server.endpoint.address)
        dealer.send(b"\x01\x80")
        answers = Answers()
        client.call(target, "ping", {}, on_end=answers.on_end)
        assert answers.ended.wait(WAIT_S)
        stats = server.stats()
        assert stats["dropped_malformed"] == stats["dropped_old_link"] == 0, "a peer without CURVE got in"
        plain.destroy(linger=0)
    finally:
        client.close()
        server.close()


def test_keys_and_addresses_are_checked(tmp_path: Path) -> None:
    for address in (
        "tcp://0.0.0.0:0",
        "tcp://*:0",
        "udp://127.0.0.1:1",
        "127.0.0.1:1",
        "tcp://203.0.113.7:1",
        "tcp://",
    ):
        with pytest.raises(ConfigError):
            open_endpoint(address, CONFIG)
    with pytest.raises(ConfigError):
        open_endpoint(f"ipc://{tmp_path}/x/a", CONFIG, curve=True)
    with pytest.raises(ConfigError):
        open_endpoint("inproc://curve", CONFIG, curve=True)
    endpoint = open_endpoint("tcp://127.0.0.1:0", CONFIG)
    try:
        with pytest.raises(ConfigError, match="public key"):
            endpoint.connect("tcp://203.0.113.7:1")
        with pytest.raises(ConfigError, match="z85"):
            endpoint.connect("tcp://203.0.113.7:1", "short")
        with pytest.raises(ConfigError, match="cannot reach"):
            endpoint.connect("inproc://other")
    finally:
        endpoint.close()


def test_a_peer_that_never_reads_is_bounded_and_slows_nobody() -> None:
    config = TransferConfig(max_outbound_messages=50, tick_s=0.01, max_message_bytes=1 << 20, peer_timeout_s=600.0)
    service = Service(open_endpoint("tcp://127.0.0.1:0", config), config)
    service.start()
    listener = socket.create_server(("127.0.0.1", 0))  # accepts and never speaks
    try:
        target = service.endpoint.connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        failures: list[Answers] = []
        for _ in range(1000):
            failures.append(Answers())
            service.call(target, "x", {}, [bytes(1000)], on_end=failures[-1].on_end)
        wait_for(lambda: any(a.ends for a in failures))
        overloaded = [a for a in failures if a.ends]
        assert {a.failure().code for a in overloaded} == {"Overloaded"}
        answers_good_calls(service)
    finally:
        service.close()
        listener.close()
    assert all(len(a.ends) == 1 for a in failures)


def test_a_connection_that_drops_comes_back_and_the_stream_goes_on() -> None:
    config = TransferConfig(block_size=16, default_allocate_tokens=32, pool_tokens=64, tick_s=0.01)
    one, two = (Service(open_endpoint("tcp://127.0.0.1:0", config), config) for _ in range(2))
    receiver, sender = StreamReceiver(one, config, PLANES), StreamSender(two, config)
    one.start()
    two.start()
    proxy = CuttingProxy(one.endpoint.address)
    try:
        ticket, data = Ticket.issue("test"), make_rows(400)
        consumer = Consumer(receiver, ticket.stream_id, admit=False)
        receiver.open(ticket, consumer)
        stream = sender.open(ticket, proxy.address, None, PLANES)
        stream.announce(400)
        stream.write(0, data)
        wait_for(lambda: consumer.total_rows == 400)
        assert proxy.cut() >= 1, "there was no link to cut"
        receiver.admit(ticket.stream_id)
        stream.result(WAIT_S)
        assert_rows_equal(consumer, data)
        assert proxy.num_accepted >= 2, "the link was not made again"
    finally:
        two.close()
        one.close()
        proxy.close()
    assert receiver.stats()["transfer_blocks_in_use"] == 0


def test_what_a_broken_link_left_binds_no_stream_to_it() -> None:
    """An Open waits unread while its link breaks and comes back: ZeroMQ gives it another sender's name."""
    config = TransferConfig(block_size=16, default_allocate_tokens=32, pool_tokens=64, tick_s=0.01)
    one, two = (Service(open_endpoint("tcp://127.0.0.1:0", config), config) for _ in range(2))
    receiver, sender = StreamReceiver(one, config, PLANES), StreamSender(two, config)
    two.start()
    proxy = CuttingProxy(one.endpoint.address)
    assert isinstance(one.endpoint, ZmqEndpoint)
    router = one.endpoint._router  # this thread's until the service starts
    monitor = router.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    try:
        ticket, data = Ticket.issue("test"), make_rows(40)
        consumer = Consumer(receiver, ticket.stream_id)
        receiver.open(ticket, consumer)
        stream = sender.open(ticket, proxy.address, None, PLANES)
        stream.announce(40)
        stream.write(0, data)
        for number in (1, 2):  # an Open on either link, both of which are known
            wait_for(lambda number=number: proxy.num_accepted == number and proxy.num_passed[proxy.newest] > 500)
            assert monitor.poll(int(WAIT_S * 1000)), f"link {number} did not come up"
            monitor.recv_multipart()
            if number == 1:
                proxy.cut()
        router.disable_monitor()
        monitor.close(linger=0)
        one.start()
        stream.result(WAIT_S)
        assert_rows_equal(consumer, data)
        assert one.endpoint.stats()["dropped_old_link"] >= 1, "nothing was left in the broken link"
    finally:
        two.close()
        one.close()
        proxy.close()


class CuttingProxy:
    """A TCP relay whose links can be cut."""

    def __init__(self, target: str) -> None:
        self._target = ("127.0.0.1", int(target.rsplit(":", 1)[1]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_accepted = 0
        self.num_passed: Counter[socket.socket] = Counter()  # bytes, by where they went
        self.newest: socket.socket | None = None  # the last link's end at the target
        self._links: list[socket.socket] = []
        self._all: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self.num_accepted += 1
            self.newest = far
            self._links += [near, far]
            self._all += [near, far]
            for source, target in ((near, far), (far, near)):
                self._threads.append(threading.Thread(target=self._pump, args=(source, target), daemon=True))
                self._threads[-1].start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
                self.num_passed[target] += len(data)
        except OSError:
            pass
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def cut(self) -> int:
        links, self._links = self._links, []
        for sock in links:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        return len(links) // 2

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join(WAIT_S)
        self._listener.close()
        for sock in self._all:
            sock.close()


def test_inproc_needs_neither_zmq_nor_msgpack() -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['zmq'] = sys.modules['msgpack'] = sys.modules['pydantic'] = sys.modules['ray'] = None;"
        "from transfer.endpoints.endpoint import open_endpoint; from transfer.service.service import Service;"
        "from transfer.streams.stream_receiver import StreamReceiver;"
        "from transfer.streams.stream_sender import StreamSender;"
        "open_endpoint('inproc://x').close()"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})


torch.set_num_threads(1)
