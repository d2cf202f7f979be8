"""Sessions alone: an illegal event leaves a session as it was, and the planner keeps its promises."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transfer.virtual import PLANES
from transfer.connection import Connection
from transfer.errors import AlignmentError, LocalProtocolError
from transfer.protocol.actions import Accepted, Dropped, Failed, Send, Timers
from transfer.protocol.grant_planner import Demand, GrantPlanner
from transfer.protocol.liveness import Liveness
from transfer.protocol.messages import Abort, Accept, Ack, Announce, Close, Filled, Grant, Open
from transfer.protocol.negotiate import Offer
from transfer.protocol.receiver_session import ReceiverSession
from transfer.protocol.sender_session import SenderSession
from transfer.protocol.state import ReceiverState, SenderState
from transfer.protocol.ticket import Ticket

TICKET = Ticket.issue("test")
OFFER = Offer(block_size=16, planes=PLANES, max_frame_bytes=1 << 20, credit=4)


def receiver() -> ReceiverSession:
    return ReceiverSession(TICKET, offer=OFFER, default_blocks=4, timers=Timers(), now=0.0)


def sender() -> SenderSession:
    return SenderSession(TICKET, offer=OFFER, nonce=b"n" * 16, content_key="", timers=Timers(), now=0.0)


def opened() -> tuple[SenderSession, ReceiverSession]:
    """Two sessions after their handshake."""
    left, right = sender(), receiver()
    (action,) = left.start(0.0)
    assert isinstance(action, Send) and isinstance(action.message, Open)
    (answer,) = right.open(action.message, 0.0)
    assert isinstance(answer, Send) and isinstance(answer.message, Accept)
    (accepted,) = left.receive(answer.message, 0.0)
    assert accepted == Accepted(right.facts.terms, 0, None, None)
    return left, right


def test_admitting_too_early_raises_and_changes_nothing() -> None:
    session = receiver()
    for expected in (ReceiverState.REGISTERED, ReceiverState.OPENED, ReceiverState.GRANTED):
        with pytest.raises(LocalProtocolError):
            session.admit(0.0)
        assert session.state is expected
        if expected is ReceiverState.REGISTERED:
            (action,) = sender().start(0.0)
            assert isinstance(action, Send) and isinstance(action.message, Open)
            session.open(action.message, 0.0)
        elif expected is ReceiverState.OPENED:
            session.grant((3, 1), 0.0)


def test_starting_twice_raises_and_changes_nothing() -> None:
    session = sender()
    session.start(0.0)
    with pytest.raises(LocalProtocolError):
        session.start(0.0)
    assert session.state is SenderState.OPENING


def test_half_a_window_is_acknowledged_at_once_and_the_end_only_closed() -> None:
    """Credit is four blocks, six are sent: one Ack in the middle, none with the Close, and none that nobody needs."""
    left, right = opened()
    for action in right.grant(range(6), 0.0):
        assert isinstance(action, Send)
        left.receive(action.message, 0.0)
    (announcement,) = left.announce(6 * 16, (), 0.0)
    assert isinstance(announcement, Send) and isinstance(announcement.message, Announce)
    right.announce(announcement.message, 0.0)
    right.admit(0.0)
    said = []
    for index in range(6):
        filled = Filled(stream_id=TICKET.stream_id, epoch=1, first_index=index, block_ids=(index,), serial=index + 1)
        actions = right.filled(filled, lambda message, first, count, num_rows: True, 0.0)
        said.append([type(action.message) for action in actions if isinstance(action, Send)])
    assert said == [[], [Ack], [], [Ack], [], [Close]]


def test_a_grant_whose_predecessor_was_lost_waits_for_it() -> None:
    session, _ = opened()
    second = Grant(
        stream_id=TICKET.stream_id,
        epoch=1,
        round=1,
        first_index=4,
        block_ids=(1,),
        allocated_tokens=16,
        block_size=16,
        credit=4,
    )
    assert session.receive(second, 0.0) == [Dropped("early")]
    assert session.state is SenderState.ACCEPTED


def test_probes_back_off_and_repeat_the_open() -> None:
    session = sender()
    session.start(0.0)
    times = [n / 100 for n in range(1000) if session.tick(n / 100)]
    gaps = [round(b - a, 2) for a, b in itertools.pairwise(times)]
    assert times[0] == pytest.approx(0.1)
    assert gaps[:5] == pytest.approx([0.2, 0.4, 0.8, 1.6, 2.0], abs=0.011)
    assert gaps[5:] == pytest.approx([2.0] * len(gaps[5:]), abs=0.011)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    demands=st.lists(
        st.tuples(st.booleans(), st.integers(0, 9), st.integers(1, 9), st.booleans(), st.booleans()), max_size=12
    ),
    num_free=st.integers(0, 40),
)
def test_a_plan_gives_each_empty_stream_one_block_and_the_rest_to_the_first(
    demands: list[tuple[bool, int, int, bool, bool]], num_free: int
) -> None:
    planner = GrantPlanner()
    for turn, (admitted, wanted, window, empty, yielded) in enumerate(demands):
        urgent = min(wanted, window) if admitted else 0
        rank = (not admitted or yielded, turn)
        planner.update(
            str(turn), Demand(rank=rank, wanted=wanted, urgent=urgent, empty=empty, admitted=admitted, returning=99)
        )
    plan = planner.plan(num_free)
    assert plan == (naive_plan(demands, num_free), {})
    assert planner.plan(0) == ({}, {})


def naive_plan(demands: list[tuple[bool, int, int, bool, bool]], num_free: int) -> dict[str, int]:
    """First blocks go by turn; the rest to who moves, then by turn, and a window at most while some hold none."""
    empty = {turn for turn, demand in enumerate(demands) if demand[3]}
    given_out: dict[int, int] = {}
    for turn, (_, wanted, _, _, _) in enumerate(demands):
        if wanted and turn in empty and num_free:
            given_out[turn] = 1
            empty.remove(turn)
            num_free -= 1
    for turn in sorted(range(len(demands)), key=lambda turn: (not demands[turn][0] or demands[turn][4], turn)):
        admitted, wanted, window, _, _ = demands[turn]
        if turn in empty:
            continue
        left = wanted - given_out.get(turn, 0)
        count = min(left, window if admitted and empty else left, num_free - len(empty))
        if count > 0:
            given_out[turn] = given_out.get(turn, 0) + count
            num_free -= count
    return {str(turn): count for turn, count in given_out.items()}


def test_liveness_pings_the_silent_and_loses_the_dead() -> None:
    one, two = (Connection(endpoint="e", peer=p, key=p.encode(), outgoing=True) for p in "ab")
    liveness = Liveness(2.0, 10.0)
    lost_at, pings = None, 0
    for tenth in range(130):
        now = tenth / 10
        liveness.heard(two, now)
        ping, lost = liveness.check({one, two}, now)
        assert two not in ping and two not in lost
        pings += one in ping
        if lost and lost_at is None:
            lost_at = now
    assert lost_at == pytest.approx(10.0) and pings == 4
    assert liveness.check(set(), 13.0) == ([], [])
    assert liveness.check({one}, 14.0) == ([], [])


def test_who_was_stopped_loses_nobody() -> None:
    """What was said meanwhile is read after the first check; a peer that stays silent is lost all the same."""
    peer = Connection(endpoint="e", peer="p", key=b"p", outgoing=True)
    liveness = Liveness(2.0, 10.0)
    assert liveness.check({peer}, 0.0) == ([], [])
    assert liveness.check({peer}, 1.0) == ([], [])
    assert liveness.check({peer}, 100.0) == ([peer], [])
    assert liveness.check({peer}, 101.0)[1] == []
    lost_at = next(now for now in range(102, 200) if liveness.check({peer}, float(now))[1])
    assert lost_at == 107  # 1 + 2 + 7 seconds of listening


@pytest.mark.parametrize("tokens", [31, 33, 47, 16, 0])
def test_the_sender_itself_refuses_a_grant_that_is_not_whole_blocks(tokens: int) -> None:
    session, _ = opened()
    session.announce(100, (), 0.0)
    grant = Grant(
        stream_id=TICKET.stream_id,
        epoch=1,
        round=0,
        first_index=0,
        block_ids=(1, 2),
        allocated_tokens=tokens,
        block_size=16,
        credit=4,
    )
    abort, failed = session.receive(grant, 0.0)
    assert isinstance(abort, Send) and isinstance(abort.message, Abort) and abort.message.code == "AlignmentError"
    assert isinstance(failed, Failed) and isinstance(failed.error, AlignmentError)
    assert session.state is SenderState.FAILED
