"""Calls over links that lose, repeat and overtake messages, or break: an answer is whole or the call fails, and soon.

On a virtual network every message of a call meets every fault; on real sockets the chaos proxy cuts the link. The far
end never begins a call twice and never works on for nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transfer.test_endpoints import wait_for
from tests.transfer.virtual import VirtualEndpoint, VirtualNetwork
from transfer.chaos.proxy import ChaosProxy
from transfer.config import TransferConfig
from transfer.connection import Connection
from transfer.endpoints.endpoint import open_endpoint
from transfer.errors import RemoteFailure
from transfer.protocol.messages import Awaiting, Call, Cancel, End, Fail, Message, Parts, Serving, Unknown
from transfer.service.calls import IncomingCall
from transfer.service.service import Service

CONFIG = TransferConfig(ping_interval_s=0.5, peer_timeout_s=5.0)
NOTICED_S = 2 * CONFIG.ping_interval_s + CONFIG.ping_interval_s / 2  # two questions, and the tick that asks them
OF_CALLS = (Call, Parts, End, Fail, Cancel, Awaiting, Unknown, Serving)
WAIT_S = 60.0


class FaultyNetwork(VirtualNetwork):
    """Does to the n-th message of calls (pings not counted) what `plan` says: drop, repeat, or let the next pass it."""

    def __init__(self, plan: dict[int, str] | None = None) -> None:
        super().__init__()
        self.plan = plan or {}
        self.lose: type | None = None  # every message of this kind
        self.lost: list[Message] = []
        self._num_seen = 0
        self._held: list[Any] = []

    def push(self, target: VirtualEndpoint, source: Connection, message: Message, frames: list[bytes]) -> None:
        action = None
        if isinstance(message, OF_CALLS) and getattr(message, "call_id", None) != 0:
            action = self.plan.get(self._num_seen)
            self._num_seen += 1
        if action == "drop" or (self.lose is not None and isinstance(message, self.lose)):
            self.lost.append(message)
            return
        if action == "late":
            self._held.append((target, source, message, frames))
            return
        held, self._held = self._held, []
        for parcel in ((target, source, message, frames), *held):
            super().push(*parcel)
            if action == "repeat" and parcel[2] is message:
                super().push(*parcel)


class Caller:
    """What came of one call, checked as it comes: parts in order without a hole, one end, nothing after it."""

    def __init__(self) -> None:
        self.parts: list[int] = []
        self.ends: list[tuple[dict[str, Any] | None, RemoteFailure | None]] = []
        self.over = threading.Event()

    def on_part(self, body: dict[str, Any], frames: list[memoryview]) -> None:
        assert not self.ends and body["n"] == len(self.parts)
        self.parts.append(body["n"])

    def on_end(self, body: dict[str, Any] | None, failure: RemoteFailure | None) -> None:
        assert not self.ends
        self.ends.append((body, failure))
        self.over.set()

    def failure(self) -> RemoteFailure:
        ((body, failure),) = self.ends
        assert body is None and failure is not None
        return failure


class Two:
    """A caller's and a callee's service on one network."""

    def __init__(self, network: VirtualNetwork) -> None:
        self.network = network
        self.started: list[IncomingCall] = []
        self.server = Service(VirtualEndpoint(network, "virtual://callee"), CONFIG, clock=lambda: network.now)
        self.client = Service(VirtualEndpoint(network, "virtual://caller"), CONFIG, clock=lambda: network.now)
        self.server.register("work", self.started.append)
        self.server.start()
        self.client.start()
        self.connection = self.client.endpoint.connect("virtual://callee")

    def call(self, **body: Any) -> tuple[Caller, Any]:
        caller = Caller()
        handle = self.client.call(self.connection, "work", body, on_part=caller.on_part, on_end=caller.on_end)
        return caller, handle

    def serve(self, num_parts: int, end: str) -> None:
        """A step for every call that was begun, in one message where they share a peer: the way engines answer."""
        alive = [call for call in self.started if not call.is_over]
        going_on = [call for call in alive if call.num_parts < num_parts]
        self.server.reply_many([(call, {"n": call.num_parts}) for call in going_on])
        for call in alive:
            if end == "end" and call not in going_on:
                call.end({"num_parts": num_parts})
            elif end == "fail" and call not in going_on:
                call.fail("Planned", "as planned")

    def open_calls(self) -> int:
        return self.server.stats()["calls_incoming"] + self.client.stats()["calls_outgoing"]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    plan=st.dictionaries(st.integers(0, 30), st.sampled_from(("drop", "repeat", "late")), max_size=8),
    num_calls=st.integers(1, 3),
    num_parts=st.integers(0, 6),
    end=st.sampled_from(("end", "fail", "cancel")),
)
def test_an_answer_is_whole_or_the_call_fails_whatever_the_link_does(
    plan: dict[int, str], num_calls: int, num_parts: int, end: str
) -> None:
    network = FaultyNetwork(plan)
    two = Two(network)
    callers = [two.call(number=number) for number in range(num_calls)]
    network.settle()
    if end == "cancel":
        two.serve(num_parts, end)
        for _, handle in callers:
            handle.cancel()

    def is_over() -> bool:
        two.serve(num_parts, end)
        return two.open_calls() == 0

    network.run_until(is_over, limit_s=40 * NOTICED_S)  # every question may have been lost
    numbers = [call.body["number"] for call in two.started]
    assert len(numbers) == len(set(numbers)), "a call was begun twice"
    for caller, _ in callers:
        assert len(caller.ends) == 1
        body, failure = caller.ends[0]
        if failure is None:
            assert end == "end" and body == {"num_parts": num_parts} and caller.parts == list(range(num_parts))
        else:
            assert failure.code in {"end": ("PeerLost",), "fail": ("Planned", "PeerLost")}.get(end, ("Cancelled",))
        if "drop" not in plan.values() and "late" not in plan.values():
            assert end == "cancel" or caller.parts == list(range(num_parts)), "repeats do no harm"
            assert (failure is None) == (end == "end")
    for call in two.started:
        assert call.is_over, "the far end works on for nobody"


def run_one(two: Two, network: FaultyNetwork, lost: type, num_parts: int = 3) -> tuple[Caller, float]:
    """One call all of whose messages of a kind are lost, then a healed link; and how long the caller waited then."""
    network.lose = lost
    caller, _ = two.call()
    network.settle()
    for call in two.started:
        for number in range(num_parts):
            call.reply({"n": number})
        call.fail("Planned", "as planned") if lost is Fail else call.end({})
    network.settle()
    assert any(isinstance(message, lost) for message in network.lost), "the fault did not happen"
    network.lose = None
    healed = network.now
    network.run_until(lambda: bool(caller.ends), limit_s=60.0)
    return caller, network.now - healed


@pytest.mark.parametrize("lost", [Call, Parts, End, Fail])
def test_a_call_that_lost_a_message_fails_within_two_questions(lost: type) -> None:
    network = FaultyNetwork()
    two = Two(network)
    caller, seconds = run_one(two, network, lost)
    assert caller.failure().code == "PeerLost" and "broke" in caller.failure().message
    assert seconds <= NOTICED_S
    assert two.client.stats()["calls_broken"] == 1 and two.open_calls() == 0
    assert len(two.started) == (lost is not Call)


def test_a_lost_cancel_is_repeated_within_two_questions() -> None:
    network = FaultyNetwork()
    two = Two(network)
    network.lose = Cancel
    caller, handle = two.call()
    network.settle()
    (call,) = two.started
    cancelled: list[float] = []
    call.on_cancel(lambda: cancelled.append(network.now))
    handle.cancel()
    network.settle()
    assert caller.failure().code == "Cancelled" and network.lost and not cancelled
    network.lose = None
    healed = network.now
    network.run_until(lambda: bool(cancelled), limit_s=60.0)
    assert cancelled[0] - healed <= NOTICED_S and two.open_calls() == 0


def test_a_gap_stops_the_work_at_the_far_end() -> None:
    network = FaultyNetwork()
    two = Two(network)
    caller, _ = two.call()
    network.settle()
    (call,) = two.started
    cancelled: list[bool] = []
    call.on_cancel(lambda: cancelled.append(True))
    call.reply({"n": 0})
    network.settle()
    network.lose = Parts
    call.reply({"n": 1})
    network.settle()
    network.lose = None
    call.reply({"n": 2})
    network.settle()
    assert caller.parts == [0] and cancelled == [True]
    assert "part 2 came where part 1 was due" in caller.failure().message


def test_a_lost_part_is_missed_also_when_nothing_follows_it() -> None:
    network = FaultyNetwork()
    two = Two(network)
    caller, _ = two.call()
    network.settle()
    network.lose = Parts
    two.started[0].reply({"n": 0})
    network.settle()
    network.lose = None
    healed = network.now
    network.run_until(lambda: caller.over.is_set(), limit_s=60.0)
    assert network.now - healed <= NOTICED_S
    assert caller.failure().code == "PeerLost" and "of 1 parts 0 came" in caller.failure().message


def test_a_call_that_comes_again_after_its_end_is_not_begun_again() -> None:
    network = FaultyNetwork()
    two = Two(network)
    caller, _ = two.call()
    network.settle()
    two.started[0].end({})
    network.settle()
    (again,) = [entry for entry in network.log if isinstance(entry[2], Call)]
    network.push(*again)
    network.settle()
    assert len(two.started) == 1 and caller.ends == [({}, None)]
    assert two.server.stats()["dropped_stray"] == 1


def test_a_part_that_its_caller_cannot_use_fails_the_call() -> None:
    two = Two(VirtualNetwork())
    ends: list[RemoteFailure | None] = []

    def refuse(body: dict[str, Any], frames: list[memoryview]) -> None:
        raise ValueError("as planned")

    two.client.call(two.connection, "work", {}, on_part=refuse, on_end=lambda body, failure: ends.append(failure))
    two.network.settle()
    two.started[0].reply({"n": 0})
    two.started[0].end({})
    two.network.settle()
    assert len(ends) == 1 and ends[0] is not None and ends[0].code == "InternalError"


def test_calls_of_long_standing_over_a_whole_link_are_left_alone() -> None:
    network = FaultyNetwork()
    two = Two(network)
    callers = [two.call(number=number)[0] for number in range(20)]
    network.advance(20 * CONFIG.ping_interval_s)
    assert any(isinstance(entry[2], Awaiting) for entry in network.log)
    assert any(isinstance(entry[2], Serving) for entry in network.log)
    assert not any(isinstance(entry[2], (Unknown, Cancel)) for entry in network.log)
    for _ in range(3):
        two.serve(2, "end")
    network.settle()
    assert all(caller.ends == [({"num_parts": 2}, None)] and caller.parts == [0, 1] for caller in callers)


# -- real sockets -----------------------------------------------------------------------------------------------------


@pytest.fixture
def services() -> Iterator[tuple[Service, Service]]:
    """(client, server)"""
    config = TransferConfig(ping_interval_s=0.2, peer_timeout_s=60.0)
    made = [Service(open_endpoint("tcp://127.0.0.1:0", config), config) for _ in range(2)]
    yield made[0], made[1]
    for service in made:
        service.close()


def begin(client: Service, proxy: ChaosProxy) -> Caller:
    caller = Caller()
    connection = client.endpoint.connect(proxy.address)
    client.call(connection, "work", {}, on_part=caller.on_part, on_end=caller.on_end)
    return caller


def start(services: tuple[Service, Service]) -> list[IncomingCall]:
    client, server = services
    calls: list[IncomingCall] = []
    server.register("work", calls.append)
    server.start()
    client.start()
    return calls


def test_an_answer_through_a_link_that_is_cut_is_whole_or_fails(services: tuple[Service, Service]) -> None:
    client, server = services
    calls = start(services)
    num_parts, num_cuts, ways = 400, 0, set()
    with ChaosProxy("127.0.0.1:0", server.endpoint.address) as proxy:
        for cut_every in (7, 50, 10_000):
            caller = begin(client, proxy)
            wait_for(lambda: bool(calls))
            call = calls.pop()
            for number in range(num_parts):
                call.reply({"n": number, "padding": "x" * 200})
                if number % cut_every == cut_every - 1:
                    wait_for(lambda c=caller, least=number // 2: c.over.is_set() or len(c.parts) > least)  # type: ignore[misc]
                    num_cuts += proxy.cut()
            call.end({"num_parts": num_parts})
            assert caller.over.wait(WAIT_S), "the call never ended"
            _, failure = caller.ends[0]
            assert failure is not None or caller.parts == list(range(num_parts))
            assert failure is None or failure.code == "PeerLost"
            ways.add(failure is None)
    assert num_cuts > 0 and ways == {True, False}, "some answers break, and an uncut one does not"
    wait_for(lambda: server.stats()["calls_incoming"] == client.stats()["calls_outgoing"] == 0)


def test_an_end_that_found_no_link_is_missed_when_there_is_one_again(services: tuple[Service, Service]) -> None:
    client, server = services
    calls = start(services)
    with ChaosProxy("127.0.0.1:0", server.endpoint.address) as proxy:
        caller = begin(client, proxy)
        wait_for(lambda: bool(calls))
        address = proxy.address
    while not server.stats()["dropped_unreachable"]:  # until the server's socket knows that nobody is there
        server.endpoint.send(calls[0].connection, Cancel(call_id=0))
        wait_for(lambda: True)
    calls[0].end({})
    wait_for(lambda: server.stats()["calls_incoming"] == 0)
    assert not caller.ends
    with ChaosProxy(address.removeprefix("tcp://"), server.endpoint.address):
        assert caller.over.wait(WAIT_S), "the caller waits for ever"
    assert caller.failure().code == "PeerLost"
