"""ZeroMQ sockets as the endpoint wants them: options, CURVE, and messages sent and received with few objects each.

Knows frames, not what they mean, and no threads: a socket belongs to the thread that uses it.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import zmq

from transfer.config import TransferConfig
from transfer.connection import Connection, Frame
from transfer.endpoints.addresses import ZAP_DOMAIN
from transfer.errors import MalformedMessage, MessageTooLarge
from transfer.protocol.wire import MAX_HEADER_BYTES
from transfer.protocol.wire_fields import MAX_FRAMES

HIGH_WATER_MARK = 256  # messages inside ZeroMQ per peer; the rest waits in our own, byte-bounded outboxes
COPY_BYTES = 65536  # larger frames are sent from where they lie; smaller ones are cheaper to copy than to keep
MAX_KEEPALIVE_COUNT, MAX_KEEPALIVE_S = 127, 32767  # tcp(7); beyond them a connection cannot be made at all
_NOW, _MORE, _IS_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.MORE)  # enums are slow per message


def new_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int, config: TransferConfig) -> zmq.Socket[bytes]:
    """A socket with this package's bounds and timers."""
    sock = context.socket(kind)
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    sock.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    sock.setsockopt(zmq.MAXMSGSIZE, max(config.max_message_bytes, MAX_HEADER_BYTES))
    _notice_dead_hosts(sock, config)
    sock.setsockopt(zmq.RECONNECT_IVL, 50)
    sock.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    return sock


def bind_socket(sock: zmq.Socket[bytes], address: str, config: TransferConfig) -> None:
    """Bind `address`; where it leaves the port open (0), one of the configured range. Raises zmq.ZMQError.

    The first port that is tried is drawn: processes that start together do not all try the same ones.
    """
    ports = config.port_range
    if ports is None or not (address.startswith("tcp://") and address.endswith(":0")):
        sock.bind(address)
        return
    start = secrets.randbelow(len(ports))
    for port in (*ports[start:], *ports[:start]):
        try:
            sock.bind(f"{address.removesuffix('0')}{port}")
            return
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE:
                raise
    raise zmq.ZMQError(zmq.EADDRINUSE, f"every port of {config.ports} is taken")


def _notice_dead_hosts(sock: zmq.Socket[bytes], config: TransferConfig) -> None:
    """Let the kernel give up a TCP connection whose other host is silent for peer_timeout_s, so that it is made anew.

    Not ZeroMQ's own heartbeats: in 4.3.5 their timer aborts the process ("!_io_error", stream_engine_base.cpp) when a
    connection drops while its input is paused, by a full queue or by a key that is still being checked. And they would
    cut off a peer that is only stopped for a while.
    """
    least_s = math.ceil(config.peer_timeout_s / MAX_KEEPALIVE_COUNT)
    interval_s = min(max(1, int(config.ping_interval_s), least_s), MAX_KEEPALIVE_S)
    count = min(max(1, int(config.peer_timeout_s / interval_s)), MAX_KEEPALIVE_COUNT)
    sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
    sock.setsockopt(zmq.TCP_KEEPALIVE_IDLE, interval_s)
    sock.setsockopt(zmq.TCP_KEEPALIVE_INTVL, interval_s)
    sock.setsockopt(zmq.TCP_KEEPALIVE_CNT, count)
    sock.setsockopt(zmq.TCP_MAXRT, int(config.peer_timeout_s * 1000))


def check_frames(peer: str, frames: Sequence[Frame], config: TransferConfig) -> None:
    """MessageTooLarge for frames that may not leave as one message."""
    largest = total = 0
    for frame in frames:
        size = len(frame)
        total += size
        largest = max(largest, size)
    if largest > config.max_message_bytes or len(frames) > MAX_FRAMES:
        raise MessageTooLarge(
            f"{len(frames)} frames of up to {largest} bytes for {peer}; allowed are {MAX_FRAMES} "
            f"of {config.max_message_bytes}: raise max_message_bytes at both ends"
        )
    if total > config.max_outbound_bytes:
        raise MessageTooLarge(
            f"a message of {total} bytes for {peer} is beyond max_outbound_bytes ({config.max_outbound_bytes})"
        )


def send_message(sock: zmq.Socket[bytes], parts: Sequence[Frame]) -> bool:
    """Hand one message to ZeroMQ, whole; False when it takes none now. Raises zmq.ZMQError.

    The first part decides: ZeroMQ takes the rest of a message that it began.
    """
    try:
        for part in parts[:-1]:
            sock.send(part, _MORE, len(part) < COPY_BYTES)
        sock.send(parts[-1], _NOW, len(parts[-1]) < COPY_BYTES)
    except zmq.Again:
        return False
    return True


def receive_message(sock: zmq.Socket[bytes]) -> tuple[bytes, list[memoryview]]:
    """Header and payload frames of a message, the frames as views of ZeroMQ's memory. Raises zmq.Again.

    All parts are taken, whatever they are; MalformedMessage for more than MAX_FRAMES.
    """
    part = sock.recv(_NOW, False)
    header, frames, count = part.bytes, [], 0
    while part.get(_IS_MORE):  # half the price of asking the socket
        part = sock.recv(_NOW, False)
        count += 1
        if count <= MAX_FRAMES:
            frames.append(part.buffer)
    if count > MAX_FRAMES:
        raise MalformedMessage(f"a message of {count} frames")
    return header, frames


def guard_with_curve(
    context: zmq.Context[zmq.Socket[bytes]], router: zmq.Socket[bytes], secret_key: bytes
) -> zmq.Socket[bytes]:
    """Before `router` is bound: ask the socket returned here who may come in. One for all sockets of a context."""
    door = context.socket(zmq.REP)
    door.setsockopt(zmq.LINGER, 0)
    door.bind("inproc://zeromq.zap.01")
    router.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
    router.setsockopt(zmq.CURVE_SERVER, 1)
    router.setsockopt(zmq.CURVE_SECRETKEY, secret_key)
    return door


def dealer_for(
    context: zmq.Context[zmq.Socket[bytes]],
    config: TransferConfig,
    connection: Connection,
    public_key: str | None,
    own_keys: tuple[bytes, bytes],
) -> zmq.Socket[bytes]:
    """A socket that connects to a peer; with CURVE when its public key is given."""
    dealer = new_socket(context, zmq.DEALER, config)
    dealer.setsockopt(zmq.ROUTING_ID, connection.key)
    dealer.setsockopt(zmq.IPV6, int("[" in connection.peer))
    if public_key is not None:
        dealer.setsockopt(zmq.CURVE_SERVERKEY, public_key.encode("ascii"))
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, own_keys[0])
        dealer.setsockopt(zmq.CURVE_SECRETKEY, own_keys[1])
    dealer.connect(connection.peer)
    return dealer
