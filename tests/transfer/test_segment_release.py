"""Slots come free when their sender says that it let go. When that word is lost or late, nobody starves for it."""

from __future__ import annotations

import pytest

from tests.transfer.segment_pair import SegmentPair, part
from tests.transfer.test_streams import configure
from tests.transfer.virtual import assert_rows_equal, make_rows
from transfer.errors import StreamAborted, TicketRejected
from transfer.memory.segment_area import ASK_S
from transfer.memory.segment_host import MAX_PEER_SEGMENTS, RELEASE_S, STUCK_S
from transfer.memory.segments import is_supported
from transfer.protocol.messages import Abort, Block, Close, Filled, Released
from transfer.protocol.ticket import Ticket

pytestmark = pytest.mark.skipif(not is_supported(), reason="this system has no sealed memory files")


def cancel_one(pair: SegmentPair) -> None:
    stream, consumer = pair.begin(32)
    stream.abort("Cancelled", "not wanted")
    pair.network.settle()
    assert [type(end) for end in consumer.ends] == [StreamAborted]


def test_a_lost_word_is_asked_for_while_the_segment_is_in_use() -> None:
    pair = SegmentPair(configure(16, 32, 8))
    slow, consumer = pair.begin(16 * 100)
    pair.lose(Released)
    cancel_one(pair)
    assert pair.num_fenced == 2 and pair.network.fired["rewritten away"] == 1
    pair.lose()
    pair.network.advance(ASK_S + 0.2)
    assert pair.num_fenced == 0, "it was asked, and said so again"
    assert len(pair.areas) == 1 and pair.receiver.stats()["transfer_segments_abandoned_total"] == 0
    data = make_rows(16 * 100)
    slow.write(0, data)
    pair.network.run_until(lambda: bool(consumer.ends))
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


def test_a_sender_that_never_says_it_starves_no_stream() -> None:
    """Every cancelled stream leaves fenced slots behind, and one slow stream keeps the segment in use throughout."""
    pair = SegmentPair(configure(16, 32, 8))
    slow, slow_consumer = pair.begin(16 * 40)
    data = make_rows(16 * 40)
    pair.lose(Released)
    for number in range(30):
        slow.write(16 * number, part(data, 16 * number, 16 * number + 16))
        cancel_one(pair)
        pair.network.advance(RELEASE_S)
        _, consumer, rows = pair.whole(40, number)
        pair.network.run_until(lambda consumer=consumer: bool(consumer.ends), limit_s=1.0)  # type: ignore[misc]
        assert_rows_equal(consumer, rows)
        assert slow_consumer.num_rows == 16 * number + 16, "and those that were there go on"
    assert pair.network.fired["rewritten away"] >= 30
    slow.write(16 * 30, part(data, 16 * 30, 16 * 40))
    pair.network.run_until(lambda: bool(slow_consumer.ends))
    assert_rows_equal(slow_consumer, data)
    pair.assert_ledger_zero()


def test_streams_of_the_old_segment_go_on_in_it_while_new_ones_have_another() -> None:
    pair = SegmentPair(configure(16, 32, 8))
    old, old_consumer = pair.begin(160)
    pair.lose(Released)
    cancel_one(pair)
    pair.network.advance(RELEASE_S + 1)
    new, new_consumer = pair.begin(160)
    first, second = pair.areas
    assert (first.num_streams, second.num_streams) == (1, 1) and second.is_attached
    data = {stream: make_rows(160, seed) for seed, stream in enumerate((old, new))}
    for stream in (new, old):
        stream.write(0, data[stream])
    pair.network.run_until(lambda: bool(old_consumer.ends and new_consumer.ends))
    assert_rows_equal(old_consumer, data[old])
    assert_rows_equal(new_consumer, data[new])
    pair.lose()
    pair.assert_ledger_zero()
    assert pair.sender.stats()["transfer_segments_mapped"] == len(pair.areas)


def test_segments_of_one_peer_are_bounded() -> None:
    pair = SegmentPair(configure(16, 32, 8))
    pair.lose(Released)
    for _ in range(MAX_PEER_SEGMENTS + 2):
        pair.begin(16)  # keeps its segment in use
        cancel_one(pair)
        pair.network.advance(RELEASE_S + 0.2)
    assert len(pair.areas) == MAX_PEER_SEGMENTS
    _, consumer, rows = pair.whole(100)
    assert_rows_equal(consumer, rows)
    assert any(isinstance(message, Block) for _, _, message, _ in pair.network.log), "the rest goes over the wire"


