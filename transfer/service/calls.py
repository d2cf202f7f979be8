"""Calls: the two ends of one request with partial answers, and the tables that hold them.

Knows messages and connections; sends through the function it is given and knows nothing of what is called.
Tables are bounded, every call ends exactly once, and an ended call leaves its table at once.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from transfer.connection import Connection, Frame
from transfer.errors import LocalProtocolError, Overloaded, RemoteFailure, TransferError, error_code
from transfer.protocol.messages import Body, Call, Cancel, End, Fail, Message, Part, Parts

logger = logging.getLogger(__name__)

OnPart: TypeAlias = Callable[[Body, list[memoryview]], None]
OnEnd: TypeAlias = Callable[[Body | None, RemoteFailure | None], None]


class Sender(Protocol):
    """What calls need of an endpoint."""

    def send(self, connection: Connection, message: Message, frames: Sequence[Frame] = ()) -> None:
        """Queue a message."""

    def post(self, callback: Callable[[], None]) -> None:
        """Run on the I/O thread."""


class IncomingCall:
    """A call that a peer made here. Its methods may be called from any thread; after its end they do nothing."""

    def __init__(self, table: IncomingCalls, connection: Connection, call: Call, frames: list[memoryview]) -> None:
        self.connection = connection
        self.call_id = call.call_id
        self.method = call.method
        self.body = call.body
        self.frames = frames
        self._table = table
        self._lock = threading.Lock()
        self._cancelled = False
        self._on_cancel: Callable[[], None] | None = None

    @property
    def cancelled(self) -> bool:
        """Whether the caller went away or cancelled."""
        return self._cancelled

    def reply(self, body: Body, frames: Sequence[Frame] = ()) -> None:
        """One partial answer. When it cannot be sent the call is cancelled here and failed there."""
        part = Part(call_id=self.call_id, body=body, num_frames=len(frames))
        self._table.send_parts(self.connection, [(self, part)], frames)

    def end(self, body: Body | None = None) -> None:
        """The last answer."""
        self._table.finish(self, End(call_id=self.call_id, body=body or {}))

    def fail(self, code: str, message: str) -> None:
        """The call failed; `code` is an error's class name."""
        self._table.finish(self, Fail(call_id=self.call_id, code=code, message=message))

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Run `callback` once if the caller cancels or is lost before the end; at once if that happened already."""
        with self._lock:
            self._on_cancel = callback
            run = self._cancelled
        if run:
            callback()

    def mark_cancelled(self) -> None:
        """For the table: the call was taken out because nobody waits for it any more."""
        with self._lock:
            if self._cancelled:
                return
            self._cancelled = True
            callback = self._on_cancel
        if callback is not None:
            try:
                callback()
            except Exception:
                logger.exception("on_cancel of a %r call failed", self.method)


class IncomingCalls:
    """Open calls of all peers, by connection and call id."""

    def __init__(self, sender: Sender, max_calls: int) -> None:
        self._sender = sender
        self._max_calls = max_calls
        self._calls: dict[Connection, dict[int, IncomingCall]] = {}
        self._num_calls = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._num_calls

    def connections(self) -> set[Connection]:
        """Peers with open calls here."""
        with self._lock:
            return set(self._calls)

    def open(self, connection: Connection, call: Call, frames: list[memoryview]) -> IncomingCall | None:
        """A new call; None for a repeated call id. Raises Overloaded when the table is full."""
        with self._lock:
            if self._num_calls >= self._max_calls:
                raise Overloaded(f"{self._num_calls} calls are open here: try later or elsewhere")
            calls = self._calls.setdefault(connection, {})
            if call.call_id in calls:
                return None
            incoming = calls[call.call_id] = IncomingCall(self, connection, call, frames)
            self._num_calls += 1
            return incoming

    def finish(self, call: IncomingCall, message: End | Fail) -> None:
        """Send the last answer, unless the call ended before."""
        if not self._remove(call):
            return
        try:
            self._sender.send(call.connection, message)
        except TransferError as error:
            logger.warning("the end of a %r call did not leave: %s", call.method, error)
            if isinstance(message, End):
                self._tell_failure(call, error)

    def send_parts(
        self, connection: Connection, parts: Sequence[tuple[IncomingCall, Part]], frames: Sequence[Frame] = ()
    ) -> None:
        """Partial answers of calls of one peer, in one message; the calls are cancelled when it cannot be sent.

        When one message cannot hold them, or one of them cannot travel, each goes alone, so that only those fail that
        cannot be sent by themselves.
        """
        alive = [(call, part) for call, part in parts if self._is_open(call)]
        if not alive or (frames and len(alive) != len(parts)):
            return
        try:
            self._sender.send(connection, Parts(parts=tuple(part for _, part in alive)), frames)
        except TransferError as error:
            if isinstance(error, LocalProtocolError) and len(alive) > 1:
                start = 0
                for call, part in alive:
                    self.send_parts(connection, [(call, part)], frames[start : start + part.num_frames])
                    start += part.num_frames
                return
            logger.warning("partial answers did not leave: %s", error)
            for call, _ in alive:
                if self._remove(call):
                    self._tell_failure(call, error)
                    self._cancel_later(call)

    def cancel(self, connection: Connection, call_id: int) -> None:
        """The caller cancelled."""
        call = self._calls.get(connection, {}).get(call_id)
        if call is not None and self._remove(call):
            call.mark_cancelled()

    def drop(self, connection: Connection | None) -> None:
        """A peer (None: every peer) is gone: cancel its calls."""
        with self._lock:
            gone = [connection] if connection is not None else list(self._calls)
            calls = [call for peer in gone for call in self._calls.pop(peer, {}).values()]
            self._num_calls -= len(calls)
        for call in calls:
            call.mark_cancelled()

    def _cancel_later(self, call: IncomingCall) -> None:
        try:
            self._sender.post(call.mark_cancelled)
        except TransferError:
            call.mark_cancelled()

    def _tell_failure(self, call: IncomingCall, error: TransferError) -> None:
        try:
            self._sender.send(call.connection, Fail(call_id=call.call_id, code=error_code(error), message=str(error)))
        except TransferError as second:
            logger.warning("a %r call's failure did not leave either: %s", call.method, second)

    def _is_open(self, call: IncomingCall) -> bool:
        return self._calls.get(call.connection, {}).get(call.call_id) is call

    def _remove(self, call: IncomingCall) -> bool:
        with self._lock:
            calls = self._calls.get(call.connection, {})
            if calls.get(call.call_id) is not call:
                return False
            del calls[call.call_id]
            if not calls:
                del self._calls[call.connection]
            self._num_calls -= 1
            return True


class OutgoingCall:
    """A call made from here. `cancel` may be called from any thread, any number of times."""

    def __init__(
        self, table: OutgoingCalls, call_id: int, connection: Connection, on_part: OnPart | None, on_end: OnEnd
    ) -> None:
        self.call_id = call_id
        self.connection = connection
        self._table = table
        self._on_part = on_part
        self._on_end: OnEnd | None = on_end
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Tell the far end, and end here with RemoteFailure("Cancelled", ...) unless it ended already."""
        self._table.cancel(self)

    def take_part(self, body: Body, frames: list[memoryview]) -> None:
        """For the table: a partial answer came."""
        if self._on_end is not None and self._on_part is not None:
            self._on_part(body, frames)

    def finish(self, body: Body | None, failure: RemoteFailure | None) -> None:
        """For the table, from any thread: the first end counts, later ones are ignored."""
        with self._lock:
            on_end, self._on_end = self._on_end, None
        if on_end is not None:
            try:
                on_end(body, failure)
            except Exception:
                logger.exception("on_end of call %d failed", self.call_id)

    @property
    def ended(self) -> bool:
        """Whether on_end ran."""
        return self._on_end is None


