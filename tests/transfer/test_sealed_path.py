"""The socket for sealed payloads, attacked by who knows its address, and by who has its token and recordings too."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import zmq

from tests.transfer import test_endpoints
from tests.transfer.test_encryption import RecordingProxy
from tests.transfer.test_endpoints import WAIT_S, Answers, Bomb, CuttingProxy, wait_for
from tests.transfer.virtual import PLANES, Consumer, assert_rows_equal, make_rows
from transfer.config import TransferConfig
from transfer.connection import Connection
from transfer.endpoints.addresses import SEALED_DOMAIN, sealed_address, split_sealed
from transfer.endpoints.endpoint import open_endpoint
from transfer.errors import ConfigError, Incompatible, LocalProtocolError
from transfer.protocol.messages import Abort, Ack, Announce, Block, Call, Close, Message, Open, Probe
from transfer.protocol.negotiate import SEALED, Offer
from transfer.protocol.ticket import Ticket
from transfer.protocol.wire import encode_header
from transfer.service.service import Service
from transfer.streams.stream_receiver import StreamReceiver
from transfer.streams.stream_sender import OutgoingStream, StreamSender
from transfer.tensors import SEAL_BYTES

CONFIG = replace(
    test_endpoints.CONFIG,
    default_allocate_tokens=64,
    pool_tokens=16 * 6,
    credit_window_blocks=4,
    shared_memory=False,
)
BLOCK_BYTES = 6 * 16  # of the larger plane


class Side:
    """One worker with CURVE; notes what comes in, and over which path."""

    def __init__(self, config: TransferConfig = CONFIG) -> None:
        self.endpoint = open_endpoint("tcp://127.0.0.1:0", config, curve=True)
        self.service = Service(self.endpoint, config)
        self.receiver = StreamReceiver(self.service, config, PLANES)
        self.sender = StreamSender(self.service, config)
        self.seen: list[tuple[bool, Message, list[bytes]]] = []
        self.service.register("echo", lambda call: call.end(call.body))
        handle = self.service._on_message

        def note(connection: Connection, message: Message, frames: Sequence[memoryview]) -> None:
            self.seen.append((connection.is_sealed_path, message, [bytes(frame) for frame in frames]))
            handle(connection, message, frames)

        self.service._on_message = note  # type: ignore[method-assign]
        self.service.start()

    @property
    def sealed_address(self) -> str:
        assert self.receiver._sealed_address is not None
        return self.receiver._sealed_address

    def blocks(self, stream_id: str) -> list[tuple[Block, list[bytes]]]:
        return [(m, f) for _, m, f in list(self.seen) if isinstance(m, Block) and m.stream_id == stream_id]

    def dropped(self, reason: str) -> int:
        return self.receiver.stats().get(f"transfer_dropped_{reason}", 0)


class Pair:
    """A receiving and a sending worker that were told of each other."""

    def __init__(self, config: TransferConfig = CONFIG) -> None:
        self.receiving, self.sending = Side(config), Side(config)
        keys = [side.endpoint.public_key or "" for side in (self.receiving, self.sending)]
        for side in (self.receiving, self.sending):
            side.endpoint.allow(keys)

    def start(
        self, num_rows: int, *, admit: bool = True, written: int | None = None
    ) -> tuple[OutgoingStream, Consumer]:
        ticket, target = Ticket.issue("test"), self.receiving
        consumer = Consumer(target.receiver, ticket.stream_id, admit=admit)
        target.receiver.open(ticket, consumer)
        stream = self.sending.sender.open(ticket, target.endpoint.address, target.endpoint.public_key, PLANES)
        stream.announce(num_rows)
        count = num_rows if written is None else written
        stream.write(0, {name: rows[:count].clone() for name, rows in make_rows(num_rows).items()})
        return stream, consumer

    def finish(self, stream: OutgoingStream, consumer: Consumer, num_rows: int) -> None:
        stream.result(WAIT_S)
        wait_for(lambda: bool(consumer.ends))
        assert_rows_equal(consumer, make_rows(num_rows))

    def assert_works(self) -> None:
        self.finish(*self.start(100), 100)
        stats = self.receiving.receiver.stats()
        assert stats["transfer_blocks_in_use"] == stats["transfer_streams_open"] == stats["transfer_tickets_open"] == 0

    def close(self) -> None:
        self.sending.service.close()
        self.receiving.service.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


class Attacker:
    """A socket that ZeroMQ would let in: it has the address, and the token unless told otherwise."""

    def __init__(self, address: str, token: str | None = None, kind: int = zmq.PUSH) -> None:
        plain, known = split_sealed(address)
        self._context = zmq.Context()
        self._socket = self._context.socket(kind)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDTIMEO, 0 if token is not None else int(WAIT_S * 1000))
        if token != "":
            self._socket.setsockopt(zmq.PLAIN_USERNAME, SEALED_DOMAIN)
            self._socket.setsockopt(zmq.PLAIN_PASSWORD, (known if token is None else token).encode())
        self.monitor = self._socket.get_monitor_socket()
        self._socket.connect(plain)

    def send(self, message: Message | bytes, frames: Sequence[bytes] = ()) -> None:
        header = message if isinstance(message, bytes) else encode_header(message)
        self._socket.send_multipart([header, *frames])

    def await_event(self, *kinds: int) -> None:
        for _ in range(1000):
            assert self.monitor.poll(int(WAIT_S * 1000)), "nothing happened to the connection"
            kind = int.from_bytes(self.monitor.recv_multipart()[0][:2], "little")
            if kind in kinds:
                return
        raise AssertionError("another thing happened to the connection, again and again")

    def close(self) -> None:
        self._socket.disable_monitor()
        self._context.destroy(linger=0)


@pytest.fixture
def attack(pair: Pair) -> Iterator[Attacker]:
    attacker = Attacker(pair.receiving.sealed_address)
    yield attacker
    attacker.close()


def test_blocks_and_probes_take_the_sealed_path_and_nothing_else_does(pair: Pair) -> None:
    stream, consumer = pair.start(100, written=40)
    wait_for(lambda: any(isinstance(m, Probe) for _, m, _ in pair.receiving.seen))
    stream.write(40, {name: rows[40:].clone() for name, rows in make_rows(100).items()})
    pair.finish(stream, consumer, 100)
    assert stream.session.terms is not None and stream.session.terms.integrity == SEALED
    for is_sealed_path, message, frames in pair.receiving.seen:
        assert is_sealed_path == isinstance(message, (Block, Probe)), message
        if isinstance(message, Block):
            assert message.tag == b"" and len(frames[0]) == 6 * message.num_rows + SEAL_BYTES
    assert not any(is_sealed_path for is_sealed_path, _, _ in pair.sending.seen)
    serials = [block.serial for block, _ in pair.receiving.blocks(stream.stream_id)]
    assert len(serials) == len(set(serials)) == 7


def test_rows_are_not_readable_on_the_wire() -> None:
    """Headers are; the recording shows it."""
    pair = Pair()
    address, token = split_sealed(pair.receiving.sealed_address)
    proxy = RecordingProxy(address)
    pair.receiving.receiver._sealed_address = sealed_address(proxy.address, token)
    try:
        stream, consumer = pair.start(100)
        pair.finish(stream, consumer, 100)
    finally:
        pair.close()
        proxy.close()
    recorded = b"".join(proxy.recorded)
    assert stream.stream_id.encode() in recorded and b"block_id" in recorded
    plain = make_rows(100)["token_ids"].numpy().tobytes()
    assert not any(plain[i : i + 16] in recorded for i in range(0, len(plain), 16))


def test_recorded_blocks_sent_again_change_nothing(pair: Pair, attack: Attacker) -> None:
    first, consumer = pair.start(60)
    pair.finish(first, consumer, 60)
    stream, consumer = pair.start(100, admit=False, written=32)  # blocks 0 and 1 of those granted; same pool blocks
    wait_for(lambda: len(pair.receiving.blocks(stream.stream_id)) == 2)
    own, others = (pair.receiving.blocks(s.stream_id) for s in (stream, first))
    for message, frames in own:
        attack.send(message, frames)
    wait_for(lambda: pair.receiving.dropped("duplicate") == 2)
    for message, frames in others:  # of a stream that ended
        attack.send(message, frames)
    wait_for(lambda: pair.receiving.dropped("ended_stream") >= len(others))
    free = [(index, own[0][0].block_id) for index in (2, 3)]
    for message, frames in others:  # dressed as blocks of this one
        for index, block_id in [*free, (0, own[0][0].block_id)]:
            attack.send(replace(message, stream_id=stream.stream_id, index=index, block_id=block_id), frames)
    attack.send(replace(own[0][0], epoch=2), own[0][1])
    wait_for(lambda: pair.receiving.dropped("stale_epoch") == 1)
    assert pair.receiving.endpoint.stats()["handler_errors"] == 0
    go_on(pair, stream, consumer)


def go_on(pair: Pair, stream: OutgoingStream, consumer: Consumer, num_rows: int = 100, written: int = 32) -> None:
    """The attacked stream, and another one, end as if nothing had happened."""
    stream.write(written, {name: rows[written:].clone() for name, rows in make_rows(num_rows).items()})
    pair.receiving.receiver.admit(stream.stream_id)
    pair.finish(stream, consumer, num_rows)
    pair.assert_works()
    assert not Bomb.fired


def test_forged_blocks_into_granted_memory_are_dropped_and_the_right_ones_still_come(
    pair: Pair, attack: Attacker
) -> None:
    stream, consumer = pair.start(100, admit=False, written=32)
    wait_for(lambda: len(pair.receiving.blocks(stream.stream_id)) == 2)
    (message, frames), _ = pair.receiving.blocks(stream.stream_id)
    held = pair.receiving.receiver._streams.by_id[stream.stream_id].session.window.held
    fresh = replace(message, index=2, block_id=held[2], first_row=32)
    forged = [
        (fresh, frames),  # another block's rows
        (fresh, [os.urandom(len(frame)) for frame in frames]),
        (fresh, [bytes(len(frame)) for frame in frames]),
        (replace(fresh, serial=99), frames),
        (replace(fresh, tag=b"12345678"), frames),
    ]
    for forgery in forged:
        attack.send(*forgery)
    wait_for(lambda: pair.receiving.dropped("bad_tag") == len(forged))
    for sizes in ([frames[0]], [frames[0][:-1], frames[1]], [frames[0], frames[1] + b"x"], [*frames, b""]):
        attack.send(fresh, sizes)
    wait_for(lambda: pair.receiving.dropped("wrong_size") == 4)
    probe = Probe(stream_id=stream.stream_id, epoch=1, nonce=1, tag=bytes(16))
    for nonce in range(1, 6):
        attack.send(replace(probe, nonce=nonce))
    wait_for(lambda: pair.receiving.dropped("bad_tag") == len(forged) + 5)
    assert not consumer.ends and consumer.num_rows == 0
    go_on(pair, stream, consumer)


def test_everything_but_blocks_and_probes_is_dropped_and_counted(pair: Pair, attack: Attacker) -> None:
    stream, consumer = pair.start(100, admit=False, written=32)
    wait_for(lambda: len(pair.receiving.blocks(stream.stream_id)) == 2)
    block, frames = pair.receiving.blocks(stream.stream_id)[0]
    offer = Offer(block_size=16, planes=PLANES, max_frame_bytes=1 << 20, credit=4)
    sid = stream.stream_id
    hostile: list[tuple[Message | bytes, list[bytes]]] = [
        (Open(stream_id=sid, epoch=1, proof=bytes(32), nonce=bytes(16), offer=offer, content_key=""), []),
        (Abort(stream_id=sid, epoch=1, code="Stop", message=""), []),
        (Close(stream_id=sid, epoch=1, total_rows=100), []),
        (Ack(stream_id=sid, epoch=1, serial=0, next_index=2, kept_index=0), []),
        (Call(call_id=1, method="echo", body={}), []),
        (Call(call_id=1, method="echo", body={}), frames),
        (pickle.dumps(Bomb()), []),
        (b"\x02" + pickle.dumps(Bomb()), [pickle.dumps(Bomb())]),
        (b"", []),
        (b"\x01\x80", []),
        (b"\xff" * 90, frames),
        (encode_header(block), [b""] * 1025),
        (encode_header(Probe(stream_id=sid, epoch=1, nonce=1)), [b"frame"]),
    ]
    before, num_seen = pair.receiving.endpoint.stats(), len(pair.receiving.seen)
    for message, extra in hostile:
        attack.send(message, extra)
    wait_for(lambda: pair.receiving.endpoint.stats()["dropped_malformed"] == len(hostile))
    stats = pair.receiving.endpoint.stats()
    assert stats["handler_errors"] == before["handler_errors"] == 0
    later = [message for _, message, _ in pair.receiving.seen[num_seen:]]
    assert all(isinstance(message, (Probe, Announce)) for message in later), f"what its sender repeats, only: {later}"
    go_on(pair, stream, consumer)


def test_a_frame_beyond_a_block_costs_its_sender_the_connection(pair: Pair, attack: Attacker) -> None:
    attack.await_event(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    block = Block(stream_id="0" * 32, epoch=1, index=0, block_id=0, first_row=0, num_rows=1, serial=1, tag=b"")
    attack.send(block, [bytes(1024)])  # the cap of a header is the larger one here
    wait_for(lambda: pair.receiving.dropped("unknown_stream") == 1)
    attack.send(block, [bytes(1025)])
    attack.await_event(zmq.EVENT_DISCONNECTED)
    assert pair.receiving.dropped("unknown_stream") == 1
    pair.assert_works()


@pytest.mark.parametrize("token", ["", "0" * 32, "short"])
def test_who_has_no_token_gets_nothing_through(pair: Pair, token: str) -> None:
    attacker = Attacker(pair.receiving.sealed_address, token)
    try:
        with contextlib.suppress(zmq.Again):  # there is no connection it could go to
            attacker.send(Probe(stream_id="0" * 32, epoch=1, nonce=1))
        attacker.await_event(
            zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_DISCONNECTED
        )
    finally:
        attacker.close()
    pair.assert_works()
    assert pair.receiving.dropped("unknown_stream") == 0
    assert (pair.receiving.endpoint.stats()["refused_keys"] > 0) == bool(token), "without PLAIN it never came so far"


def test_raw_bytes_on_its_port_hurt_nobody(pair: Pair) -> None:
    port = int(split_sealed(pair.receiving.sealed_address)[0].rsplit(":", 1)[1])
    for payload in (b"GET / HTTP/1.1\r\n\r\n", pickle.dumps(Bomb()), os.urandom(5000), b"\xff" + bytes(8) + b"\x7f"):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(payload)
    pair.assert_works()
    assert not Bomb.fired


def test_a_block_of_a_sealed_stream_on_the_control_connection_is_refused(pair: Pair) -> None:
    stream, consumer = pair.start(100, admit=False, written=32)
    wait_for(lambda: len(pair.receiving.blocks(stream.stream_id)) == 2)
    message, frames = pair.receiving.blocks(stream.stream_id)[0]
    pair.sending.endpoint.send(stream.connection, message, frames)
    pair.sending.endpoint.send(stream.connection, Probe(stream_id=stream.stream_id, epoch=1, nonce=1))
    wait_for(lambda: pair.receiving.dropped("wrong_path") == 2)
    go_on(pair, stream, consumer)


def test_the_sealed_path_carries_nothing_else(pair: Pair) -> None:
    endpoint = pair.sending.endpoint
    path = endpoint.connect(pair.receiving.sealed_address)
    assert path.is_sealed_path and pair.receiving.sealed_address.split("#")[1] not in repr(path)
    with pytest.raises(LocalProtocolError, match="cannot go over the path of sealed payloads"):
        endpoint.send(path, Call(call_id=1, method="echo", body={}))
    answers = Answers()
    pair.sending.service.call(path, "echo", {}, on_end=answers.on_end)
    assert answers.failure().code == "LocalProtocolError"
    for wrong in ("tcp://127.0.0.1:1#", "tcp://127.0.0.1:1#token", "ipc:///x#" + "0" * 32):
        with pytest.raises(ConfigError):
            endpoint.connect(wrong)


def test_the_sealed_path_may_drop_at_any_time() -> None:
    pair = Pair()
    address, token = split_sealed(pair.receiving.sealed_address)
    proxy = CuttingProxy(address)
    pair.receiving.receiver._sealed_address = sealed_address(proxy.address, token)
    try:
        stream, consumer = pair.start(640, admit=False)
        wait_for(lambda: len(pair.receiving.blocks(stream.stream_id)) >= 2)
        assert proxy.cut() >= 1, "there was no link to cut"
        pair.receiving.receiver.admit(stream.stream_id)
        for number in itertools.count(1):
            wait_for(lambda n=number: consumer.num_rows >= 128 * n or bool(consumer.ends))  # type: ignore[misc]
            if consumer.ends:
                break
            proxy.cut()
        pair.finish(stream, consumer, 640)
        assert proxy.num_accepted >= 2, "the link was not made again"
        pair.assert_works()
    finally:
        pair.close()
        proxy.close()


def test_idle_paths_are_closed_with_their_connections() -> None:
    pair = Pair()
    pair.sending.sender._config = replace(CONFIG, idle_timeout_s=0.1)  # of connections, and not of streams too
    try:
        pair.assert_works()
        endpoint: Any = pair.sending.endpoint
        wait_for(lambda: not endpoint._dealers and not len(endpoint._peers))
        pair.assert_works()  # closed meanwhile, and made again
    finally:
        pair.close()


@pytest.mark.parametrize("where", ["both", "receiver", "sender"])
def test_seal_true_means_sealed_or_not_at_all(where: str) -> None:
    """Without encrypted connections: sealed Blocks go over the connection; an end that does not seal is refused."""
    configs = [replace(CONFIG, seal=where in ("both", side)) for side in ("receiver", "sender")]
    services = [Service(open_endpoint("tcp://127.0.0.1:0", config), config) for config in configs]
    receiver, sender = StreamReceiver(services[0], configs[0], PLANES), StreamSender(services[1], configs[1])
    for service in services:
        service.start()
    try:
        ticket = Ticket.issue("test")
        consumer = Consumer(receiver, ticket.stream_id)
        receiver.open(ticket, consumer)
        stream = sender.open(ticket, services[0].endpoint.address, None, PLANES)
        stream.announce(100)
        stream.write(0, make_rows(100))
        if where == "both":
            stream.result(WAIT_S)
            wait_for(lambda: bool(consumer.ends))
            assert_rows_equal(consumer, make_rows(100))
            assert stream.session.terms is not None and stream.session.terms.integrity == SEALED
            assert stream.sealed_path is None
        else:
            with pytest.raises(Incompatible, match="integrity"):
                stream.result(WAIT_S)
            wait_for(lambda: bool(consumer.ends))
            assert isinstance(consumer.ends[0], Incompatible)
    finally:
        for service in services:
            service.close()
