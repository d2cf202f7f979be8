"""ZmqEndpoint: one ROUTER bound, one DEALER per peer we connect to, one thread that owns them all.

Sends from any thread go to a bounded outbox per peer and wake the thread once;
received payload frames are views of ZeroMQ's own memory. CURVE with an allow-list guards tcp between hosts; private
keys exist only inside this object. What does not decode is dropped and counted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import zmq

from transfer.config import TransferConfig
from transfer.connection import Connection, Frame
from transfer.endpoints.addresses import (
    AllowList,
    check_bind_host,
    is_loopback,
    prepare_ipc,
    raw_key,
    sealed_address,
    tcp_host,
)
from transfer.endpoints.endpoint_base import EndpointBase
from transfer.endpoints.outbox import Outbox
from transfer.endpoints.peer_book import MAX_PEERS, PeerBook, check_peer
from transfer.endpoints.zmq_sealed import ON_SEALED_PATH, bind_sealed, connect_sealed, decode_sealed
from transfer.endpoints.zmq_sockets import (
    check_frames,
    dealer_for,
    guard_with_curve,
    new_socket,
    receive_message,
    send_message,
)
from transfer.errors import (
    ConfigError,
    EndpointClosed,
    LocalProtocolError,
    MalformedMessage,
    PeerLost,
)
from transfer.protocol.liveness import Silence
from transfer.protocol.messages import Message
from transfer.protocol.wire import decode_header, encode_header

logger = logging.getLogger(__name__)

BLOCKED_POLL_MS = 2  # how soon to try again when ZeroMQ's own queue for a peer is full
BATCH = 64  # messages read from one socket before the others get their turn


class ZmqEndpoint(EndpointBase):
    """An endpoint on tcp:// or ipc://; see `connection.Endpoint` for the contract."""

    def __init__(self, address: str, config: TransferConfig, *, curve: bool | None = None) -> None:
        """Bind `address`. ConfigError when it cannot be bound or would be open to strangers."""
        super().__init__(config)
        is_tcp = address.startswith("tcp://")
        self._curve = (is_tcp and not is_loopback(tcp_host(address))) if curve is None else curve
        if self._curve and not is_tcp:
            raise ConfigError(f"{address}: CURVE is for tcp; an ipc socket is guarded by its folder's rights")
        if is_tcp:
            check_bind_host(address)
        else:
            prepare_ipc(address)
        self._allow_list = AllowList()
        self._public, self._secret = zmq.curve_keypair()
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, MAX_PEERS + 64)
        self._zap: zmq.Socket[bytes] | None = None
        self._router = new_socket(self._context, zmq.ROUTER, config)
        try:
            self._bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"cannot bind {address}: {error.strerror}") from error
        self._address: str = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._poller = zmq.Poller()
        self._dealers: dict[Connection, zmq.Socket[bytes]] = {}
        self._connection_of: dict[zmq.Socket[bytes], Connection] = {}
        self._peers = PeerBook(self._address)
        self._outboxes: dict[Connection, Outbox] = {}
        self._dirty: set[Connection] = set()  # outboxes that may hold something
        self._counts["connections_renewed"] = 0
        self._silence = Silence(config.peer_timeout_s)
        self._awake = False

    def _bind(self, address: str) -> None:
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # an unknown peer is an error, not a silent drop
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a reconnected peer keeps its (random, private) identity
        self._router.setsockopt(zmq.IPV6, int("[" in address))
        if self._curve:
            self._zap = guard_with_curve(self._context, self._router, self._secret)
        self._router.bind(address)

    # -- any thread -----------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """tcp://HOST:PORT (the real port) or ipc://PATH."""
        return self._address

    @property
    def public_key(self) -> str | None:
        """Our CURVE public key, None where CURVE is off."""
        return self._public.decode("ascii") if self._curve else None

    def listen_sealed(self, max_frame_bytes: int) -> str | None:
        """See `connection.Endpoint`. ConfigError when there is no port for it, EndpointClosed."""
        if not self._curve:
            return None
        pull = bind_sealed(self._context, self._config, self._address, max_frame_bytes)
        address = pull.getsockopt_string(zmq.LAST_ENDPOINT)
        self._connection_of[pull] = self._peers.sealed_path
        try:
            self.post(lambda: self._poller.register(pull, zmq.POLLIN))  # it is the I/O thread's from here on
        except EndpointClosed:
            pull.close(linger=0)
            raise
        return sealed_address(address, self._allow_list.token)

    def connect(self, address: str, public_key: str | None = None) -> Connection:
        """The connection to `address`; the socket follows with the first message. The peer need not be up yet."""
        check_peer(self._address, address, public_key, is_encrypted=self._curve)
        with self._lock:
            return self._peers.make(address, public_key)

    def send(self, connection: Connection, message: Message, frames: Sequence[Frame] = ()) -> None:
        """Queue for the I/O thread; at once when called on it and nothing waits."""
        if frames:
            check_frames(connection.peer, frames, self._config)
        if connection.is_sealed_path and not isinstance(message, ON_SEALED_PATH):
            raise LocalProtocolError(f"a {type(message).__name__} cannot go over the path of sealed payloads")
        header = encode_header(message)
        parts = (header, *frames) if connection.outgoing else (connection.key, header, *frames)
        if self._closed:
            raise EndpointClosed(f"{self._address} is closed")
        if not self._on_thread():
            self._queue(connection, parts)
            self._wake()
            return
        self._check_connected(connection)
        if connection in self._outboxes or not self._send_now(connection, parts):
            self._queue(connection, parts)

    def _queue(self, connection: Connection, parts: Sequence[Frame]) -> None:
        with self._lock:
            self._outbox(connection).put(parts)
            self._dirty.add(connection)

    def _outbox(self, connection: Connection) -> Outbox:
        outbox = self._outboxes.get(connection)
        if outbox is None:
            self._check_connected(connection)
            config = self._config
            outbox = Outbox(connection.peer, config.max_outbound_messages, config.max_outbound_bytes)
            self._outboxes[connection] = outbox
        return outbox

    def _check_connected(self, connection: Connection) -> None:
        if connection.outgoing and self._peers.way_to(connection) is None:
            raise PeerLost(f"{connection.peer} was disconnected")

    def allow(self, public_keys: Iterable[str]) -> None:
        """Let these CURVE keys in, and no others. ConfigError for a malformed key; then nothing changes."""
        self._allow_list.replace([raw_key(key) for key in public_keys])

    def disconnect(self, connection: Connection) -> None:
        """Forget a peer; its socket closes on the I/O thread."""
        with self._lock:
            self._outboxes.pop(connection, None)
            self._peers.forget(connection)
        with contextlib.suppress(EndpointClosed):
            self.post(lambda: self._close_dealer(connection))

    def close(self) -> None:
        """Run what was posted, flush what can be flushed at once, stop."""
        with self._lock:
            already, self._closing = self._closing, True
        thread = self._thread
        self._wake()
        if thread is None and not already:
            self._run_posted()
            self._dispose()
        elif thread is not None and not self._on_thread():
            thread.join()

    def stats(self) -> dict[str, int]:
        """Counters since the start."""
        return {**self._counts, "refused_keys": self._allow_list.num_refused, "outboxes": len(self._outboxes)}

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):  # full: the thread wakes anyway; closed: nobody to wake
                self._wake_write.send(b"\0")

    # -- the I/O thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._wake_read, zmq.POLLIN)
        if self._zap is not None:
            self._poller.register(self._zap, zmq.POLLIN)
        while not (self._closing and not self._posted):
            wait_ms = int(self._seconds_to_tick() * 1000) + 1
            if self._posted:
                wait_ms = 0
            elif self._dirty:
                wait_ms = min(wait_ms, BLOCKED_POLL_MS)
            for sock, _ in self._poller.poll(wait_ms):
                self._guard(self._read_ready, sock)
            self._run_posted()
            self._flush()
            self._maybe_tick()
            self._renew_silent()
        self._flush()
        self._dispose()

    def _read_ready(self, sock: Any) -> None:
        if sock is self._router:
            self._read(self._router, None)
        elif sock is self._zap:
            self._zap.send_multipart(self._allow_list.answer(self._zap.recv_multipart(zmq.NOBLOCK)))
        elif isinstance(sock, zmq.Socket):
            self._read(sock, self._connection_of.get(sock))
        else:
            with contextlib.suppress(BlockingIOError):
                self._wake_read.recv(4096)
            self._awake = False  # after draining, or a wake-up in between would be swallowed; the loop looks after this

    def _read(self, sock: zmq.Socket[bytes], connection: Connection | None) -> None:
        is_router = sock is self._router
        if connection is not None:
            self._silence.heard(connection)
        for _ in range(BATCH):
            if sock.closed:
                return
            try:
                if is_router:
                    connection = self._peers.came(sock.recv(zmq.NOBLOCK))
                header, frames = receive_message(sock)  # there at once when there was an identity
                is_sealed_path = connection is not None and connection.is_sealed_path
                message = (decode_sealed if is_sealed_path else decode_header)(header, len(frames))
            except zmq.Again:
                return
            except MalformedMessage as error:
                self._counts["dropped_malformed"] += 1
                logger.debug("dropped a message on %s: %s", self._address, error)
                continue
            if connection is None:  # what was lost with it is asked for again, as everything that is
                self._counts["dropped_old_link"] += 1
                continue
            self._dispatch(connection, message, frames)

    def _flush(self) -> None:
        with self._lock:
            dirty, self._dirty = self._dirty, set()
        for connection in dirty:
            outbox = self._outboxes.get(connection)
            if outbox is not None:
                self._flush_one(connection, outbox)

    def _flush_one(self, connection: Connection, outbox: Outbox) -> None:
        """Send what ZeroMQ takes; the rest stays and is tried again soon."""
        while (parts := outbox.head()) is not None:
            if not self._send_now(connection, parts):
                with self._lock:
                    self._dirty.add(connection)
                return
            outbox.pop()
        with self._lock:
            if not outbox and self._outboxes.get(connection) is outbox:
                del self._outboxes[connection]

    def _send_now(self, connection: Connection, parts: Sequence[Frame]) -> bool:
        """False when ZeroMQ takes nothing for this peer now. For an unreachable peer a message is dropped."""
        sock = self._dealer(connection) if connection.outgoing else self._router
        if connection.outgoing and not connection.is_sealed_path:  # on that one nothing ever comes back
            self._silence.sent(connection, time.monotonic())
        try:
            return send_message(sock, parts)
        except zmq.ZMQError as error:
            self._counts["dropped_unreachable"] += 1
            logger.debug("dropped a message for %s: %s", connection.peer, error)
            return True

    def _dealer(self, connection: Connection) -> zmq.Socket[bytes]:
        dealer = self._dealers.get(connection)
        if dealer is None:
            address, public_key = self._peers.way_to(connection) or (connection.peer, None)
            if connection.is_sealed_path:
                dealer = connect_sealed(self._context, self._config, address)
            else:
                dealer = dealer_for(self._context, self._config, connection, public_key, (self._public, self._secret))
            self._dealers[connection] = dealer
            self._connection_of[dealer] = connection
            self._poller.register(dealer, zmq.POLLIN)
        return dealer

    def _renew_silent(self) -> None:
        """Let go of sockets that no answer comes from: the link may be dead without our kernel knowing (half open,
        or out of step for a damaged byte). What is sent next goes over a new one, to the same peer under the same name.
        """
        for connection in self._silence.take_silent(time.monotonic()):
            self._counts["connections_renewed"] += 1
            logger.info("%s is silent: connecting anew", connection.peer)
            self._close_dealer(connection)

    def _close_dealer(self, connection: Connection) -> None:
        self._silence.heard(connection)
        dealer = self._dealers.pop(connection, None)
        if dealer is not None:
            del self._connection_of[dealer]
            self._poller.unregister(dealer)
            dealer.close(linger=0)

    def _dispose(self) -> None:
        self._closed = True
        self._context.destroy(linger=200)
        self._wake_read.close()
        self._wake_write.close()
        self._outboxes.clear()
        if self._address.startswith("ipc://"):
            with contextlib.suppress(OSError):
                os.unlink(Path(self._address.removeprefix("ipc://")))


def open_zmq(address: str, config: TransferConfig, curve: bool | None) -> ZmqEndpoint:
    """For `endpoint.open_endpoint`."""
    return ZmqEndpoint(address, config, curve=curve)
