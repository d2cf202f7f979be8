"""Producers that are slow, stopped or have not begun: they hold no block that another stream needs, and lose no row.

Every stream goes on in its turn, down to a pool of one block, over the wire and in shared memory.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transfer.test_sessions import OFFER, TICKET
from tests.transfer.test_streams import configure
from tests.transfer.virtual import Consumer, Faults, Pair, VirtualNetwork, assert_rows_equal, make_rows
from transfer.protocol.actions import Dropped, FreeBlocks, Send, SendBlock, Timers
from transfer.protocol.messages import Accept, Ack, Announce, Block, Grant, Open, Revoke, Revoked
from transfer.protocol.receiver_life import TURN_S
from transfer.protocol.receiver_session import ReceiverSession
from transfer.protocol.sender_session import SenderSession
from transfer.protocol.state import ReceiverState
from transfer.protocol.ticket import Ticket
from transfer.streams.outgoing_stream import OutgoingStream
from transfer.streams.stream_sender import StreamSender

pytestmark = pytest.mark.usefixtures("payload")

BLOCK_ROWS = 16


@dataclass
class Slow:
    """A stream whose rows come when `write` is called."""

    pair: Pair
    num_rows: int
    sender: StreamSender | None = None
    ticket: Ticket = field(default_factory=lambda: Ticket.issue("slow"))
    num_written: int = 0

    def __post_init__(self) -> None:
        self.consumer: Consumer = self.pair.listen(self.ticket)
        self.stream: OutgoingStream = self.pair.send(self.ticket, sender=self.sender)
        self.data: dict[str, torch.Tensor] = make_rows(self.num_rows, seed=self.num_rows)

    def write(self, num_rows: int) -> None:
        first, end = self.num_written, min(self.num_written + num_rows, self.num_rows)
        if first < end:
            self.stream.write(first, {name: rows[first:end].clone() for name, rows in self.data.items()})
        self.num_written = end

    def finish(self) -> None:
        self.write(self.num_rows)
        self.pair.network.run_until(lambda: bool(self.consumer.ends), limit_s=60.0)
        assert_rows_equal(self.consumer, self.data)


def in_use(pair: Pair) -> int:
    return pair.receiver.stats()["transfer_blocks_in_use"]


def finish_all(pair: Pair) -> None:
    pair.network.run_until(lambda: not pair.sender.stats()["transfer_streams_sending"], limit_s=60.0)
    pair.assert_ledger_zero()


@pytest.mark.parametrize("pool_blocks", [1, 2, 8])
@pytest.mark.parametrize("state", ["slow", "unannounced", "stopped"])
def test_a_stream_without_rows_leaves_the_pool_to_another(pool_blocks: int, state: str, payload: str) -> None:
    if state == "stopped" and payload == "shm":
        pytest.skip("who shares a segment with a stopped process is stopped with it")
    pair = Pair(configure(BLOCK_ROWS, 32, pool_blocks))
    slow = Slow(pair, BLOCK_ROWS * 100)
    if state != "unannounced":
        slow.stream.announce(slow.num_rows)
    pair.network.settle()
    assert in_use(pair) == (min(2, pool_blocks) if state == "unannounced" else pool_blocks), "nobody else wants them"
    if state == "stopped":
        pair.network.stopped.add("virtual://sender")
    sender = pair.another_sender() if payload == "wire" else pair.sender
    for num_rows in (16, 500):
        other = Slow(pair, num_rows, sender)
        other.stream.announce(num_rows)
        other.finish()  # within its limit of a minute
    if state == "stopped":
        pair.network.wake("virtual://sender")
    pair.network.advance(60.0, step=0.2)
    if state == "unannounced":
        slow.stream.announce(slow.num_rows)
    slow.finish()
    finish_all(pair)


def test_streams_that_stand_still_have_turns_and_all_get_on_whoever_wakes() -> None:
    pair = Pair(configure(BLOCK_ROWS, 16, 1))
    streams = [Slow(pair, BLOCK_ROWS * 3) for _ in range(4)]
    for slow in streams:
        slow.stream.announce(slow.num_rows)
    pair.network.advance(30.0)
    rounds = [m.stream_id for _, _, m, _ in pair.network.log if isinstance(m, Grant)]
    counts = [rounds.count(slow.ticket.stream_id) for slow in streams]
    assert min(counts) >= 5 and max(counts) - min(counts) <= 1, counts
    for slow in reversed(streams):
        slow.write(BLOCK_ROWS)
        pair.network.advance(4 * 2 * TURN_S)
        assert slow.consumer.num_rows == BLOCK_ROWS, "its turn came"
    for slow in streams[1:] + streams[:1]:
        slow.finish()
    finish_all(pair)


def test_a_stream_that_gave_its_last_block_comes_after_those_that_waited_and_before_those_that_came_later() -> None:
    pair = Pair(configure(BLOCK_ROWS, 16, 1))
    slow, second = Slow(pair, 100), Slow(pair, 640)
    slow.stream.announce(100)
    pair.network.settle()
    second.stream.announce(640)
    second.write(640)
    pair.network.advance(TURN_S + 0.1)
    assert second.consumer.ends, "once it has its turn it goes on to its end, as it moves"
    slow.write(100)
    pair.network.advance(0.2)
    third = Slow(pair, 640)
    third.stream.announce(640)
    third.write(640)
    pair.network.run_until(lambda: bool(slow.consumer.ends) and bool(third.consumer.ends))
    assert_rows_equal(slow.consumer, slow.data)
    assert_rows_equal(third.consumer, third.data)
    finish_all(pair)


@pytest.mark.usefixtures("wire_only")  # a segment knows those streams only that are in it
def test_an_admitted_stream_gets_no_more_than_its_window_while_another_holds_none() -> None:
    pair = Pair(configure(BLOCK_ROWS, 16, 40))
    expected = pair.listen(Ticket.issue("expected"))  # its sender is still to come: a block is kept for it
    slow = Slow(pair, BLOCK_ROWS * 100)
    slow.stream.announce(slow.num_rows)
    pair.network.settle()
    assert in_use(pair) <= pair.config.credit_window_blocks + 1
    pair.receiver.close(expected.stream_id)
    slow.finish()
    finish_all(pair)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    lossy=st.booleans(),
    pool_blocks=st.sampled_from([1, 1, 2, 3, 8]),
    sizes=st.lists(st.tuples(st.sampled_from([1, 16, 17, 100, 300]), st.booleans()), min_size=2, max_size=6),
)
def test_slow_producers_hold_up_nobody_and_finish_themselves(
    seed: int, lossy: bool, pool_blocks: int, sizes: list[tuple[int, bool]]
) -> None:
    faults = Faults(drop=0.05, repeat=0.05) if lossy else Faults()
    network, dice = VirtualNetwork(seed, faults), random.Random(seed)
    pair = Pair(configure(BLOCK_ROWS, dice.choice((16, 128)), pool_blocks), network=network)
    streams, late = [], []
    for number, (num_rows, is_slow) in enumerate(sizes):
        slow = Slow(pair, num_rows, ticket=Ticket.issue(str(number)))
        streams.append((slow, is_slow))
        if is_slow and dice.random() < 0.3:
            late.append(slow)  # not even its total is known
        else:
            slow.stream.announce(num_rows)
        if not is_slow:
            slow.write(num_rows)
        network.advance(dice.choice((0.0, 0.1, 3.0)))
    network.run_until(lambda: all(slow.consumer.ends for slow, is_slow in streams if not is_slow), limit_s=120.0)
    while any(is_slow and not slow.consumer.ends for slow, is_slow in streams):
        slow = dice.choice([slow for slow, is_slow in streams if is_slow])
        if slow in late:
            late.remove(slow)
            slow.stream.announce(slow.num_rows)
        slow.write(dice.choice((1, 16, 100)))
        network.advance(dice.choice((0.0, 0.3, 2.0, 40.0)), step=0.2)
    for slow, _ in streams:
        assert_rows_equal(slow.consumer, slow.data)
    finish_all(pair)


# -- sessions alone -------------------------------------------------------------------------------------------------


def admitted(num_blocks: int) -> tuple[SenderSession, ReceiverSession]:
    """Two sessions of an admitted stream of `num_blocks` blocks, of which the first is granted."""
    left = SenderSession(TICKET, offer=OFFER, nonce=b"n" * 16, content_key="", timers=Timers(), now=0.0)
    right = ReceiverSession(TICKET, offer=OFFER, default_blocks=1, timers=Timers(), now=0.0)
    (action,) = left.start(0.0)
    assert isinstance(action, Send) and isinstance(action.message, Open)
    (answer,) = right.open(action.message, 0.0)
    assert isinstance(answer, Send) and isinstance(answer.message, Accept)
    left.receive(answer.message, 0.0)
    left.announce(num_blocks * BLOCK_ROWS, (), 0.0)
    (grant,) = right.grant((7,), 0.0)
    (announce,) = left.receive(told(grant), 0.0)  # type: ignore[arg-type]
    message = told(announce)
    assert isinstance(message, Announce)
    right.announce(message, 0.0)
    right.admit(0.0)
    return left, right


def told(action: object) -> object:
    assert isinstance(action, Send)
    return action.message


def block_of(action: object) -> tuple[Block, list[memoryview]]:
    """The message for an action, with rows that are all 0 and a tag that nobody checks here."""
    assert isinstance(action, SendBlock)
    message = Block(
        stream_id=TICKET.stream_id,
        epoch=1,
        tag=b"",
        **{name: getattr(action, name) for name in ("index", "block_id", "first_row", "num_rows", "serial")},
    )
    return message, [memoryview(bytes(plane.row_bytes * action.num_rows)) for plane in OFFER.planes]


@pytest.fixture
def untagged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfer.protocol.payload.TaggedPayload.check", lambda *arguments: True)


def test_a_stream_that_moves_keeps_its_last_block_and_what_is_filled() -> None:
    left, right = admitted(4)
    assert right.revoke(1, 0.1) == [], "it has had no turn yet"
    right.tick(TURN_S)
    assert right.is_stalled
    free, revoke = right.revoke(5, TURN_S)
    assert free == FreeBlocks((7,)) and isinstance(told(revoke), Revoke)
    assert right.state is ReceiverState.ADMITTED and right.has_yielded
    (answer,) = left.receive(told(revoke), TURN_S)  # type: ignore[arg-type]
    revoked = told(answer)
    assert isinstance(revoked, Revoked)
    assert right.revoked(revoked, TURN_S) == []


@pytest.mark.usefixtures("untagged")
def test_a_block_that_comes_late_makes_the_next_turn_longer_and_one_in_time_makes_it_shorter() -> None:
    left, right = admitted(4)
    (sent,) = left.rows_written(64, 0.0)
    now = TURN_S
    right.tick(now)
    _, revoke = right.revoke(1, now)
    assert right.block(*block_of(sent), now) == [Dropped("not_granted")]
    assert right.block(*block_of(sent), now) == [Dropped("not_granted")]
    (answer,) = left.receive(told(revoke), now)  # type: ignore[arg-type]
    right.revoked(told(answer), now)  # type: ignore[arg-type]
    (grant,) = right.grant((3,), now)
    assert right.due() == now + 2 * TURN_S, "once for each withdrawal"
    right.tick(now + TURN_S)
    assert not right.is_stalled
    (again,) = left.receive(told(grant), now)  # type: ignore[arg-type]
    right.block(*block_of(again), now + TURN_S)
    assert right.window.next_index == 1 and not right.has_yielded
    right.grant((5,), now)
    right.tick(now + 2 * TURN_S)
    assert right.is_stalled


@pytest.mark.usefixtures("untagged")
def test_a_block_sent_under_a_withdrawn_grant_may_fill_the_next_one_though_that_was_lost() -> None:
    left, right = admitted(4)
    (sent,) = left.rows_written(64, 0.0)
    right.tick(TURN_S)
    _, revoke = right.revoke(1, TURN_S)
    (answer,) = left.receive(told(revoke), TURN_S)  # type: ignore[arg-type]
    right.revoked(told(answer), TURN_S)  # type: ignore[arg-type]
    right.grant((7,), TURN_S)  # lost; it names the same block again
    actions = right.block(*block_of(sent), TURN_S)  # on another path than the revocation, and so behind it
    (ack,) = [told(a) for a in actions if isinstance(a, Send)]
    assert isinstance(ack, Ack) and ack.next_index == 1
    (following,) = right.grant((7, 5), TURN_S)
    assert left.receive(told(following), TURN_S) == [Dropped("early")], "for all it knows a block is missing"  # type: ignore[arg-type]
    left.receive(ack, TURN_S)
    blocks = left.receive(told(following), TURN_S)  # type: ignore[arg-type]
    assert [(block.index, block.block_id) for block in blocks] == [(1, 7), (2, 5)]  # type: ignore[union-attr]


@pytest.mark.usefixtures("untagged")
def test_a_lost_ack_is_asked_for_while_turns_come_and_go() -> None:
    left, right = admitted(4)
    (sent,) = left.rows_written(16, 0.0)
    right.block(*block_of(sent), 0.0)  # its Ack is lost
    now, probed_at = 0.0, None
    while probed_at is None and now < 10.0:
        (grant,) = right.grant((7,), now)
        left.receive(told(grant), now)  # type: ignore[arg-type]
        now += TURN_S
        right.tick(now)
        _, revoke = right.revoke(1, now)
        (answer,) = left.receive(told(revoke), now)  # type: ignore[arg-type]
        right.revoked(told(answer), now)  # type: ignore[arg-type]
        if left.tick(now):
            probed_at = now
    assert probed_at is not None and probed_at <= 2 * Timers().probe_s
