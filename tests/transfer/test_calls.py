"""The tables of calls alone: what cannot be sent fails by itself, and a call ends once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence

from transfer.connection import Connection, Frame
from transfer.errors import RemoteFailure
from transfer.protocol.messages import Body, Call, Fail, Message, Parts
from transfer.protocol.wire import MAX_HEADER_BYTES, encode_header
from transfer.service.calls import IncomingCall, IncomingCalls
from transfer.service.outgoing_calls import OnEnd, OutgoingCall, OutgoingCalls

PEER = Connection(endpoint="here", peer="there", key=b"1", outgoing=False)
HUGE = {"text": "x" * MAX_HEADER_BYTES}


class Wire:
    """Sends what can be encoded to a list."""

    def __init__(self) -> None:
        self.sent: list[tuple[Message, list[bytes]]] = []

    def send(self, connection: Connection, message: Message, frames: Sequence[Frame] = ()) -> None:
        encode_header(message)
        self.sent.append((message, [bytes(frame) for frame in frames]))

    def post(self, callback: Callable[[], None]) -> None:
        callback()

    def parts(self) -> dict[int, list[tuple[Body, list[bytes]]]]:
        """What each call got."""
        got: dict[int, list[tuple[Body, list[bytes]]]] = {}
        for message, frames in self.sent:
            if isinstance(message, Parts):
                for part in message.parts:
                    mine, frames = frames[: part.num_frames], frames[part.num_frames :]
                    got.setdefault(part.call_id, []).append((part.body, mine))
        return got

    def failures(self) -> dict[int, str]:
        return {message.call_id: message.code for message, _ in self.sent if isinstance(message, Fail)}


def open_calls(wire: Wire, count: int) -> tuple[IncomingCalls, list[IncomingCall]]:
    table = IncomingCalls(wire, 10)
    calls = [table.open(PEER, Call(call_id=n, method="generate", body={}), []) for n in range(1, count + 1)]
    return table, [call for call in calls if call is not None]


def test_a_part_too_large_for_any_message_fails_its_own_call_only() -> None:
    wire = Wire()
    table, calls = open_calls(wire, 4)
    bodies: list[Body] = [{"n": 0}, HUGE, {"n": 2}, {"n": {3}}]  # the last one cannot travel at all
    table.send_parts(PEER, [(call, body, 0) for call, body in zip(calls, bodies, strict=True)])
    assert wire.parts() == {1: [({"n": 0}, [])], 3: [({"n": 2}, [])]}
    assert wire.failures() == {2: "MessageTooLarge", 4: "LocalProtocolError"}
    assert [call.cancelled for call in calls] == [False, True, False, True]
    assert len(table) == 2


def test_parts_that_are_too_large_together_go_one_by_one_with_their_frames() -> None:
    wire = Wire()
    table, calls = open_calls(wire, 3)
    half = {"text": "x" * (MAX_HEADER_BYTES // 2)}
    counts = (2, 0, 1)
    parts = [(call, half, count) for call, count in zip(calls, counts, strict=True)]
    table.send_parts(PEER, parts, [b"a", b"b", b"c"])
    assert wire.parts() == {1: [(half, [b"a", b"b"])], 2: [(half, [])], 3: [(half, [b"c"])]}
    assert not wire.failures() and len(table) == 3


def test_a_call_that_two_threads_end_ends_once() -> None:
    both_read = threading.Barrier(2)

    class Watched(OutgoingCall):
        """Lets two threads read what to run before either takes it, where nothing keeps them apart."""

        @property
        def _on_end(self) -> OnEnd | None:  # type: ignore[override]
            callback = self.__dict__["callback"]
            with contextlib.suppress(threading.BrokenBarrierError):  # the other one is kept out, as it should be
                both_read.wait(0.2)
            return callback  # type: ignore[no-any-return]

        @_on_end.setter
        def _on_end(self, callback: OnEnd | None) -> None:
            self.__dict__["callback"] = callback

    ends: list[RemoteFailure | None] = []
    call = Watched(OutgoingCalls(Wire(), 10), PEER, "method", None, lambda body, failure: ends.append(failure))
    failure = RemoteFailure("EndpointClosed", "closed")
    threads = [threading.Thread(target=call.finish, args=(None, failure), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == [failure]
