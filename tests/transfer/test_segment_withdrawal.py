"""A segment that is given up is offered to nobody any more: who was granted nothing of it goes over the wire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.transfer.segment_pair import SegmentPair
from tests.transfer.test_segment_restart import die_before, run
from tests.transfer.test_streams import configure
from tests.transfer.virtual import Consumer, Faults, VirtualNetwork, assert_rows_equal, make_rows
from transfer.errors import PeerLost, StreamAborted, TransferError
from transfer.memory.segment_guest import SegmentGuest
from transfer.memory.segments import is_supported
from transfer.protocol.actions import Dropped
from transfer.protocol.messages import WITHDRAWN, Abort, Accept, Attached, Block, Filled, Grant, Message
from transfer.protocol.ticket import proven_accept
from transfer.service.service import Service
from transfer.streams.outgoing_stream import OutgoingStream

pytestmark = pytest.mark.skipif(not is_supported(), reason="this system has no sealed memory files")


class LatePair(SegmentPair):
    """Segments are fetched when `fetch_all` says so, as another process takes its time to answer."""

    def __init__(self, num_slots: int = 8, network: VirtualNetwork | None = None) -> None:
        self.jobs: list[Callable[[], None]] = []
        super().__init__(configure(16, 16 * num_slots, num_slots), network=network)

    def _guest(self, service: Service) -> SegmentGuest:
        return SegmentGuest(service, is_on=True, fetch=self.passing.fetch, run=self.jobs.append)

    def fetch_all(self) -> None:
        while self.jobs:
            self.jobs.pop(0)()

    def announced(self, num_rows: int = 40, seed: int = 0) -> tuple[OutgoingStream, Consumer]:
        """A stream with its rows, as far as it comes."""
        stream, consumer = self.begin(num_rows)
        stream.write(0, make_rows(num_rows, seed))
        self.network.settle()
        return stream, consumer

    def give_up(self) -> None:
        """The lifeline of the segment that is offered ends, or of one that was fetched."""
        offers = [offer.on_lost for offer in self.passing.offers.values()]
        (offers or list(self.passing.on_lost.values()))[-1]()

    def assert_over_the_wire(self, *consumers: Consumer) -> None:
        for seed, consumer in enumerate(consumers):
            self.network.run_until(lambda consumer=consumer: bool(consumer.ends), limit_s=20.0)  # type: ignore[misc]
            assert_rows_equal(consumer, make_rows(40, seed))
            kinds = {type(m) for m in self.said() if m.stream_id == consumer.stream_id}  # type: ignore[union-attr]
            assert Block in kinds and not kinds & {Filled, Abort}
        assert not self.passing.offers, "nobody may fetch it any more"
        self.assert_ledger_zero()

    def said(self) -> list[Message]:
        return [message for _, _, message, _ in self.network.log]


def test_who_is_still_getting_it_goes_over_the_wire() -> None:
    pair = LatePair()
    consumers = [pair.announced(40, seed)[1] for seed in range(3)]
    assert len(pair.passing.offers) == 3 and not any(isinstance(m, Grant) for m in pair.said())
    pair.give_up()
    pair.network.settle()
    assert not pair.passing.offers, "before anybody asks for it"
    pair.fetch_all()
    pair.assert_over_the_wire(*consumers)


def test_an_answer_that_crosses_the_withdrawal_is_told_so() -> None:
    """It was mapped before it was given up, and its sender says that it has it."""
    pair = LatePair()
    consumers = [pair.announced(40, seed)[1] for seed in range(2)]
    pair.fetch_all()
    pair.give_up()
    pair.assert_over_the_wire(*consumers)
    generations = [m.generation for m in pair.said() if isinstance(m, Attached)]
    assert sorted(map(bool, generations)) == [False, False, True, True]


@pytest.mark.parametrize("num_lost", [0, 1, 3])
def test_who_waits_for_its_first_slot_goes_over_the_wire(num_lost: int) -> None:
    """Others have every slot of the segment, and lose their sender: it does not. What is lost comes again."""
    pair = LatePair(num_slots=1)
    first, granted = pair.begin()
    pair.fetch_all()
    pair.network.settle()
    _, waiting = pair.announced()
    pair.lose(Accept)
    pair.give_up()
    pair.network.settle()
    assert [type(end) for end in granted.ends] == [PeerLost] and not waiting.ends
    with pytest.raises(TransferError):
        first.result(0)
    pair.network.advance(0.6 * num_lost)
    pair.lose()
    pair.assert_over_the_wire(waiting)
    assert pair.network.fired["rewritten away"] >= min(1, num_lost)


def test_a_withdrawal_that_is_heard_first_is_enough() -> None:
    pair = LatePair()
    pair.network.rewrite = lambda m, f: None if isinstance(m, Accept) and m.segment != WITHDRAWN else (m, f)
    _, consumer = pair.announced()
    pair.give_up()
    pair.assert_over_the_wire(consumer)
    assert pair.network.fired["rewritten away"] and not pair.jobs


def test_an_invitation_that_comes_after_its_withdrawal_says_nothing() -> None:
    pair = LatePair()
    stream, consumer = pair.begin()
    (invitation,) = (m for m in pair.said() if isinstance(m, Accept))
    pair.give_up()
    pair.network.settle()
    assert pair.sender.on_message(stream.connection, invitation, ())
    pair.fetch_all()
    pair.network.settle()
    assert stream.slots is None and pair.sender.stats()["transfer_dropped_duplicate"] == 1
    stream.announce(40)
    stream.write(0, make_rows(40))
    pair.assert_over_the_wire(consumer)


def test_a_withdrawal_of_what_was_granted_is_not_believed() -> None:
    """No receiver says that: the sender may have written slots, and would never say that it let go of them."""
    pair = LatePair()
    stream, consumer = pair.begin(40)
    pair.fetch_all()
    pair.network.settle()
    (invitation,) = (m for m in pair.said() if isinstance(m, Accept))
    facts = pair.receiver._streams.by_id[stream.stream_id].session.facts
    assert facts.opened is not None
    accept = proven_accept(facts.ticket, replace(invitation, segment=WITHDRAWN), facts.opened)
    assert stream.session.receive(accept, pair.network.now) == [Dropped("duplicate")] and stream.slots is not None
    stream.write(0, make_rows(40))
    pair.network.settle()
    assert_rows_equal(consumer, make_rows(40))


def test_a_withdrawal_that_proves_nothing_is_not_believed() -> None:
    pair = LatePair()
    stream, _ = pair.begin(40)
    (invitation,) = (m for m in pair.said() if isinstance(m, Accept))
    forged = replace(invitation, segment=WITHDRAWN)
    assert stream.session.receive(forged, pair.network.now) == [Dropped("bad_proof")]
    pair.fetch_all()
    pair.network.settle()
    assert stream.slots is not None
    stream.write(0, make_rows(40))
    pair.network.settle()
    assert stream.result(0).blocks == 3 and not any(isinstance(m, Block) for m in pair.said())


@pytest.mark.parametrize("kind", [Accept, Abort])
def test_a_loop_that_dies_while_it_says_so_says_it_to_all(monkeypatch: pytest.MonkeyPatch, kind: type[Message]) -> None:
    pair, died = LatePair(num_slots=2), list[object]()
    granted = [pair.begin()[1] for _ in range(2)] if kind is Abort else []
    pair.fetch_all()
    run(pair)
    waiting = [pair.announced(40, seed)[1] for seed in range(2)]
    die_before(monkeypatch, pair, kind, died)
    pair.give_up()
    run(pair)
    assert died
    for consumer in granted:
        assert isinstance(consumer.ends[0], (PeerLost, StreamAborted)), "at once, and not after minutes"
    pair.assert_over_the_wire(*waiting)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_befalls_the_messages(seed: int) -> None:
    network = VirtualNetwork(seed, Faults(drop=0.1, repeat=0.1, reorder=0.2))
    pair = LatePair(num_slots=3, network=network)
    consumers = []
    for number in range(4):
        consumers.append(pair.announced(40, number)[1])
        if number == seed % 3:
            pair.fetch_all()
        if number >= 2 and (pair.passing.offers or pair.passing.on_lost):
            pair.give_up()
            network.settle()
    network.faults = Faults()

    def are_over() -> bool:
        pair.fetch_all()
        return all(consumer.ends for consumer in consumers)

    network.run_until(are_over, limit_s=60.0)
    for number, consumer in enumerate(consumers):
        was_granted = any(isinstance(m, Grant) and m.stream_id == consumer.stream_id for m in pair.said())
        if isinstance(consumer.ends[0], TransferError):
            assert isinstance(consumer.ends[0], PeerLost) and was_granted
        else:
            assert_rows_equal(consumer, make_rows(40, number))
    network.advance(12.0)
    pair.assert_ledger_zero()


def test_a_sender_that_has_it_no_more_and_was_granted_nothing_goes_over_the_wire() -> None:
    """It let go of the segment, and its receiver does not know yet: it invites the next stream there."""
    pair = LatePair(num_slots=1)
    first, _ = pair.begin()
    pair.fetch_all()
    pair.network.settle()
    assert pair.num_in_use == 1
    pair.sender._guest.forget(first.connection)
    _, consumer = pair.announced()
    pair.fetch_all()
    pair.network.run_until(lambda: bool(consumer.ends), limit_s=5.0)
    assert_rows_equal(consumer, make_rows(40))
    assert any(isinstance(m, Block) for m in pair.said())
