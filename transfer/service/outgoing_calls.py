"""Calls made from here: the caller's end of a request with partial answers, and the table that holds them.

A link that breaks may take messages with it. The parts of a call are numbered and its end says how many there were: a
call with a gap fails with PeerLost and is cancelled at the far end, so that no answer with a hole ends well. What has
no end because its Call, its last parts or its end were lost is found by asking: see `long_open` and `missing`. Ids rise
in the order in which calls leave, so that the far end begins none twice.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

from transfer.connection import Connection, Frame
from transfer.errors import Overloaded, PeerLost, RemoteFailure, TransferError, error_code
from transfer.protocol.messages import Body, Call, Cancel, End, Fail, Parts
from transfer.service.calls import CallSender

logger = logging.getLogger(__name__)

OnPart: TypeAlias = Callable[[Body, list[memoryview]], None]
OnEnd: TypeAlias = Callable[[Body | None, RemoteFailure | None], None]


class OutgoingCall:
    """A call made from here. `cancel` may be called from any thread, any number of times."""

    def __init__(
        self, table: OutgoingCalls, connection: Connection, method: str, on_part: OnPart | None, on_end: OnEnd
    ) -> None:
        self.call_id = 0  # for the table: given when it leaves
        self.num_parts = 0  # for the table: so many came
        self.is_old = False  # for the table: it was open when `long_open` was asked before
        self.connection = connection
        self.method = method
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
                logger.exception("on_end of a %r call failed", self.method)

    @property
    def ended(self) -> bool:
        """Whether on_end ran."""
        return self._on_end is None


class OutgoingCalls:
    """Calls made from here that did not end. Its dict is touched on the I/O thread only."""

    def __init__(self, sender: CallSender, max_calls: int) -> None:
        self.num_broken = 0  # calls that lost messages
        self._sender = sender
        self._max_calls = max_calls
        self._calls: dict[int, OutgoingCall] = {}
        self._ids = itertools.count(1)  # 0 is the keep-alive ping

    def __len__(self) -> int:
        return len(self._calls)

    def connections(self) -> set[Connection]:
        """Peers we wait for."""
        return {call.connection for call in self._calls.values()}

    def long_open(self) -> dict[Connection, list[int]]:
        """The calls that waited for their ends when this was asked before, and still do; by callee."""
        ids: dict[Connection, list[int]] = {}
        for call_id, call in self._calls.items():
            if call.is_old:
                ids.setdefault(call.connection, []).append(call_id)
            call.is_old = True
        return ids

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
        call = OutgoingCall(self, connection, method, on_part, on_end)

        def begin() -> None:
            if call.ended:
                return
            try:
                if len(self._calls) >= self._max_calls:
                    raise Overloaded(f"{len(self._calls)} calls wait for answers: try later")
                call.call_id = next(self._ids)
                self._sender.send(connection, Call(call_id=call.call_id, method=method, body=body), frames)
                self._calls[call.call_id] = call
            except TransferError as error:
                call.finish(None, RemoteFailure(error_code(error), str(error)))

        self._sender.post(begin)
        return call

    def cancel(self, call: OutgoingCall) -> None:
        """See OutgoingCall.cancel."""

        def stop() -> None:
            if self._calls.pop(call.call_id, None) is not None:
                self._send_cancel(call.connection, call.call_id)
            call.finish(None, RemoteFailure("Cancelled", "the caller cancelled the call"))

        try:
            self._sender.post(stop)
        except TransferError:
            call.finish(None, RemoteFailure("Cancelled", "the caller cancelled the call"))

    def receive(self, connection: Connection, message: Parts | End | Fail, frames: Sequence[memoryview]) -> int:
        """An answer; returns how many of its parts belong to no open call of that peer, or came before."""
        if isinstance(message, Parts):
            return self._receive_parts(connection, message, frames)
        call = self._find(connection, message.call_id)
        if call is None:
            return int(message.call_id != 0)
        if isinstance(message, End) and message.num_parts != call.num_parts:
            self._break(call, f"it ended after {message.num_parts} parts, and {call.num_parts} of them came")
            return 0
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
            call = self._find(connection, part.call_id)
            if call is None or part.serial < call.num_parts:
                stray += 1
                continue
            if part.serial > call.num_parts:
                self._break(call, f"part {part.serial} came where part {call.num_parts} was due")
                continue
            call.num_parts += 1
            try:
                call.take_part(part.body, mine)
            except Exception:
                logger.exception("on_part of a %r call failed", call.method)
                self._give_up(call, "InternalError", f"a partial answer of a {call.method!r} call could not be used")
        return stray

    def missing(self, connection: Connection, call_ids: Sequence[int]) -> None:
        """The callee does not know these calls: what still waits of them would wait for ever."""
        for call_id in call_ids:
            call = self._find(connection, call_id)
            if call is not None:
                self._break(call, "the far end does not know it: its start or its end was lost")

    def served(self, connection: Connection, calls: Sequence[tuple[int, int]]) -> None:
        """The callee works on these calls and sent so many parts: cancel those that nobody here waits for, or that
        lost some.
        """
        for call_id, num_parts in calls:
            call = self._find(connection, call_id)
            if call is None:
                self._send_cancel(connection, call_id)
            elif num_parts > call.num_parts:
                self._break(call, f"of {num_parts} parts {call.num_parts} came")

    def drop(self, connection: Connection | None, code: str, reason: str) -> None:
        """A peer (None: every peer) is gone: fail its calls."""
        gone = [c for c in self._calls.values() if connection is None or c.connection == connection]
        for call in gone:
            del self._calls[call.call_id]
            call.finish(None, RemoteFailure(code, reason))

    def _find(self, connection: Connection, call_id: int) -> OutgoingCall | None:
        call = self._calls.get(call_id)
        return call if call is not None and call.connection == connection else None

    def _break(self, call: OutgoingCall, what: str) -> None:
        """The link lost messages of a call: nothing that still comes can mend it."""
        self.num_broken += 1
        reason = f"the link to {call.connection.peer} broke during a {call.method!r} call ({what}): make it again"
        logger.warning("%s", reason)
        self._give_up(call, PeerLost.__name__, reason)

    def _give_up(self, call: OutgoingCall, code: str, reason: str) -> None:
        if self._calls.pop(call.call_id, None) is not None:
            self._send_cancel(call.connection, call.call_id)
            call.finish(None, RemoteFailure(code, reason))

    def _send_cancel(self, connection: Connection, call_id: int) -> None:
        try:
            self._sender.send(connection, Cancel(call_id=call_id))
        except TransferError as error:
            logger.info("a cancel did not leave: %s", error)  # the callee asks about the call later on
