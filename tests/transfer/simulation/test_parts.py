"""The simulator's parts: virtual time, processes that stop and die, a network that damages, memory under watch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest

from transfer.config import TransferConfig
from transfer.connection import Connection
from transfer.errors import DoubleFree, EndpointClosed, Overloaded, PeerLost
from transfer.protocol.messages import Ack, Message
from transfer.simulation.endpoint import VirtualEndpoint
from transfer.simulation.faults import MESSAGE_KINDS, Rates, corrupted, truncated
from transfer.simulation.memory import BlockWatch, WatchedBuffers, WatchedPool
from transfer.simulation.network import VirtualNetwork
from transfer.simulation.outages import Outages
from transfer.simulation.scenario import draw_scenario
from transfer.simulation.timeline import LoopDied, Process, Timeline
from transfer.tensors import PlaneSpec

ACK = Ack(stream_id="0" * 32, epoch=1, serial=0, next_index=3, kept_index=2)


class Onlooker:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.kinds: Counter[str] = Counter()
        self.restarts = 0

    def stepped(self, process: Process) -> None: ...

    def escaped(self, process: Process, error: Exception) -> None:
        self.errors.append(error)

    def sent(self, process: Process, message: Message, frames: Sequence[bytes]) -> None: ...

    def arriving(self, process: Process, message: Message, frames: Sequence[bytes]) -> None: ...

    def disturbed(self, message: Message, kind: str) -> None:
        self.kinds[kind] += 1

    def loop_restarted(self, process: Process) -> None:
        self.restarts += 1


def run(timeline: Timeline, until_s: float = 1e9) -> None:
    while timeline.now < until_s and timeline.step():
        pass


def test_time_goes_from_event_to_event_and_keeps_the_order_of_equal_times() -> None:
    timeline, seen = Timeline(start_s=10.0), []
    timeline.after(2.0, lambda: seen.append(("late", timeline.now)))
    timeline.after(1.0, lambda: seen.append(("first", timeline.now)))
    timeline.after(1.0, lambda: seen.append(("second", timeline.now)))
    run(timeline)
    assert seen == [("first", 11.0), ("second", 11.0), ("late", 12.0)]
    assert not timeline.step()


def test_a_stopped_process_does_everything_later_and_a_dead_one_nothing() -> None:
    timeline, onlooker, seen = Timeline(0.0), Onlooker(), []
    process = Process("host", 1, timeline, onlooker)
    process.after(1.0, seen.append, "a")
    process.after(2.0, seen.append, "b")
    process.stop()
    timeline.after(3.0, process.wake)
    run(timeline)
    assert seen == ["a", "b"] and timeline.now == 3.0
    process.after(1.0, seen.append, "never")
    process.kill()
    run(timeline)
    assert seen == ["a", "b"]


def test_a_clock_that_leaps_is_one_process_only() -> None:
    timeline = Timeline(0.0)
    one, other = (Process(name, 1, timeline, Onlooker()) for name in ("one", "other"))
    one.jump(60.0)
    assert (one.now(), other.now()) == (60.0, 0.0)


def test_a_doomed_loop_dies_in_the_middle_and_runs_again() -> None:
    timeline, onlooker, seen = Timeline(0.0), Onlooker(), []
    process = Process("host", 1, timeline, onlooker)
    process.on_loop_death = lambda: seen.append("again")

    def work() -> None:
        for number in range(3):
            process.touch()
            seen.append(number)

    process.doom(1)
    process.after(0.0, work)
    process.after(1.0, work)
    run(timeline)
    assert seen == [0, "again", 0, 1, 2] and not onlooker.errors
    assert not issubclass(LoopDied, Exception), "no handler of errors may hold it"


def test_an_error_that_escapes_is_reported() -> None:
    timeline, onlooker = Timeline(0.0), Onlooker()

    def fail() -> None:
        raise ValueError("x")

    Process("host", 1, timeline, onlooker).after(0.0, fail)
    run(timeline)
    assert [type(error) for error in onlooker.errors] == [ValueError]


class Pair:
    """Two endpoints, one connection."""

    def __init__(self, rates: Rates | None = None, **config: int) -> None:
        self.timeline, self.onlooker = Timeline(0.0), Onlooker()
        self.network = VirtualNetwork(self.timeline, self.onlooker, random.Random(1), rates or Rates(), 1e6)
        self.got: list[int] = []
        self.answers: list[Connection] = []
        processes = [Process(name, 1, self.timeline, self.onlooker) for name in ("sender", "receiver")]
        self.sender, self.receiver = (
            VirtualEndpoint(self.network, process, f"virtual://{process.host}", TransferConfig(**config))
            for process in processes
        )
        self.receiver.start(self._on_message)
        self.sender.start(lambda connection, message, frames: self.answers.append(connection))
        self.connection = self.sender.connect("virtual://receiver")

    def _on_message(self, connection: Connection, message: Message, frames: Sequence[memoryview]) -> None:
        assert isinstance(message, Ack) and not connection.outgoing
        self.got.append(message.next_index)
        self.receiver.send(connection, message)

    def send(self, count: int, until_s: float = 100.0) -> None:
        for index in range(count):
            self.sender.send(self.connection, Ack(**{**fields(ACK), "next_index": index}))
        run(self.timeline, until_s)


def fields(message: Message) -> dict[str, object]:
    return {name: getattr(message, name) for name in message.__dataclass_fields__}


def test_messages_arrive_in_order_and_answers_find_their_way() -> None:
    pair = Pair()
    pair.send(50)
    assert pair.got == list(range(50))
    assert set(pair.answers) == {pair.connection}


@pytest.mark.parametrize("kind", MESSAGE_KINDS)
def test_each_fault_does_what_its_name_says(kind: str) -> None:
    pair = Pair(Rates(**{kind: 0.2}))
    pair.send(500)
    fired, answers_hit = pair.network.fired[kind], 500
    assert pair.onlooker.kinds == {kind: fired} and fired > 50
    lost = 500 - len(set(pair.got))
    assert len(pair.got) <= 500 + fired and answers_hit
    if kind in ("drop", "truncate", "corrupt"):
        assert 50 < lost <= fired and pair.got == sorted(set(pair.got))
    elif kind == "duplicate":
        assert lost == 0 and len(pair.got) > 500
    elif kind == "reorder":
        assert lost == 0 and pair.got != sorted(pair.got)
    else:
        assert lost == 0 and pair.got == sorted(pair.got)
    if kind in ("truncate", "corrupt"):
        assert pair.receiver.stats()["dropped_malformed"] > 50, "real bytes were damaged"


def test_cut_links_half_open_connections_and_dead_hosts_swallow_messages() -> None:
    pair = Pair()
    pair.network.link("sender", "receiver").num_cuts = 1
    pair.send(3, 10.0)
    assert pair.got == [] and pair.onlooker.kinds["partition"] == 3
    pair.network.link("sender", "receiver").num_cuts = 0
    route = next(iter(pair.network.routes.values()))
    route.is_half_open = True
    pair.send(3, 20.0)
    assert pair.got == [0, 1, 2] and not pair.answers and pair.onlooker.kinds["half_open"] == 3
    pair.sender.send(pair.connection, ACK)
    pair.network.break_route(route)
    run(pair.timeline, 30.0)
    assert pair.got == [0, 1, 2], "what was under way is lost with the connection"
    pair.receiver.close()
    with pytest.raises(PeerLost):
        pair.sender.send(pair.connection, ACK)
    pair.sender.close()
    with pytest.raises(EndpointClosed):
        pair.sender.send(pair.connection, ACK)


def test_a_stopped_host_takes_only_so_many_messages() -> None:
    pair = Pair(max_outbound_messages=5)
    pair.receiver.process.stop()
    pair.send(4, 1.0)
    with pytest.raises(Overloaded):
        for _ in range(10):
            pair.send(1, pair.timeline.now + 1.0)
    pair.receiver.process.wake()
    run(pair.timeline, 30.0)
    assert pair.got[:4] == [0, 1, 2, 3]


def test_damage_changes_one_frame_and_never_nothing() -> None:
    dice, parcel = random.Random(3), [b"header", b"", b"payload"]
    for _ in range(200):
        cut, turned = truncated(parcel, dice), corrupted(parcel, dice)
        assert cut != parcel and sum(map(len, cut)) < sum(map(len, parcel))
        assert [len(frame) for frame in turned] == [len(frame) for frame in parcel]
        bits = sum((x ^ y).bit_count() for a, b in zip(turned, parcel, strict=True) for x, y in zip(a, b, strict=True))
        assert bits == 1


def test_memory_under_watch_tells_of_every_wrong_step() -> None:
    complaints: list[str] = []
    placed: list[tuple[str, int]] = []
    watch = BlockWatch(
        3, lambda promise, *_: complaints.append(promise), lambda *what: placed.append(what), lambda *_: None
    )
    planes = (PlaneSpec(name="x", dtype="int8", row_shape=(2,)),)
    buffers = WatchedBuffers(3, 4, planes, watch)
    pool = WatchedPool(3, 4, watch, buffers.poison)
    block_id = pool.allocate(4, "one").block_ids[0]
    assert watch.owners == {block_id: "one"} and buffers.is_poisoned(block_id)
    watch.writing = ("one", block_id)
    buffers.place(block_id, [memoryview(b"12345678")])
    assert placed == [("one", block_id)] and not complaints and not buffers.is_poisoned(block_id)
    watch.writing = ("two", block_id)
    buffers.place(block_id, [memoryview(b"12345678")])
    assert complaints == ["4: a block is its owner's alone"]
    pool.free_owner("one")
    assert buffers.is_poisoned(block_id) and not watch.owners
    buffers.place(block_id, [memoryview(b"12345678")])
    assert complaints[1:] == ["4: a freed block is never written"]
    watch.took("two", [block_id])
    watch.took("three", [block_id])
    assert complaints[2:] == ["4: no block has two owners"]
    watch.gave("two", [block_id])
    assert complaints[3:] == ["4: no block has two owners"]
    with pytest.raises(DoubleFree):
        pool.free_blocks("one", [block_id])


def test_outages_excuse_what_they_are_long_enough_for() -> None:
    outages = Outages(patience_s=10.0)
    outages.add(100.0, 8.0, sender="a", receiver="b")
    assert not outages.excuse("a", "b", 90.0, 200.0)
    outages.add_leap(120.0, 3.0, receiver="b")
    assert outages.excuse("a", "b", 90.0, 200.0)
    assert not outages.excuse("a", "b", 104.0, 200.0), "only what lies in its time counts"
    assert not outages.excuse("other", "b", 90.0, 200.0) and not outages.excuse("a", "other", 90.0, 200.0)


def test_scenarios_are_drawn_from_their_seed_and_reach_the_hard_corners() -> None:
    assert draw_scenario(5) == draw_scenario(5) != draw_scenario(6)
    scenarios = [draw_scenario(seed) for seed in range(300)]
    blocks = {scenario.config.num_pool_blocks for scenario in scenarios}
    assert 1 in blocks and max(blocks) >= 40
    rows = {plan.num_rows for scenario in scenarios for plan in scenario.requests}
    assert {0, 1} <= rows and max(rows) > 200
    assert any(len(s.requests) > 2 * s.config.num_pool_blocks for s in scenarios), "more streams than blocks"
    assert {scenario.admission for scenario in scenarios} == {"at_once", "late", "any_order", "oldest_first"}
    assert {len(scenario.planes) for scenario in scenarios} == {1, 2, 3}
    assert any(not scenario.incidents and not scenario.rates.total for scenario in scenarios), "some runs are clean"