class OutgoingCalls:
    """Calls made from here that did not end. Its dict is touched on the I/O thread only."""

    def __init__(self, sender: Sender, max_calls: int) -> None:
        self._sender = sender
        self._max_calls = max_calls
        self._calls: dict[int, OutgoingCall] = {}
        self._ids = itertools.count(1)  # 0 is the keep-alive ping

    def __len__(self) -> int:
        return len(self._calls)

    def connections(self) -> set[Connection]:
        """Peers we wait for."""
        return {call.connection for call in self._calls.values()}

    def start(
        self,
        connection: Connection,
        method: str,
        body: Body,
        frames: Sequence[Frame],
        on_part: OnPart | None,
        on_end: OnEnd,
    ) -> OutgoingCall:
        """Make a call, from any thread. Raises EndpointClosed; every other failure goes to on_end."""
        call = OutgoingCall(self, next(self._ids), connection, on_part, on_end)
        message = Call(call_id=call.call_id, method=method, body=body)

        def begin() -> None:
            if call.ended:
                return
            try:
                if len(self._calls) >= self._max_calls:
                    raise Overloaded(f"{len(self._calls)} calls wait for answers: try later")
                self._sender.send(connection, message, frames)
                self._calls[call.call_id] = call
            except TransferError as error:
                call.finish(None, RemoteFailure(error_code(error), str(error)))

        self._sender.post(begin)
        return call

    def cancel(self, call: OutgoingCall) -> None:
        """See OutgoingCall.cancel."""

        def stop() -> None:
            if self._calls.pop(call.call_id, None) is not None:
                try:
                    self._sender.send(call.connection, Cancel(call_id=call.call_id))
                except TransferError as error:
                    logger.info("a cancel did not leave: %s", error)
            call.finish(None, RemoteFailure("Cancelled", "the caller cancelled the call"))

        try:
            self._sender.post(stop)
        except TransferError:
            call.finish(None, RemoteFailure("Cancelled", "the caller cancelled the call"))

    def receive(self, connection: Connection, message: Parts | End | Fail, frames: Sequence[memoryview]) -> int:
        """An answer; returns how many of its parts belong to no open call of that peer."""
        if isinstance(message, Parts):
            return self._receive_parts(connection, message, frames)
        call = self._calls.get(message.call_id)
        if call is None or call.connection != connection:
            return int(message.call_id != 0)
        del self._calls[message.call_id]
        if isinstance(message, End):
            call.finish(message.body, None)
        else:
            call.finish(None, RemoteFailure(message.code, message.message))
        return 0

    def _receive_parts(self, connection: Connection, message: Parts, frames: Sequence[memoryview]) -> int:
        start = stray = 0
        for part in message.parts:
            mine = list(frames[start : start + part.num_frames])
            start += part.num_frames
            call = self._calls.get(part.call_id)
            if call is None or call.connection != connection:
                stray += 1
                continue
            try:
                call.take_part(part.body, mine)
            except Exception:
                logger.exception("on_part of call %d failed", part.call_id)
        return stray

    def drop(self, connection: Connection | None, code: str, reason: str) -> None:
        """A peer (None: every peer) is gone: fail its calls."""
        gone = [c for c in self._calls.values() if connection is None or c.connection == connection]
        for call in gone:
            del self._calls[call.call_id]
            call.finish(None, RemoteFailure(code, reason))
