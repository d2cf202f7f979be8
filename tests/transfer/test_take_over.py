"""Take-over: another sender goes on, or starts over, under a new epoch; the old one can do nothing any more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.transfer.test_streams import configure
from tests.transfer.virtual import Consumer, Faults, Pair, VirtualNetwork, assert_rows_equal, make_rows, sent_indexes
from transfer.errors import PeerLost, ResumeRejected, StreamAborted, StreamTimeout, TicketRejected
from transfer.protocol.actions import StreamStats
from transfer.protocol.messages import Abort, Accept, Message
from transfer.protocol.ticket import Ticket
from transfer.streams.stream_sender import OutgoingStream

pytestmark = pytest.mark.usefixtures("payload")

ROWS, BLOCKS = 200, 13  # blocks of 16


def cut_rows(data, low: int, high: int):  # type: ignore[no-untyped-def]
    return {name: rows[low:high].clone() for name, rows in data.items()}


def begin(pair: Pair, *, admit: bool = True, content_key: str = "k", **more: float) -> tuple[Consumer, OutgoingStream]:
    ticket = Ticket.issue("test")
    consumer = pair.listen(ticket, admit=admit, **{"take_over_s": 60.0, **more})
    stream = pair.send(ticket, content_key=content_key)
    return consumer, stream


def take_over(pair: Pair, stream_id: str, *, content_key: str = "k") -> OutgoingStream:
    ticket = pair.reissue(stream_id)
    assert ticket is not None
    stream = pair.send(ticket, sender=pair.another_sender(f"virtual://sender{ticket.epoch}"), content_key=content_key)
    pair.network.settle()
    return stream


def complete(pair: Pair, stream: OutgoingStream, data, first_row: int = 0) -> None:  # type: ignore[no-untyped-def]
    """The new sender computes and writes from `first_row` on."""
    num_rows = len(data["token_ids"])
    stream.announce(num_rows, [{"rows": num_rows}])
    if first_row < num_rows:
        stream.write(first_row, cut_rows(data, first_row, num_rows))
    pair.network.run_until(stream._ended.is_set)


def kill_sender(pair: Pair) -> None:
    """Its endpoint is gone; nothing of it arrives any more, and nobody is told."""
    del pair.network.endpoints["virtual://sender"]


@pytest.mark.parametrize("num_blocks", range(BLOCKS))
@pytest.mark.parametrize("pool_blocks", [1, 64])
def test_a_second_sender_goes_on_after_any_block(num_blocks: int, pool_blocks: int) -> None:
    pair = Pair(configure(16, 100, pool_blocks))
    data = make_rows(ROWS)
    consumer, first = begin(pair)
    first.announce(ROWS, [{"rows": ROWS}])
    first.write(0, cut_rows(data, 0, num_blocks * 16 + 5))
    pair.network.settle()
    assert consumer.num_rows == num_blocks * 16
    kill_sender(pair)
    sent = len(sent_indexes(pair.network))
    second = take_over(pair, first.stream_id)
    assert second.first_row == second.wait_accepted(0) == num_blocks * 16
    complete(pair, second, data, first_row=num_blocks * 16)
    assert second.result(0).blocks == BLOCKS - num_blocks
    assert sent_indexes(pair.network)[sent:] == list(range(num_blocks, BLOCKS))
    assert_rows_equal(consumer, data)
    assert isinstance(consumer.ends[0], StreamStats) and consumer.restarts == 0
    assert pair.receiver.stats()["transfer_blocks_in_use"] == pair.receiver.stats()["transfer_tickets_open"] == 0


@pytest.mark.parametrize("key", ["other", ""])
@pytest.mark.parametrize("num_blocks", [0, 1, 6, 12])
def test_another_content_starts_over_and_the_consumer_forgets(key: str, num_blocks: int) -> None:
    pair = Pair(configure(16, 100, 4))
    old, data = make_rows(ROWS, seed=9), make_rows(150)
    consumer, first = begin(pair, content_key="k" if key else "")
    first.announce(ROWS)
    first.write(0, cut_rows(old, 0, num_blocks * 16))
    pair.network.settle()
    assert consumer.num_rows == num_blocks * 16
    second = take_over(pair, first.stream_id, content_key=key)
    assert second.first_row == 0 and consumer.restarts == 1
    complete(pair, second, data)
    assert consumer.total_rows == 150
    assert_rows_equal(consumer, data)
    with pytest.raises(TicketRejected):
        first.result(0)
    pair.assert_ledger_zero()


@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize("granted", [False, True])
def test_a_sender_lost_before_the_first_row_costs_nothing(announced: bool, granted: bool) -> None:
    pair = Pair(configure(16, 100, 4))
    ticket = Ticket.issue("test")
    consumer = pair.listen(ticket, take_over_s=60.0)
    pair.network.settle()
    if granted:
        first = pair.send(ticket, content_key="k")
        if announced:
            first.announce(40, [{"rows": 40}])
        pair.network.settle()
    kill_sender(pair)
    pair.receiver.sender_lost(ticket.stream_id)
    second = take_over(pair, ticket.stream_id)
    assert pair.receiver.stats()["transfer_blocks_in_use"] > 0
    complete(pair, second, make_rows(40))
    assert_rows_equal(consumer, make_rows(40))
    assert consumer.restarts == 0
    assert pair.receiver.stats()["transfer_blocks_in_use"] == 0


def test_a_stream_that_is_not_admitted_keeps_its_announcement_and_starts_at_row_0() -> None:
    pair = Pair(configure(16, 100, 4))
    data = make_rows(ROWS)
    consumer, first = begin(pair, admit=False)
    first.announce(ROWS)
    first.write(0, cut_rows(data, 0, ROWS))
    pair.network.settle()
    kill_sender(pair)
    second = take_over(pair, first.stream_id)
    assert second.first_row == 0 and consumer.restarts == 0 and consumer.total_rows == ROWS
    assert pair.receiver.stats()["transfer_blocks_in_use"] == 1, "not admitted: one block"
    pair.receiver.admit(first.stream_id, ROWS)
    complete(pair, second, data)
    assert_rows_equal(consumer, data)


def test_admission_between_two_senders_keeps_the_stored_rows() -> None:
    pair = Pair(configure(16, 100, 9))
    data = make_rows(ROWS)
    consumer, first = begin(pair, admit=False)
    first.announce(ROWS)
    first.write(0, cut_rows(data, 0, 64))
    pair.network.settle()
    kill_sender(pair)
    pair.receiver.sender_lost(first.stream_id)
    pair.network.settle()
    pair.receiver.admit(first.stream_id)
    pair.network.settle()
    assert consumer.num_rows == 64
    second = take_over(pair, first.stream_id)
    assert second.first_row == 64
    complete(pair, second, data, first_row=64)
    assert_rows_equal(consumer, data)


def test_many_take_overs_in_a_row_and_each_old_sender_is_told() -> None:
    pair = Pair(configure(16, 100, 4))
    data = make_rows(ROWS)
    consumer, stream = begin(pair)
    epochs = []
    for number in range(5):
        epochs.append(stream.session.ticket.epoch)
        stream.announce(ROWS)
        first = number * 32
        stream.write(first, cut_rows(data, first, first + 35))
        pair.network.settle()
        old, stream = stream, take_over(pair, stream.stream_id)
        pair.network.advance(3)
        with pytest.raises(TicketRejected):
            old.result(0)
        assert stream.first_row == first + 32
    assert epochs == [1, 2, 3, 4, 5]
    complete(pair, stream, data, first_row=stream.first_row or 0)
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


def test_a_sender_that_announces_another_total_under_the_same_key_is_refused() -> None:
    pair = Pair(configure(16, 100, 4))
    consumer, first = begin(pair)
    first.announce(ROWS)
    first.write(0, cut_rows(make_rows(ROWS), 0, 64))
    pair.network.settle()
    second = take_over(pair, first.stream_id)
    second.announce(ROWS + 1)
    pair.network.settle()
    with pytest.raises(ResumeRejected):
        second.result(0)
    assert isinstance(consumer.ends[0], ResumeRejected)
    pair.assert_ledger_zero()


def test_a_sender_with_fewer_rows_than_are_stored_refuses_itself() -> None:
    pair = Pair(configure(16, 100, 4))
    consumer, first = begin(pair)
    first.announce(ROWS)
    first.write(0, cut_rows(make_rows(ROWS), 0, 64))
    pair.network.settle()
    second = take_over(pair, first.stream_id)
    second.announce(40)
    pair.network.settle()
    with pytest.raises(ResumeRejected):
        second.result(0)
    assert isinstance(consumer.ends[0], ResumeRejected)
    pair.assert_ledger_zero()


@pytest.mark.parametrize(
    "code", ["EndpointClosed", "PeerLost", "EmbedStopped", "StreamTimeout", "BadImage", "Cancelled"]
)
def test_an_abort_orphans_when_it_speaks_of_loss_and_else_ends_the_stream(code: str) -> None:
    pair = Pair(configure(16, 100, 4))
    consumer, first = begin(pair)
    first.announce(ROWS)
    pair.network.settle()
    first.abort(code, "because")
    pair.network.settle()
    if code in ("BadImage", "Cancelled"):
        assert isinstance(consumer.ends[0], StreamAborted)
        assert pair.reissue(first.stream_id) is None
    else:
        assert not consumer.ends
        complete(pair, take_over(pair, first.stream_id), make_rows(ROWS))
        assert_rows_equal(consumer, make_rows(ROWS))
    pair.assert_ledger_zero()


def test_without_take_over_a_lost_sender_ends_the_stream_at_once() -> None:
    pair = Pair(configure(16, 100, 4))
    consumer, first = begin(pair, take_over_s=0.0)
    first.announce(ROWS)
    pair.network.settle()
    pair.receiver.sender_lost(first.stream_id, "its worker died")
    pair.network.settle()
    assert isinstance(consumer.ends[0], PeerLost)
    pair.assert_ledger_zero()


def test_nobody_takes_over_in_time() -> None:
    pair = Pair(configure(16, 100, 4))
    consumer, first = begin(pair, take_over_s=20.0)
    first.announce(ROWS)
    first.write(0, cut_rows(make_rows(ROWS), 0, 64))
    pair.network.settle()
    kill_sender(pair)
    pair.network.advance(30.5, step=0.5)  # the silence that orphans it
    assert not consumer.ends and pair.receiver.stats()["transfer_blocks_in_use"] == 0
    assert pair.reissue(first.stream_id) is not None
    pair.network.advance(21, step=0.5)
    assert isinstance(consumer.ends[0], StreamTimeout)
    assert pair.receiver.stats()["transfer_tickets_open"] == 0
    assert pair.reissue(first.stream_id) is None


@pytest.mark.parametrize("whose", ["receiver", "sender"])
def test_a_deadline_ends_the_stream_at_both_ends(whose: str) -> None:
    pair = Pair(configure(16, 100, 4))
    ticket = Ticket.issue("test")
    limit = {"deadline_s": 40.0}
    consumer = pair.listen(ticket, take_over_s=60.0, **(limit if whose == "receiver" else {}))
    stream = pair.send(ticket, **(limit if whose == "sender" else {}))
    stream.announce(ROWS)
    pair.network.advance(39, step=0.5)
    assert not consumer.ends
    pair.network.advance(2, step=0.5)
    assert isinstance(consumer.ends[0], StreamTimeout) and "deadline" in str(consumer.ends[0])
    with pytest.raises(StreamTimeout):
        stream.result(0)
    pair.assert_ledger_zero()


def test_the_old_senders_late_messages_change_nothing() -> None:
    pair = Pair(configure(16, 100, 16))
    data = make_rows(ROWS)
    consumer, first = begin(pair)
    first.announce(ROWS)
    first.write(0, cut_rows(data, 0, 80))
    pair.network.settle()
    recorded = [entry for entry in pair.network.log if entry[0].address == "virtual://receiver"]
    second = take_over(pair, first.stream_id)
    for target, source, message, frames in recorded:
        target.deliver(source, message, frames)
    pair.network.settle()
    assert pair.receiver.stats()["transfer_dropped_foreign_connection"] >= len(recorded) - 1
    complete(pair, second, data, first_row=80)
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


def test_a_stream_whose_every_block_is_stored_needs_no_sender() -> None:
    pair = Pair(configure(16, 100, 16))
    data = make_rows(80)
    consumer, first = begin(pair, admit=False)
    first.announce(80)
    first.write(0, data)
    pair.network.settle()
    kill_sender(pair)
    pair.receiver.sender_lost(first.stream_id)
    pair.network.advance(100, step=1.0)
    assert pair.reissue(first.stream_id) is None
    pair.receiver.admit(first.stream_id)
    pair.network.settle()
    assert_rows_equal(consumer, data)
    assert pair.receiver.stats()["transfer_tickets_open"] == 0


@pytest.mark.parametrize("seed", range(12))
def test_take_overs_over_a_lossy_network(seed: int) -> None:
    network = VirtualNetwork(seed, Faults(drop=0.1, repeat=0.1, reorder=0.2, corrupt=0.05))
    pair = Pair(configure(16, 64, 3), network=network)
    data = make_rows(ROWS)
    consumer, stream = begin(pair, take_over_s=600.0)
    for _ in range(4):
        stream.announce(ROWS)
        network.run_until(lambda s=stream: s.first_row is not None)  # type: ignore[misc]
        low = stream.first_row or 0
        stream.write(low, cut_rows(data, low, min(ROWS, low + 40)))
        network.advance(4)
        if consumer.ends:
            break
        ticket = pair.reissue(stream.stream_id)
        if ticket is None:
            break
        stream = pair.send(ticket, sender=pair.another_sender(f"virtual://s{ticket.epoch}"), content_key="k")
    if not consumer.ends:
        stream.announce(ROWS)
        network.run_until(lambda: stream.first_row is not None)
        low = stream.first_row or 0
        stream.write(low, cut_rows(data, low, ROWS))
    network.run_until(lambda: bool(consumer.ends))
    assert network.fired["drop"] and network.fired["reorder"]
    assert_rows_equal(consumer, data)
    assert pair.receiver.stats()["transfer_blocks_in_use"] == 0


def test_a_forged_accept_is_dropped_and_the_right_one_taken() -> None:
    pair = Pair(configure(16, 100, 4))
    forged: list[Message] = []

    def rewrite(message: Message, frames: list[bytes]) -> tuple[Message, list[bytes]]:
        if isinstance(message, Accept) and not forged:
            forged.append(replace(message, first_index=2))
            return forged[0], frames
        return message, frames

    pair.network.rewrite = rewrite
    stream, consumer, data = pair.transfer(100)
    pair.network.run_until(lambda: bool(consumer.ends))
    assert forged and pair.sender.stats()["transfer_dropped_bad_proof"] == 1
    assert_rows_equal(consumer, data)
    assert stream.first_row == 0
    assert not [m for _, _, m, _ in pair.network.log if isinstance(m, Abort)]
    pair.assert_ledger_zero()
