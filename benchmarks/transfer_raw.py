"""What the transfer benchmark compares with: one TCP connection, and bare ZeroMQ sockets. No protocol, no checks.

Each pair sends [header, block] messages; the receiver answers one byte when the last block of a request is in its slot.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from benchmarks.transfer_memory import Content, Pool

HEADER = bytes(64)
HIGH_WATER_MARK = 32
DONE = b"\1"


class TcpReceiver:
    """recv_into, straight into the slots."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: str = str(self._listener.getsockname()[1])
        self._connection: socket.socket | None = None

    def receive(self, first: int, count: int) -> None:
        connection = self._connection
        if connection is None:
            connection = self._connection = self._listener.accept()[0]
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        header = memoryview(bytearray(len(HEADER)))
        for i in range(first, first + count):
            _fill(connection, header)
            _fill(connection, self._pool.block(i).data)
        connection.sendall(DONE)

    def close(self) -> None:
        for sock in (self._connection, self._listener):
            if sock is not None:
                sock.close()


class TcpSender:
    """sendmsg of header and block."""

    def __init__(self, pool: Pool, address: str) -> None:
        self._pool = pool
        self._connection = socket.create_connection(("127.0.0.1", int(address)))
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, first: int, count: int) -> float:
        """Seconds until the receiver has them all."""
        started = time.perf_counter()
        connection = self._connection
        for i in range(first, first + count):
            block = self._pool.block(i).data
            sent = connection.sendmsg([HEADER, block])
            if sent < len(HEADER) + len(block):  # the header always fits: only the block can be cut
                connection.sendall(block[sent - len(HEADER) :])
        if connection.recv(1) != DONE:
            raise ConnectionError("the receiver is gone")
        return time.perf_counter() - started

    def close(self) -> None:
        self._connection.close()


def _fill(connection: socket.socket, place: memoryview) -> None:
    while place:
        count = connection.recv_into(place)
        if not count:
            raise ConnectionError("the sender is gone")
        place = place[count:]


class BareZmqReceiver:
    """PULL or ROUTER: a message arrives in ZeroMQ's memory and is copied to its slot."""

    def __init__(self, pool: Pool, kind: str, address: str) -> None:
        self._pool = pool
        self._context = zmq.Context()
        self._socket = _socket(self._context, zmq.ROUTER if kind == "router" else zmq.PULL)
        public, secret = zmq.curve_keypair()
        if kind == "curve":
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self._socket.bind(address)
        self._done = _socket(self._context, zmq.PUSH)
        self._done.bind("tcp://127.0.0.1:*")
        addresses = [sock.getsockopt_string(zmq.LAST_ENDPOINT) for sock in (self._socket, self._done)]
        self.address = " ".join([*addresses, public.decode("ascii")])

    def receive(self, first: int, count: int) -> None:
        for i in range(first, first + count):
            frames: list[Any] = self._socket.recv_multipart(copy=False)
            self._pool.block(i)[:] = np.frombuffer(frames[-1].buffer, dtype=np.uint8)
        self._done.send(DONE)

    def close(self) -> None:
        path = self.address.split()[0]
        self._context.destroy(linger=0)
        if path.startswith("ipc://"):
            Path(path.removeprefix("ipc://")).unlink(missing_ok=True)


class BareZmqSender:
    """PUSH or DEALER; blocks are sent from where they lie."""

    def __init__(self, pool: Pool, kind: str, address: str) -> None:
        self._pool = pool
        self._context = zmq.Context()
        self._socket = _socket(self._context, zmq.DEALER if kind == "router" else zmq.PUSH)
        self._done = _socket(self._context, zmq.PULL)
        target, done_target, server_key = address.split()
        if kind == "curve":
            public, secret = zmq.curve_keypair()
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, server_key.encode("ascii"))
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        self._socket.connect(target)
        self._done.connect(done_target)

    def send(self, first: int, count: int) -> float:
        """Seconds until the receiver has them all."""
        started = time.perf_counter()
        for i in range(first, first + count):
            self._socket.send_multipart([HEADER, self._pool.block(i).data], copy=False)
        self._done.recv()
        return time.perf_counter() - started

    def close(self) -> None:
        self._context.destroy(linger=0)


def check_slots(pool: Pool, expected: Content, first: int, count: int) -> bool:
    """Whether the last `count` blocks lie where they belong."""
    return all(expected.matches(i, pool.block(i)) for i in range(first, first + count))


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    sock = context.socket(kind)
    for option in (zmq.SNDHWM, zmq.RCVHWM):
        sock.setsockopt(option, HIGH_WATER_MARK)
    sock.setsockopt(zmq.LINGER, 0)
    return sock
