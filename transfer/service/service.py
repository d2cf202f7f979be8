"""Service: one endpoint's handler. Sorts messages to calls and streams, keeps peers alive or gives them up.

Knows methods by name and nothing of what they do. Handlers, parts, ends and stream listeners run on the endpoint's
I/O thread and must not block it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from transfer.config import TransferConfig
from transfer.connection import Connection, Frame
from transfer.endpoints.contract import Endpoint
from transfer.errors import EndpointClosed, LocalProtocolError, Overloaded, PeerLost, TransferError
from transfer.protocol.liveness import Liveness
from transfer.protocol.messages import Awaiting, Body, Call, Cancel, End, Fail, Message, Parts, Serving, Unknown
from transfer.service.calls import Answer, IncomingCall, IncomingCalls
from transfer.service.outgoing_calls import OnEnd, OnPart, OutgoingCall, OutgoingCalls

logger = logging.getLogger(__name__)

MethodHandler: TypeAlias = Callable[[IncomingCall], None]

CALLS_PER_QUESTION = 8192  # calls that one Awaiting or Serving names


class StreamSide(Protocol):
    """What the service hands stream messages to: a StreamReceiver or a StreamSender."""

    def on_message(self, connection: Connection, message: Any, frames: Sequence[memoryview]) -> bool:
        """Whether the message was for this side."""

    def on_tick(self, now: float) -> None:
        """Time passed."""

    def on_peer_lost(self, connection: Connection, error: PeerLost) -> None:
        """A peer is gone."""

    def restart_loop(self) -> None:
        """The endpoint's loop died in the middle of something and was started anew."""

    def on_close(self) -> None:
        """The service closes: end every stream."""


