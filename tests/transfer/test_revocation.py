"""Blocks taken back: who gives, who gets, what is sent again, and that nothing ever waits for ever."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transfer.test_sessions import OFFER, TICKET
from tests.transfer.test_streams import configure
from tests.transfer.virtual import Consumer, Faults, Pair, VirtualNetwork, assert_rows_equal, make_rows
from transfer.errors import StreamTimeout
from transfer.protocol.actions import Dropped, FreeBlocks, Send, Timers
from transfer.protocol.grant_planner import Demand, GrantPlanner
from transfer.protocol.messages import Accept, Ack, Grant, Message, Resume, Revoke, Revoked
from transfer.protocol.negotiate import Offer
from transfer.protocol.receiver_session import ReceiverSession
from transfer.protocol.sender_session import SenderSession
from transfer.protocol.state import ReceiverState, SenderState
from transfer.protocol.ticket import Ticket

pytestmark = pytest.mark.usefixtures("payload")

demands = st.lists(
    st.builds(
        lambda admitted, wanted, urgent, held, surplus, announced, stalled: Demand(
            rank=(not admitted, 0),
            wanted=wanted if admitted or held == 0 else 0,
            urgent=min(urgent, wanted) if admitted and not (stalled and held) else 0,
            empty=held == 0,
            held=held,
            surplus=min(surplus, held) if admitted else 0,
            announced=announced or admitted,
            admitted=admitted,
            stalled=stalled,
        ),
        *(st.booleans(), st.integers(0, 9), st.integers(0, 6), st.integers(0, 9), st.integers(0, 9)),
        *(st.booleans(), st.booleans()),
    ),
    max_size=10,
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(demands, st.integers(0, 12))
def test_a_plan_takes_only_what_is_needed_and_only_from_who_may_give(values: list[Demand], num_free: int) -> None:
    planner = GrantPlanner()
    streams = {str(turn): demand._replace(rank=(demand.rank[0], turn)) for turn, demand in enumerate(values)}
    for key, demand in streams.items():
        planner.update(key, demand)
    grants, revocations = planner.plan(num_free)
    assert sum(grants.values()) <= num_free
    waiting = [k for k, d in streams.items() if d.empty and d.wanted and k not in grants]
    starving = [k for k in waiting if streams[k].admitted]
    short = sum(
        min(max(0, d.urgent - max(0, grants.get(k, 0) - d.empty)), d.wanted - grants.get(k, 0))
        for k, d in streams.items()
        if k not in waiting
    )
    num_taken = sum(revocations.values())
    assert num_taken <= len(waiting) + short
    lasts: list[str] = []
    for key, count in revocations.items():
        demand = streams[key]
        assert 0 < count <= demand.held
        if count == demand.held:
            lasts.append(key)
            assert waiting and (demand.stalled or (starving and not demand.admitted)), "it moves: it keeps one"
        elif demand.admitted and not demand.stalled and not waiting:
            assert count <= demand.surplus, "an admitted stream that moves keeps its window from those that hold some"
        assert demand.announced or waiting, "blocks of unknown totals go to streams that hold none"
    assert len([k for k in lasts if not streams[k].stalled]) <= len(starving)
    if num_taken < len(waiting):
        assert all(revocations.get(k, 0) >= d.held - 1 for k, d in streams.items()), "one waits, one has spare"
        assert all(revocations.get(k, 0) == d.held for k, d in streams.items() if d.stalled), "and one stands still"
    easy = sum(max(0, d.held - 1) for d in streams.values() if (d.stalled if d.admitted else d.announced))
    assert num_taken >= min(len(waiting) + short, easy)
    assert planner.plan(0).grants == {}


def hold_many(pair: Pair, num_rows: int = 200) -> tuple[str, Consumer, dict[str, object]]:
    stream, consumer, data = pair.transfer(num_rows, admit=False)
    pair.network.settle()
    return stream.stream_id, consumer, data  # type: ignore[return-value]


def test_a_stored_block_of_a_waiting_stream_goes_to_who_has_none_and_is_sent_again() -> None:
    pair = Pair(configure(16, 128, 8))
    stream_id, first, data = hold_many(pair)
    assert pair.receiver.stats()["transfer_blocks_in_use"] == 8
    pair.network.advance(5)  # probes and their answers do not make it stored for good
    assert any(isinstance(m, Resume) and m.next_index == 8 for _, _, m, _ in pair.network.log)
    others = [pair.transfer(16, admit=False) for _ in range(3)]
    pair.network.settle()
    assert [c.total_rows for _, c, _ in others] == [16, 16, 16], "each got its block at once"
    assert pair.receiver.stats()["transfer_revocations_total"] >= 1
    for stream, consumer, other in others:
        pair.receiver.admit(stream.stream_id)
        pair.network.settle()
        assert_rows_equal(consumer, other)
    pair.receiver.admit(stream_id)
    pair.network.run_until(lambda: bool(first.ends))
    assert_rows_equal(first, data)  # type: ignore[arg-type]
    pair.network.settle()
    pair.assert_ledger_zero()


def test_a_stream_whose_producer_is_slow_gives_back_what_it_was_granted() -> None:
    pair = Pair(configure(16, 8192, 8))
    ticket = Ticket.issue("slow")
    slow_consumer, slow = pair.listen(ticket), pair.send(ticket)
    pair.network.settle()
    assert pair.receiver.stats()["transfer_blocks_in_use"] == 8
    _, consumer, data = pair.transfer(500)
    pair.network.run_until(lambda: bool(consumer.ends), limit_s=1.0)
    assert_rows_equal(consumer, data)
    slow.announce(200)
    slow.write(0, make_rows(200))
    pair.network.run_until(lambda: bool(slow_consumer.ends))
    assert_rows_equal(slow_consumer, make_rows(200))
    pair.assert_ledger_zero()


def test_an_admitted_stream_takes_even_the_last_block_of_one_that_waits() -> None:
    pair = Pair(configure(16, 64, 1))
    ticket = Ticket.issue("test")
    consumer = pair.listen(ticket, take_over_s=60.0)
    stream = pair.send(ticket, content_key="k")
    data = make_rows(100)
    stream.announce(100)
    stream.write(0, {n: r[:32].clone() for n, r in data.items()})
    pair.network.settle()
    pair.receiver.sender_lost(ticket.stream_id)  # its block is free now
    pair.network.settle()
    waiting, waiting_consumer, other = pair.transfer(100, admit=False)
    pair.network.settle()
    assert waiting_consumer.total_rows == 100, "it holds the only block, and waits for its admission"
    second_ticket = pair.reissue(ticket.stream_id)
    assert second_ticket is not None
    second = pair.send(second_ticket, sender=pair.another_sender(), content_key="k")
    second.announce(100)
    pair.network.settle()
    second.write(32, {n: r[32:].clone() for n, r in data.items()})
    pair.network.run_until(lambda: bool(consumer.ends))
    assert_rows_equal(consumer, data)
    pair.receiver.admit(waiting.stream_id)
    pair.network.run_until(lambda: bool(waiting_consumer.ends))
    assert_rows_equal(waiting_consumer, other)
    pair.network.run_until(lambda: not pair.sender.stats()["transfer_streams_sending"])
    pair.assert_ledger_zero()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    lossy=st.booleans(),
    spare=st.sampled_from([0, 1, 5]),
    sizes=st.lists(st.sampled_from([1, 16, 17, 100, 400]), min_size=2, max_size=6),
    room=st.integers(400, 900),
)
def test_pools_of_one_block_per_stream_and_a_small_engine_finish_everything(
    seed: int, lossy: bool, spare: int, sizes: list[int], room: int
) -> None:
    """The consumer admits whole streams, oldest announcement first, while its own buffer has room."""
    faults = Faults(drop=0.1, repeat=0.1, reorder=0.2, corrupt=0.05) if lossy else Faults()
    network, rng = VirtualNetwork(seed, faults), random.Random(seed)
    pair = Pair(configure(16, 128, len(sizes) + spare), network=network)
    streams = []
    for size in sizes:
        streams.append(pair.transfer(size, admit=False))
        if rng.random() < 0.5:
            network.settle()
    admitted: dict[int, int] = {}

    def step() -> bool:
        for number, (stream, consumer, _) in enumerate(streams):
            if number in admitted or consumer.total_rows is None:
                continue
            used = sum(n for k, n in admitted.items() if not streams[k][1].ends)
            if used + consumer.total_rows > room:
                break
            admitted[number] = consumer.total_rows
            pair.receiver.admit(stream.stream_id)
        waiting = [stream for n, stream in enumerate(pair.receiver._streams.by_id.values())]
        empty = any(
            s.area is not None and not s.session.window.held and s.session.state is ReceiverState.OPENED
            for s in waiting
        )
        if empty:  # then nobody that only waits holds more than one
            for held in waiting:
                if not held.session.facts.is_admitted and held.session.window.pending is None:
                    assert len(held.session.window.held) <= 1
        return all(consumer.ends for _, consumer, _ in streams)

    network.run_until(step)
    network.run_until(lambda: not pair.sender.stats()["transfer_streams_sending"])
    for _, consumer, data in streams:
        assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


@pytest.mark.parametrize("kind", [Revoke, Revoked])
def test_a_lost_revocation_or_answer_is_repeated(kind: type, payload: str) -> None:
    pair = Pair(configure(16, 128, 8))
    stream_id, first, data = hold_many(pair)
    lost: list[Message] = []

    def rewrite(message: Message, frames: list[bytes]) -> tuple[Message, list[bytes]] | None:
        if isinstance(message, kind) and len(lost) < 2:
            lost.append(message)
            return None
        return message, frames

    pair.network.rewrite = rewrite
    _, consumer, other = pair.transfer(16)
    pair.network.settle()
    assert bool(consumer.ends) == (payload == "wire"), "slots that a sender may write are not used before its answer"
    pair.network.run_until(lambda: bool(consumer.ends))
    assert_rows_equal(consumer, other)
    pair.receiver.admit(stream_id)
    pair.network.run_until(lambda: bool(first.ends))
    assert len(lost) == 2
    assert_rows_equal(first, data)  # type: ignore[arg-type]
    pair.assert_ledger_zero()


def shared_memory_pair() -> tuple[SenderSession, ReceiverSession]:
    """Two sessions that agreed on shared memory, with four blocks granted and a total of five announced."""
    offer = Offer(**{**{f: getattr(OFFER, f) for f in OFFER.__dataclass_fields__}, "payload": ("shm", "wire")})
    left = SenderSession(TICKET, offer=offer, nonce=b"n" * 16, content_key="", timers=Timers(), now=0.0)
    right = ReceiverSession(TICKET, offer=offer, default_blocks=4, timers=Timers(), now=0.0)
    (action,) = left.start(0.0)
    (answer,) = right.open(action.message, 0.0)  # type: ignore[union-attr, arg-type]
    assert isinstance(answer, Send) and isinstance(answer.message, Accept)
    right.place_in(shared_memory=True)
    left.receive(answer.message, 0.0)
    (grant,) = right.grant((7, 5, 3, 1), 0.0)
    left.announce(80, (), 0.0)
    (announce, *_) = left.receive(grant.message, 0.0)  # type: ignore[union-attr]
    right.announce(announce.message, 0.0)  # type: ignore[union-attr, arg-type]
    return left, right


def test_blocks_that_the_sender_writes_itself_come_back_only_with_its_word() -> None:
    left, right = shared_memory_pair()
    left.rows_written(16, 0.0)
    (told,) = right.revoke(3, 0.0)
    assert isinstance(told, Send) and isinstance(told.message, Revoke) and told.message.first_index == 1
    (answer, *_) = left.receive(told.message, 0.0)
    assert isinstance(answer, Send) and isinstance(answer.message, Revoked)
    assert right.revoked(answer.message, 0.0) == [FreeBlocks((5, 3, 1))]
    right.admit(0.0)
    (again,) = right.grant((2, 4, 6, 0), 0.0)
    assert isinstance(again, Send) and isinstance(again.message, Grant) and again.message.first_index == 1
    left.receive(again.message, 0.0)
    sent = left.rows_written(80, 0.0)
    assert [(a.index, a.block_id) for a in sent] == [(1, 2), (2, 4), (3, 6)]  # type: ignore[union-attr]
    assert len({a.serial for a in sent}) == 3, "a block that is sent again has a new serial"  # type: ignore[union-attr]


def test_the_answer_to_an_earlier_revocation_gives_nothing_back() -> None:
    """What it was about is withdrawn once more: a block that was granted in between may be written still."""
    left, right = shared_memory_pair()
    left.rows_written(16, 0.0)
    answers = []
    for count in (2, 1):
        (told,) = right.revoke(count, 0.0)
        assert isinstance(told, Send)
        answers.append(left.receive(told.message, 0.0)[0])  # type: ignore[arg-type]
    early, late = (answer.message for answer in answers)  # type: ignore[union-attr]
    assert right.revoked(early, 0.0) == [Dropped("duplicate")]
    (freed,) = right.revoked(late, 0.0)
    assert isinstance(freed, FreeBlocks) and sorted(freed.block_ids) == [1, 3, 5]


def test_an_acknowledgement_from_before_a_revocation_says_nothing() -> None:
    left, right = shared_memory_pair()
    left.rows_written(80, 0.0)
    (told,) = right.revoke(3, 0.0)
    left.receive(told.message, 0.0)  # type: ignore[union-attr, arg-type]
    assert left.num_sent == 1
    late = Ack(stream_id=TICKET.stream_id, epoch=1, serial=0, next_index=4, kept_index=0)
    assert left.receive(late, 0.0) == [Dropped("stale_ack")]
    assert left.state is SenderState.SENDING and left.num_acked == 0


def test_a_failed_stream_says_that_its_sender_may_still_write() -> None:
    _, right = shared_memory_pair()
    freed = [a for a in right.fail(StreamTimeout("test")) if isinstance(a, FreeBlocks)]
    assert freed == [FreeBlocks((7, 5, 3, 1), fenced=True)]
