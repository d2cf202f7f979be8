"""Calls that peers make here: the callee's end of a request with partial answers, and the table that holds them.

Knows messages and connections; sends through the function it is given and knows nothing of what is called. A call's
parts leave in order and numbered, and its end says how many there were, so that the caller notices what a broken link
took away. The table is bounded, every call begins at most once and ends exactly once, and leaves the table at its end:
after its last answer was handed to the endpoint, so that whoever finds no call here finds its end on the way.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from transfer.connection import Connection, Frame
from transfer.errors import EndpointClosed, LocalProtocolError, Overloaded, PeerLost, TransferError, error_code
from transfer.protocol.messages import Body, Call, End, Fail, Message, Part, Parts

logger = logging.getLogger(__name__)

MAX_CALLERS = 4096  # whose last call is remembered

Answer: TypeAlias = "tuple[IncomingCall, Body, int]"
"""A call, a partial answer to it, and how many frames belong to that."""


class CallSender(Protocol):
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
        self.num_parts = 0  # for the table: so many were sent
        self.is_over = False  # for the table: somebody ends it, or ended it
        self.is_old = False  # for the table: it was open when `long_open` was asked before
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
        self._table.send_parts(self.connection, [(self, body, len(frames))], frames)

    def end(self, body: Body | None = None) -> None:
        """The last answer."""
        self._table.end(self, body or {})

    def fail(self, code: str, message: str) -> None:
        """The call failed; `code` is an error's class name."""
        self._table.fail(self, code, message)

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

    def __init__(self, sender: CallSender, max_calls: int) -> None:
        self._sender = sender
        self._max_calls = max_calls
        self._calls: dict[Connection, dict[int, IncomingCall]] = {}
        self._last_ids: OrderedDict[Connection, int] = OrderedDict()  # of each caller's calls, ended ones too
        self._num_calls = 0
        self._lock = threading.Lock()  # guards the three above
        self._sending = threading.Lock()  # answers leave one after the other, in the order of their numbers

    def __len__(self) -> int:
        return self._num_calls

    def connections(self) -> set[Connection]:
        """Peers with open calls here."""
        with self._lock:
            return set(self._calls)

    def open(self, connection: Connection, call: Call, frames: list[memoryview]) -> IncomingCall | None:
        """A new call; None for a repeated or overtaken one: ids rise. Raises Overloaded when the table is full."""
        with self._lock:
            if call.call_id <= self._last_ids.get(connection, 0):
                return None
            self._last_ids[connection] = call.call_id
            self._last_ids.move_to_end(connection)
            while len(self._last_ids) > MAX_CALLERS:
                self._last_ids.popitem(last=False)
            if self._num_calls >= self._max_calls:
                raise Overloaded(f"{self._num_calls} calls are open here: try later or elsewhere")
            incoming = IncomingCall(self, connection, call, frames)
            self._calls.setdefault(connection, {})[call.call_id] = incoming
            self._num_calls += 1
            return incoming

    def end(self, call: IncomingCall, body: Body) -> None:
        """Send the last answer, unless the call ended before. When it cannot be sent the call fails."""
        error: TransferError | None = None
        with self._sending:
            if not self._claim(call):
                return
            try:
                self._sender.send(call.connection, End(call_id=call.call_id, num_parts=call.num_parts, body=body))
            except TransferError as problem:
                _log_unsent("the end", call, problem)
                error = problem
        if error is not None:
            self._tell_failure(call, error_code(error), str(error))
        self._forget(call)

    def fail(self, call: IncomingCall, code: str, message: str) -> None:
        """Send that the call failed, unless it ended before."""
        with self._sending:
            is_mine = self._claim(call)
        if is_mine:
            self._tell_failure(call, code, message)
            self._forget(call)

    def send_parts(self, connection: Connection, answers: Sequence[Answer], frames: Sequence[Frame] = ()) -> None:
        """Partial answers of calls of one peer, in one message; the calls are cancelled when it cannot be sent.

        When one message cannot hold them, or one of them cannot travel, each goes alone, so that only those fail that
        cannot be sent by themselves.
        """
        with self._sending:
            alive = [answer for answer in answers if not answer[0].is_over]
            if not alive or (frames and len(alive) != len(answers)):
                return
            failed = self._send_numbered(connection, alive, frames)
        for call, error in failed:
            if self._claim(call):
                _log_unsent("a partial answer", call, error)
                self._tell_failure(call, error_code(error), str(error))
                self._forget(call)
                self._cancel_later(call)

    def _send_numbered(
        self, connection: Connection, answers: Sequence[Answer], frames: Sequence[Frame]
    ) -> list[tuple[IncomingCall, TransferError]]:
        """Which calls' answers did not leave, and why. One that did not takes its number back."""
        parts = []
        for call, body, num_frames in answers:
            parts.append(Part(call_id=call.call_id, serial=call.num_parts, body=body, num_frames=num_frames))
            call.num_parts += 1
        try:
            self._sender.send(connection, Parts(parts=tuple(parts)), frames)
            return []
        except TransferError as error:
            for call, _, _ in answers:
                call.num_parts -= 1
            if not isinstance(error, LocalProtocolError) or len(answers) == 1:
                return [(call, error) for call, _, _ in answers]
        failed: list[tuple[IncomingCall, TransferError]] = []
        start = 0
        for answer in answers:
            mine = frames[start : start + answer[2]]
            start += answer[2]
            if all(answer[0] is not call for call, _ in failed):  # else what came before it is missing
                failed += self._send_numbered(connection, [answer], mine)
        return failed

    def cancel(self, connection: Connection, call_id: int) -> None:
        """The caller cancelled."""
        call = self._calls.get(connection, {}).get(call_id)
        if call is not None and self._claim(call):
            self._forget(call)
            call.mark_cancelled()

    def unknown(self, connection: Connection, call_ids: Sequence[int]) -> tuple[int, ...]:
        """Which of these calls of a peer are not open here: they never came, or their ends are on the way."""
        with self._lock:
            calls = self._calls.get(connection, {})
            return tuple(call_id for call_id in call_ids if call_id not in calls)

    def long_open(self) -> dict[Connection, list[tuple[int, int]]]:
        """The calls that were open here when this was asked before, and still are, by caller: (id, parts sent)."""
        found: dict[Connection, list[tuple[int, int]]] = {}
        with self._sending, self._lock:
            for connection, calls in self._calls.items():
                for call_id, call in calls.items():
                    if call.is_old:
                        found.setdefault(connection, []).append((call_id, call.num_parts))
                    call.is_old = True
        return found

    def drop(self, connection: Connection | None) -> None:
        """A peer (None: every peer) is gone: cancel its calls."""
        with self._lock:
            gone = [connection] if connection is not None else list(self._calls)
            calls = [call for peer in gone for call in self._calls.pop(peer, {}).values()]
            self._num_calls -= len(calls)
            lost = [call for call in calls if not call.is_over]
            for call in lost:
                call.is_over = True
        for call in lost:
            call.mark_cancelled()

    def _cancel_later(self, call: IncomingCall) -> None:
        try:
            self._sender.post(call.mark_cancelled)
        except TransferError:
            call.mark_cancelled()

    def _tell_failure(self, call: IncomingCall, code: str, message: str) -> None:
        try:
            self._sender.send(call.connection, Fail(call_id=call.call_id, code=code, message=message))
        except TransferError as error:
            _log_unsent("the failure", call, error)

    def _claim(self, call: IncomingCall) -> bool:
        """Whether the one who asks is the first to end this call."""
        with self._lock:
            is_first, call.is_over = not call.is_over, True
            return is_first

    def _forget(self, call: IncomingCall) -> None:
        with self._lock:
            calls = self._calls.get(call.connection, {})
            if calls.get(call.call_id) is not call:
                return
            del calls[call.call_id]
            if not calls:
                del self._calls[call.connection]
            self._num_calls -= 1


def _log_unsent(what: str, call: IncomingCall, error: TransferError) -> None:
    """Where the caller is gone, or this end is closed, nobody misses it."""
    level = logging.INFO if isinstance(error, PeerLost | EndpointClosed) else logging.WARNING
    logger.log(level, "%s of a %r call did not leave: %s", what, call.method, error)
