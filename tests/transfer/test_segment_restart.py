"""The receiving loop dies in the middle of what it does with shared memory; a simulation found each of these places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from tests.transfer.segment_pair import SegmentPair, part
from tests.transfer.test_streams import configure
from tests.transfer.virtual import Pair, assert_rows_equal, make_rows
from transfer.errors import PeerLost, TicketRejected
from transfer.memory.segment_book import SegmentBook
from transfer.memory.segment_guest import SegmentGuest
from transfer.memory.segments import is_supported
from transfer.protocol.messages import Accept, Ack, Block, Filled, Grant, Message, Revoke, Revoked
from transfer.protocol.ticket import Ticket
from transfer.service.service import Service

pytestmark = pytest.mark.skipif(not is_supported(), reason="this system has no sealed memory files")


class LoopDied(BaseException):
    """No handler of errors can hold it."""


def dies_once(right: Callable[..., Any], died: list[object]) -> Callable[..., Any]:
    def wrong(*arguments: Any, **more: Any) -> Any:
        if died:
            return right(*arguments, **more)
        died.append(arguments)
        raise LoopDied

    return wrong


def die_before(monkeypatch: pytest.MonkeyPatch, pair: Pair, kind: type[Message], died: list[object]) -> None:
    """The receiving loop dies in the place of sending its first message of this kind."""
    endpoint = pair.receiver_service.endpoint
    send = endpoint.send

    def dying(connection: object, message: Message, frames: tuple[()] = ()) -> None:
        if isinstance(message, kind) and not died:
            died.append(message)
            raise LoopDied
        send(connection, message, frames)  # type: ignore[arg-type]

    monkeypatch.setattr(endpoint, "send", dying)


def run(pair: Pair) -> None:
    """Deliver what is pending; where the loop dies, start it anew and go on."""
    while True:
        try:
            return pair.network.settle()
        except LoopDied:
            pair.receiver.restart_loop()


def test_a_slot_whose_rows_were_handed_on_comes_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sender sealed it, so it says nothing more of it: were it fenced, nobody would ever get it."""
    pair, died = SegmentPair(configure(16, 16, 1)), list[object]()
    monkeypatch.setattr(SegmentBook, "free_blocks", dies_once(SegmentBook.free_blocks, died))
    ticket_stream, consumer = pair.begin(100)
    data = make_rows(100)
    ticket_stream.write(0, data)
    run(pair)
    assert len(died) == 1 and pair.num_fenced == 0
    pair.network.run_until(lambda: bool(consumer.ends), limit_s=5.0)
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


def test_an_accepted_stream_gets_slots_and_no_blocks_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Accept left; that the blocks are to be in the segment was still to be noted."""
    pair, died = SegmentPair(configure(16, 64, 8)), list[object]()
    send = pair.receiver_service.endpoint.send

    def dying(connection: object, message: Message, frames: tuple[()] = ()) -> None:
        send(connection, message, frames)  # type: ignore[arg-type]
        if isinstance(message, Accept) and not died:
            died.append(message)
            raise LoopDied

    monkeypatch.setattr(pair.receiver_service.endpoint, "send", dying)
    stream, consumer, data = pair.transfer(100)
    run(pair)
    assert died and pair.receiver._area.pool.num_in_use == 0
    pair.network.run_until(lambda: bool(consumer.ends), limit_s=5.0)
    assert_rows_equal(consumer, data)
    sent = [type(message) for _, _, message, _ in pair.network.log]
    assert Filled in sent and Block not in sent
    assert stream.result(0).resent_blocks == 0
    pair.assert_ledger_zero()


def test_a_consumer_hears_the_end_though_the_loop_died_while_slots_came_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream without rows is over while what it was granted is still asked back."""
    pair, died = SegmentPair(configure(16, 64, 8)), list[object]()
    monkeypatch.setattr(SegmentBook, "fence", dies_once(SegmentBook.fence, died))
    stream, consumer, _ = pair.transfer(0)
    run(pair)
    assert died
    pair.network.run_until(lambda: bool(consumer.ends), limit_s=5.0)
    assert len(consumer.ends) == 1 and consumer.total_rows == 0
    pair.network.run_until(lambda: not pair.sender.stats()["transfer_streams_sending"], limit_s=5.0)
    stream.result(0)
    pair.assert_ledger_zero()