class Service:
    """Calls and streams over one endpoint."""

    def __init__(
        self, endpoint: Endpoint, config: TransferConfig | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.endpoint = endpoint
        self.config = config or TransferConfig()
        self.now = clock
        self._methods: dict[str, MethodHandler] = {"ping": lambda call: call.end()}
        self._sides: list[tuple[tuple[type, ...], StreamSide]] = []
        self._routes: dict[type, list[StreamSide]] = {}
        self._incoming = IncomingCalls(endpoint, self.config.max_calls)
        self._outgoing = OutgoingCalls(endpoint, self.config.max_calls)
        self._liveness = Liveness(self.config.ping_interval_s, self.config.peer_timeout_s)
        self._next_check = 0.0
        self._next_question = 0.0
        self._called: set[Connection] = set()  # peers that calls were made to; guarded by the lock
        self._lock = threading.Lock()
        self._closed = False  # nothing more is taken; guarded by the lock
        self._is_down = False  # everything was ended: what still comes in is ignored
        self._counts = {"dropped_stray": 0, "dropped_unrouted": 0, "peers_lost": 0}

    def register(self, method: str, handler: MethodHandler) -> None:
        """Answer calls of `method` with `handler`. LocalProtocolError when it is taken."""
        if method in self._methods:
            raise LocalProtocolError(f"method {method!r} is registered already")
        self._methods[method] = handler

    def attach(self, kinds: Sequence[type], side: StreamSide) -> None:
        """Hand messages of these types to `side`, which also gets ticks and losses. Before start()."""
        self._sides.append((tuple(kinds), side))
        for kind in kinds:
            self._routes.setdefault(kind, []).append(side)

    def start(self) -> None:
        """Start the endpoint with this service as its handler."""
        self.endpoint.start(self._on_message, self._on_tick, self._on_restart)

    def close(self) -> None:
        """End every stream and call (on_end: EndpointClosed), then close the endpoint. Safe to repeat."""
        with self._lock:
            already, self._closed = self._closed, True
            endpoint_closed = False
            if not already:
                try:
                    self.endpoint.post(self._shut_down)  # the last callback: under the lock, so all others came before
                except EndpointClosed:
                    endpoint_closed = True
        self.endpoint.close()
        if endpoint_closed:  # somebody closed the endpoint itself: its thread is over, so end everything from here
            self._shut_down()

    def call(
        self,
        connection: Connection,
        method: str,
        body: Body,
        frames: Sequence[Frame] = (),
        *,
        on_part: OnPart | None = None,
        on_end: OnEnd,
    ) -> OutgoingCall:
        """Call `method` at a peer, from any thread.

        `on_part(body, frames)` runs per partial answer; `on_end(body, None)` or `on_end(None, failure)` exactly once.
        Raises EndpointClosed.
        """
        with self._lock:
            self._refuse_when_closed()
            self._called.add(connection)
            return self._outgoing.start(connection, method, body, frames, on_part, on_end)

    def reply_many(self, replies: Sequence[tuple[IncomingCall, Body]]) -> None:
        """One partial answer for each of many calls: one message per peer. From any thread; ended calls are skipped."""
        by_peer: dict[Connection, list[Answer]] = {}
        for call, body in replies:
            by_peer.setdefault(call.connection, []).append((call, body, 0))
        for connection, answers in by_peer.items():
            self._incoming.send_parts(connection, answers)

    def carries_calls(self, connection: Connection) -> bool:
        """Whether a peer was called, or calls: then its connection is not a stream's alone to close."""
        with self._lock:
            return connection in self._called or connection in self._incoming.connections()

    def drop_peer(self, connection: Connection, reason: str) -> None:
        """Declare a peer lost, from any thread: its calls and streams end, what waits for it is forgotten."""
        self.post(lambda: self._lose(connection, reason))

    def post(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the I/O thread. Raises EndpointClosed."""
        with self._lock:
            self._refuse_when_closed()
            self.endpoint.post(callback)

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise EndpointClosed(f"the service at {self.endpoint.address} is closed")

    def stats(self) -> dict[str, int]:
        """Open calls and counters, the endpoint's included."""
        return {
            "calls_incoming": len(self._incoming),
            "calls_outgoing": len(self._outgoing),
            "calls_broken": self._outgoing.num_broken,
            **self._counts,
            **self.endpoint.stats(),
        }

    # -- the I/O thread -------------------------------------------------------------------------------------------

    def _on_message(self, connection: Connection, message: Message, frames: Sequence[memoryview]) -> None:
        if self._is_down:
            return
        self._liveness.heard(connection, self.now())
        sides = self._routes.get(type(message))
        if sides is not None:
            for side in sides:
                if side.on_message(connection, message, frames):
                    return
            self._counts["dropped_stray"] += 1
        elif isinstance(message, Call):
            self._on_call(connection, message, list(frames))
        elif isinstance(message, (Parts, End, Fail)):
            self._counts["dropped_stray"] += self._outgoing.receive(connection, message, frames)
        elif isinstance(message, Cancel):
            self._incoming.cancel(connection, message.call_id)
        elif isinstance(message, Awaiting):
            if unknown := self._incoming.unknown(connection, message.call_ids):
                self._try_send(connection, Unknown(call_ids=unknown))
        elif isinstance(message, Unknown):
            self._outgoing.missing(connection, message.call_ids)
        elif isinstance(message, Serving):
            self._outgoing.served(connection, message.calls)
        else:
            self._counts["dropped_unrouted"] += 1

    def _on_call(self, connection: Connection, message: Call, frames: list[memoryview]) -> None:
        if message.call_id == 0:  # a keep-alive: no call is opened for it
            self._try_send(connection, End(call_id=0, body={}))
            return
        try:
            call = self._incoming.open(connection, message, frames)
        except Overloaded as error:
            self._try_send(connection, Fail(call_id=message.call_id, code="Overloaded", message=str(error)))
            return
        if call is None:
            self._counts["dropped_stray"] += 1
            return
        handler = self._methods.get(message.method)
        if handler is None:
            call.fail("UnknownMethod", f"there is no method {message.method[:64]!r} here")
            return
        try:
            handler(call)
        except Exception:
            logger.exception("the handler of %r failed", message.method)
            call.fail("InternalError", f"the handler of {message.method!r} failed; the worker's log has the details")

    def _on_tick(self, now: float) -> None:
        if self._is_down:
            return
        for _, side in self._sides:
            side.on_tick(self.now())
        now = self.now()
        if now < self._next_check:
            return
        self._next_check = now + self.config.ping_interval_s / 4
        if now >= self._next_question:
            self._next_question = now + self.config.ping_interval_s
            self._compare_calls()
        ping, lost = self._liveness.check(self._incoming.connections() | self._outgoing.connections(), now)
        for connection in ping:
            self._try_send(connection, Call(call_id=0, method="ping", body={}))
        for connection in lost:
            self._lose(connection, f"no sign of life for {self.config.peer_timeout_s:g} s")

    def _compare_calls(self) -> None:
        """Ask peers about the calls that we have shared with them for a while: a link may have lost what ends them."""
        for connection, ids in self._outgoing.long_open().items():
            for first in range(0, len(ids), CALLS_PER_QUESTION):
                self._try_send(connection, Awaiting(call_ids=tuple(ids[first : first + CALLS_PER_QUESTION])))
        for connection, calls in self._incoming.long_open().items():
            for first in range(0, len(calls), CALLS_PER_QUESTION):
                self._try_send(connection, Serving(calls=tuple(calls[first : first + CALLS_PER_QUESTION])))

    def _on_restart(self) -> None:
        if not self._is_down:
            for _, side in self._sides:
                side.restart_loop()

    def _lose(self, connection: Connection, reason: str) -> None:
        self._counts["peers_lost"] += 1
        error = PeerLost(f"{connection.peer}: {reason}")
        logger.warning("lost peer %s: %s", connection.peer, reason)
        self.endpoint.disconnect(connection)  # first: who tries again when told must get a new connection
        with self._lock:
            self._called.discard(connection)
        for _, side in self._sides:
            side.on_peer_lost(connection, error)
        self._outgoing.drop(connection, "PeerLost", str(error))
        self._incoming.drop(connection)

    def _shut_down(self) -> None:
        self._is_down = True
        for _, side in self._sides:
            side.on_close()
        self._outgoing.drop(None, "EndpointClosed", f"{self.endpoint.address} was closed")
        self._incoming.drop(None)

    def _try_send(self, connection: Connection, message: Message) -> None:
        try:
            self.endpoint.send(connection, message)
        except TransferError as error:
            logger.info("a %s did not leave: %s", type(message).__name__, error)