@pytest.mark.parametrize("num_slots", [1, 4])
def test_a_worker_that_takes_its_own_stream_over_waits_for_nobody(num_slots: int) -> None:
    pair = SegmentPair(configure(16, 16 * num_slots, num_slots))
    ticket, data = Ticket.issue("test"), make_rows(100)
    consumer, stream = pair.listen(ticket, take_over_s=60.0), pair.send(ticket, content_key="k")
    pair.network.settle()
    assert pair.num_in_use == num_slots, "its first epoch holds every slot there is"
    pair.lose(Released)
    second = pair.reissue(ticket.stream_id)
    assert second is not None
    pair.network.settle()
    with pytest.raises(TicketRejected):
        stream.result(0)
    again = pair.send(second, content_key="k")
    again.announce(100)
    again.write(0, data)
    pair.network.advance(0.2)
    assert pair.num_fenced == num_slots and not consumer.ends, "it has no slot"
    pair.lose()
    pair.network.run_until(lambda: bool(consumer.ends), limit_s=ASK_S + 0.2)
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


@pytest.mark.parametrize("take_over_s", [0.0, 60.0])
def test_streams_that_nothing_can_move_but_a_silent_writer_are_not_left_waiting(take_over_s: float) -> None:
    pair = SegmentPair(configure(16, 64, 4))
    busy, _ = pair.begin()
    views = busy.slot_rows(0, 64)
    assert views is not None and len(views["token_ids"]) == 64
    ticket, data = Ticket.issue("test"), make_rows(40)
    consumer, stream = pair.listen(ticket, take_over_s=take_over_s), pair.send(ticket)
    stream.announce(40)
    stream.write(0, data)
    pair.receiver.close(busy.stream_id)
    pair.network.settle()
    assert pair.num_fenced == 4, "its producer computes in every slot"
    pair.network.advance(STUCK_S - 0.5)
    assert not consumer.ends and pair.num_fenced == 4
    pair.network.advance(1.0)
    assert_rows_equal(consumer, data)
    assert any(isinstance(message, Block) for _, _, message, _ in pair.network.log), "over the wire"
    for view in views.values():
        view.fill_(7)  # long after: it is in nobody's way
    busy.drop_slots()
    pair.network.advance(1.0)
    pair.assert_ledger_zero()


def test_who_is_asked_while_its_producer_writes_says_nothing() -> None:
    pair = SegmentPair(configure(16, 32, 8))
    pair.begin(16)  # keeps the segment in use
    busy, _ = pair.begin()
    assert busy.slot_rows(0, 32) is not None
    pair.receiver.close(busy.stream_id)
    pair.network.advance(1.5)
    asked = [m for _, _, m, _ in pair.network.log if isinstance(m, Abort) and m.stream_id == busy.stream_id]
    assert len(asked) >= 3 and pair.num_fenced == 2
    busy.drop_slots()
    pair.network.settle()
    assert pair.num_fenced == 0


def test_an_end_that_was_lost_with_its_release_is_the_right_one() -> None:
    """A sender that is asked about a complete stream hears that it is complete."""
    pair = SegmentPair(configure(16, 64, 8))
    pair.begin(16)  # keeps the segment in use
    stream, consumer = pair.begin()
    pair.lose(Close)
    stream.announce(0)  # all its slots are surplus
    pair.network.settle()
    assert consumer.ends and not stream._ended.is_set()
    pair.lose()
    pair.network.advance(ASK_S + 1.5)
    assert stream.result(0).blocks == 0
    assert pair.num_fenced == 0


def test_a_release_of_an_epoch_that_goes_on_frees_nothing() -> None:
    pair = SegmentPair(configure(16, 64, 8))
    stream, consumer = pair.begin(64)
    (connection,) = {c for e, c, _, _ in pair.network.log if e.address == "virtual://receiver"}
    pair.receiver.on_message(connection, Released(stream_id=stream.stream_id, epoch=1), ())
    pair.network.settle()
    assert pair.num_in_use == 4 and pair.num_fenced == 0
    data = make_rows(64)
    stream.write(0, data)
    pair.network.settle()
    assert_rows_equal(consumer, data)


def test_a_seal_counts_for_one_grant_only() -> None:
    """What a slot held before it was granted anew is nobody's rows, though its old seal said whose they were."""
    pair = SegmentPair(configure(16, 16, 1))
    _, consumer, _ = pair.whole(16, admit=False)
    (area,) = pair.areas
    (told,) = (message for _, _, message, _ in pair.network.log if isinstance(message, Filled))
    assert consumer.total_rows == 16 and area.is_filled(told, 0, 1, 16)
    area.free(told.stream_id, told.block_ids, fenced=False)
    assert area.is_filled(told, 0, 1, 16), "nobody wiped it yet"
    assert area.allocate(told.stream_id, 1) == told.block_ids
    assert not area.is_filled(told, 0, 1, 16)