class StrangersPair(SegmentPair):
    """The sender tries to share memory, and cannot."""

    def _guest(self, service: Service) -> SegmentGuest:
        def refuse(*arguments: object) -> NoReturn:
            raise PeerLost("another machine")

        return SegmentGuest(service, is_on=True, fetch=refuse, run=lambda job: job())


def test_blocks_of_the_pool_come_back_at_once_though_memory_was_offered() -> None:
    """Only this side writes them: nobody need wait until their sender heard that they are withdrawn."""
    pair = StrangersPair(configure(16, 128, 8))
    pair.lose(Revoked)
    first, _ = pair.begin(32, admit=False)
    assert pair.num_in_use == 2, "what lies beyond the total is free"
    second, _, _ = pair.whole(500, admit=False)
    assert pair.num_in_use > 2
    others = [pair.transfer(16, admit=False)[1] for _ in range(6)]
    pair.network.settle()
    assert [other.total_rows for other in others] == [16] * 6
    sent = [type(message) for _, _, message, _ in pair.network.log]
    assert Revoke in sent and Block in sent and Filled not in sent
    for stream in (first, second):
        stream.abort("Cancelled", "that is all")


def test_slots_that_were_withdrawn_are_asked_for_though_the_loop_died_before_it_said_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It had recorded that they are on their way back, so nobody would have asked for them before a probe came."""
    pair, died = SegmentPair(configure(16, 64, 8)), list[object]()
    die_before(monkeypatch, pair, Ack, died)
    _, consumer, _ = pair.transfer(16, admit=False)
    run(pair)
    assert died and consumer.total_rows == 16
    assert pair.num_in_use == 1, "the others are free again, and no time has passed"


def test_a_sender_that_takes_over_is_accepted_though_the_loop_died_while_old_slots_came_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The Open was recorded, its answer was still to come: a Grant without it is nothing to that sender."""
    pair, died = SegmentPair(configure(16, 64, 8)), list[object]()
    ticket, data = Ticket.issue("test"), make_rows(100)
    consumer = pair.listen(ticket, admit=False, take_over_s=60.0)
    first = pair.send(ticket, content_key="one")
    first.announce(100)
    first.write(0, part(data, 0, 32))
    pair.network.settle()
    later = pair.reissue(ticket.stream_id)
    assert later is not None
    consumer.admit = True
    monkeypatch.setattr(SegmentBook, "free_blocks", dies_once(SegmentBook.free_blocks, died))
    stream = pair.send(later, sender=pair.another_sender(), content_key="other")
    stream.announce(100)
    stream.write(0, data)
    run(pair)
    assert died and consumer.restarts == 1 and consumer.ends, "and no time has passed"
    assert_rows_equal(consumer, data)
    said = [type(m) for _, _, m, _ in pair.network.log if isinstance(m, (Accept, Grant)) and m.epoch == later.epoch]
    assert said.index(Accept) < said.index(Grant)


def test_a_sender_hears_that_its_epoch_is_over_though_the_loop_died_while_its_slots_were_fenced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair, died = SegmentPair(configure(16, 64, 8)), list[object]()
    ticket = Ticket.issue("test")
    pair.listen(ticket, take_over_s=60.0)
    stream = pair.send(ticket)
    pair.network.settle()
    assert pair.num_in_use
    monkeypatch.setattr(SegmentBook, "fence", dies_once(SegmentBook.fence, died))
    pair.receiver.sender_lost(ticket.stream_id)
    run(pair)
    assert died and pair.num_in_use == 0
    with pytest.raises(TicketRejected, match="epoch 1 of stream"):
        stream.result(0)
    assert pair.num_fenced == 0, "it let go of them"
