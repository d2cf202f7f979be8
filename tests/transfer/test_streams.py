"""Whole streams over the virtual network: every size, every pool, lossless and lossy, fair and bounded."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transfer.virtual import Faults, Pair, VirtualNetwork, assert_rows_equal, make_rows
from transfer.config import TransferConfig
from transfer.errors import (
    ConfigError,
    EndpointClosed,
    LocalProtocolError,
    MessageTooLarge,
    Overloaded,
    PeerLost,
    StreamAborted,
    StreamTimeout,
)
from transfer.protocol.actions import StreamStats
from transfer.protocol.messages import Block, Filled, Grant
from transfer.protocol.ticket import Ticket
from transfer.tensors import SEAL_BYTES

pytestmark = pytest.mark.usefixtures("payload")

SIZES = st.sampled_from([0, 1, 15, 16, 17, 100, 127, 128, 129, 1000, 1600, 2049])


def configure(block_size: int, default: int, pool_blocks: int, **more: float) -> TransferConfig:
    return TransferConfig(
        block_size=block_size,
        default_allocate_tokens=default,
        pool_tokens=block_size * pool_blocks,
        credit_window_blocks=4,
        **more,  # type: ignore[arg-type]
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    block_size=st.sampled_from([16, 100, 128]),
    default=st.sampled_from([1, 100, 8000, 8192]),
    pool_blocks=st.sampled_from([1, 2, 3, 64]),
    sizes=st.lists(SIZES, min_size=1, max_size=5),
)
def test_streams_arrive_whole_whatever_the_sizes(
    block_size: int, default: int, pool_blocks: int, sizes: list[int]
) -> None:
    pair = Pair(configure(block_size, default, pool_blocks))
    streams = [pair.transfer(n) for n in sizes]
    pair.network.run_until(lambda: all(consumer.ends for _, consumer, _ in streams))
    for (stream, consumer, data), num_rows in zip(streams, sizes, strict=True):
        assert_rows_equal(consumer, data)
        stats = stream.result(0)
        assert stats.blocks == -(-num_rows // block_size)
        assert stats.num_bytes == num_rows * (6 + 4)
        assert stats.resent_blocks == 0
        assert isinstance(consumer.ends[0], StreamStats) and len(consumer.ends) == 1
        assert consumer.total_rows == num_rows and consumer.items == ({"rows": num_rows},)
    pair.assert_ledger_zero()
    check_rounds(pair, block_size)


def check_rounds(pair: Pair, block_size: int) -> None:
    for _, _, message, frames in pair.network.log:
        if isinstance(message, Grant):
            assert message.allocated_tokens == len(message.block_ids) * block_size
        if isinstance(message, Block):
            assert message.first_row == message.index * block_size
            seal = 0 if message.tag else SEAL_BYTES
            assert [len(f) - seal for f in frames] == [6 * message.num_rows, 4 * message.num_rows]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6), pool_blocks=st.sampled_from([1, 2, 9]), sizes=st.lists(SIZES, min_size=1, max_size=4)
)
def test_a_lossy_link_changes_nothing(seed: int, pool_blocks: int, sizes: list[int]) -> None:
    faults = Faults(drop=0.1, repeat=0.1, reorder=0.2, corrupt=0.05)
    network = VirtualNetwork(seed, faults)
    pair = Pair(configure(16, 100, pool_blocks), network=network)
    streams = [pair.transfer(n) for n in sizes]
    network.run_until(
        lambda: all(c.ends for _, c, _ in streams) and not pair.sender.stats()["transfer_streams_sending"]
    )
    for stream, consumer, data in streams:
        assert_rows_equal(consumer, data)
        stream.result(0)
    pair.assert_ledger_zero()


def test_totals_are_shown_before_anything_was_counted() -> None:
    """A scraper that first sees a counter at 7 has lost 7 of its rate."""
    pair = Pair(configure(16, 100, 5))
    ends = (pair.sender, pair.receiver)
    before = [{name: n for name, n in end.stats().items() if name.endswith("_total")} for end in ends]
    assert all(before) and not any(n for totals in before for n in totals.values())
    pair.transfer(160)
    pair.network.settle()
    for end, totals in zip(ends, before, strict=True):
        after = {name: n for name, n in end.stats().items() if name.endswith("_total")}
        assert after.keys() == totals.keys() and any(after.values())


@pytest.mark.parametrize("kind", ["drop", "repeat", "reorder", "corrupt"])
def test_each_fault_fires_and_is_survived(kind: str, payload: str) -> None:
    if kind == "corrupt" and payload == "shm":
        pytest.skip("no payload on the link that could be corrupted")
    network = VirtualNetwork(7, Faults(**{kind: 0.2}))
    pair = Pair(configure(16, 100, 5), network=network)
    stream, consumer, data = pair.transfer(1600)
    network.run_until(lambda: bool(consumer.ends) and not pair.sender.stats()["transfer_streams_sending"])
    assert network.fired[kind] > 5, "the fault did not happen"
    assert_rows_equal(consumer, data)
    if kind in ("drop", "corrupt"):
        assert stream.result(0).resent_blocks > 0
    if kind == "corrupt":
        stats = pair.receiver.stats()  # a damaged copy of a block that came whole before counts as a duplicate
        assert 5 < stats["transfer_dropped_bad_tag"] <= network.fired["corrupt"]
        assert stats["transfer_dropped_bad_tag"] + stats["transfer_dropped_duplicate"] >= network.fired["corrupt"]
    pair.assert_ledger_zero()


def test_rows_may_be_written_in_any_pieces_and_before_the_announcement() -> None:
    rng = random.Random(3)
    pair = Pair(configure(16, 16, 2))
    ticket = Ticket.issue("test")
    consumer, stream, data = pair.listen(ticket), pair.send(ticket), make_rows(500)
    row = 0
    while row < 500:
        count = min(rng.choice([1, 3, 16, 40, 111]), 500 - row)
        stream.write(row, {name: rows[row : row + count].clone() for name, rows in data.items()})
        row += count
        if row > 200 and consumer.total_rows is None:
            stream.announce(500)
            pair.network.settle()
    pair.network.run_until(lambda: bool(consumer.ends))
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


@pytest.mark.parametrize("sender_first", [True, False])
def test_either_end_may_come_first(sender_first: bool) -> None:
    pair = Pair(configure(16, 100, 8))
    ticket = Ticket.issue("test")
    if sender_first:
        stream = pair.send(ticket)
        pair.network.settle()
        assert pair.receiver.stats()["transfer_opens_parked"] == 1
        consumer = pair.listen(ticket)
    else:
        consumer = pair.listen(ticket)
        pair.network.settle()
        stream = pair.send(ticket)
    stream.announce(20)
    stream.write(0, make_rows(20))
    pair.network.settle()
    assert consumer.num_rows == 20
    pair.assert_ledger_zero()


def test_an_open_for_an_unknown_stream_is_forgotten_and_times_out_at_the_sender() -> None:
    pair = Pair(configure(16, 100, 8, idle_timeout_s=20.0))
    stream = pair.send(Ticket.issue("test"))
    pair.network.advance(25, step=0.5)
    with pytest.raises(StreamTimeout):
        stream.result(0)
    pair.network.advance(6, step=0.5)
    pair.assert_ledger_zero()


def test_an_unadmitted_stream_holds_its_grant_and_delivers_nothing() -> None:
    pair = Pair(configure(16, 32, 8))
    stream, consumer, data = pair.transfer(100, admit=False)
    pair.network.advance(60)
    assert consumer.total_rows == 100 and consumer.num_rows == 0
    assert pair.receiver.stats()["transfer_blocks_in_use"] == 2
    pair.receiver.admit(stream.stream_id)
    pair.network.settle()
    assert_rows_equal(consumer, data)
    assert stream.result(0).resent_blocks == 0
    pair.assert_ledger_zero()


@pytest.mark.usefixtures("wire_only")  # in a segment, streams that are not attached yet have no place
def test_a_first_grant_leaves_one_block_for_every_other_open_stream() -> None:
    pair = Pair(configure(16, 8192, 8))
    tickets = [Ticket.issue(f"{n}") for n in range(4)]
    for ticket in tickets:
        pair.listen(ticket, admit=False)
    for ticket in tickets:
        pair.send(ticket)
        pair.network.settle()
    grants = [m for _, _, m, _ in pair.network.log if isinstance(m, Grant)]
    assert [len(g.block_ids) for g in grants] == [5, 1, 1, 1]
    assert [g.allocated_tokens for g in grants] == [80, 16, 16, 16]


def test_surplus_of_the_first_grant_returns_at_the_announcement() -> None:
    pair = Pair(configure(16, 8192, 8))
    pair.transfer(17, admit=False)
    pair.network.settle()
    assert pair.receiver.stats()["transfer_blocks_in_use"] == 2


def test_many_streams_through_one_block_finish_oldest_first() -> None:
    pair = Pair(configure(16, 8192, 1))
    streams = [pair.transfer(100) for _ in range(20)]
    order: list[int] = []
    for number, (stream, _, _) in enumerate(streams):
        stream.on_done(lambda _, n=number: order.append(n))  # type: ignore[misc]
    pair.network.run_until(lambda: len(order) == 20)
    assert order == list(range(20))
    for _, consumer, data in streams:
        assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


def test_a_silent_sender_times_out_and_others_go_on() -> None:
    pair = Pair(configure(16, 32, 4))
    stream, consumer, _ = pair.transfer(1000, admit=False)
    pair.network.settle()
    pair.network.rewrite = lambda m, f: None if getattr(m, "stream_id", "") == stream.stream_id else (m, f)
    _, other, data = pair.transfer(200)
    pair.network.advance(31)
    assert pair.network.fired["rewritten away"] > 0
    assert isinstance(consumer.ends[0], StreamTimeout)
    with pytest.raises(StreamTimeout):
        stream.result(0)
    assert_rows_equal(other, data)
    pair.assert_ledger_zero()


def test_a_slow_producer_ends_no_stream_while_its_sender_lives() -> None:
    pair = Pair(configure(16, 32, 4, stream_timeout_s=50.0, admit_timeout_s=60.0))
    ticket, data = Ticket.issue("test"), make_rows(200)
    consumer, stream = pair.listen(ticket), pair.send(ticket)
    pair.network.advance(400, step=0.5)  # queued before anything is known
    stream.announce(200)
    pair.network.advance(400, step=0.5)  # queued between the announcement and the first row
    stream.write(0, {n: r[:40].clone() for n, r in data.items()})
    pair.network.advance(400, step=0.5)
    assert not consumer.ends and consumer.num_rows == 32
    stream.write(40, {n: r[40:].clone() for n, r in data.items()})
    pair.network.settle()
    assert_rows_equal(consumer, data)
    assert stream.result(0).resent_blocks == 0
    pair.assert_ledger_zero()


@pytest.mark.parametrize("announced", [True, False])
def test_rows_that_trickle_in_without_filling_a_block_keep_the_stream_alive(announced: bool) -> None:
    pair = Pair(configure(128, 128, 4, idle_timeout_s=30.0))
    ticket, data = Ticket.issue("test"), make_rows(120)
    consumer, stream = pair.listen(ticket), pair.send(ticket)
    if announced:
        stream.announce(120)
    for row in range(120):
        pair.network.advance(0.5)
        stream.write(row, {n: r[row : row + 1].clone() for n, r in data.items()})
    if not announced:
        stream.announce(120)
    pair.network.settle()
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


def test_a_ticket_that_no_sender_opens_times_out() -> None:
    pair = Pair(configure(16, 32, 4, stream_timeout_s=50.0))
    consumer = pair.listen(Ticket.issue("test"))
    pair.network.advance(49, step=0.5)
    assert not consumer.ends
    pair.network.advance(2, step=0.5)
    assert isinstance(consumer.ends[0], StreamTimeout)
    pair.assert_ledger_zero()


@pytest.mark.parametrize("producing", [True, False])
def test_a_block_that_is_never_acknowledged_times_out_at_both_ends(producing: bool) -> None:
    pair = Pair(configure(16, 32, 4, stream_timeout_s=50.0))
    pair.network.rewrite = lambda m, f: None if isinstance(m, (Block, Filled)) else (m, f)
    ticket, data = Ticket.issue("test"), make_rows(1000)
    consumer, stream = pair.listen(ticket), pair.send(ticket)
    stream.announce(1000)
    stream.write(0, {n: r[:100].clone() for n, r in data.items()})
    for row in range(100, 198):
        pair.network.advance(0.5)
        assert not consumer.ends
        if producing:  # rows that are written are no sign that rows arrive
            stream.write(row, {n: r[row : row + 1].clone() for n, r in data.items()})
    pair.network.advance(2)
    assert pair.network.fired["rewritten away"] > 10
    with pytest.raises(StreamTimeout, match="block 0 was sent and not acknowledged"):
        stream.result(0)
    assert isinstance(consumer.ends[0], StreamTimeout)
    pair.assert_ledger_zero()


def test_a_block_that_fits_no_message_is_refused_at_both_ends() -> None:
    row_bytes = 6  # of the wider plane; the other has 4
    fits, whole = configure(16, 32, 4, max_message_bytes=16 * row_bytes), configure(16, 32, 4, max_outbound_bytes=160)
    for config in (fits, whole):
        Pair(config).send(Ticket.issue("test"))
    for config, name in (
        (replace(fits, max_message_bytes=16 * row_bytes - 1), "max_message_bytes"),
        (replace(whole, max_outbound_bytes=159), "max_outbound_bytes"),
    ):
        with pytest.raises(ConfigError, match=name):
            Pair(config)
        pair = Pair(configure(16, 32, 4), sender_config=config)
        with pytest.raises(ConfigError, match=name):
            pair.send(Ticket.issue("test"))
        pair.assert_ledger_zero()


@pytest.mark.usefixtures("wire_only")
def test_a_message_that_can_never_leave_ends_its_stream_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(configure(16, 64, 4))
    stream, consumer, _ = pair.transfer(100)
    endpoint = pair.network.endpoints["virtual://sender"]
    send, refused = endpoint.send, []

    def refuse_blocks(connection, message, frames=()) -> None:  # type: ignore[no-untyped-def]
        if isinstance(message, Block) and message.stream_id == stream.stream_id:
            refused.append(message.index)
            raise MessageTooLarge("a block is beyond the cap")
        send(connection, message, frames)

    monkeypatch.setattr(endpoint, "send", refuse_blocks)
    _, other, data = pair.transfer(100)
    pair.network.settle()
    assert refused == [0]
    with pytest.raises(MessageTooLarge):
        stream.result(0)
    assert isinstance(consumer.ends[0], MessageTooLarge)
    assert_rows_equal(other, data)
    pair.assert_ledger_zero()


def test_a_consumer_that_never_admits_is_bounded() -> None:
    pair = Pair(configure(16, 32, 4, admit_timeout_s=100.0))
    stream, consumer, _ = pair.transfer(1000, admit=False)
    pair.network.advance(101, step=0.5)
    assert isinstance(consumer.ends[0], StreamTimeout)
    with pytest.raises(StreamTimeout, match="reported by the peer"):
        stream.result(0)
    pair.assert_ledger_zero()


@pytest.mark.parametrize("by", ["sender", "receiver", "consumer close"])
@pytest.mark.parametrize("moment", ["at once", "announced"])
def test_an_abort_ends_both_ends(by: str, moment: str) -> None:
    pair = Pair(configure(16, 32, 4))
    if moment == "announced":
        stream, consumer, _ = pair.transfer(1000, admit=False)
    else:
        ticket = Ticket.issue("test")
        consumer, stream = pair.listen(ticket), pair.send(ticket)
    pair.network.settle()
    if by == "sender":
        stream.abort("BadImage", "image 2 is broken")
    elif by == "receiver":
        pair.receiver.abort(stream.stream_id, "BadImage", "image 2 is broken")
    else:
        pair.receiver.close(stream.stream_id)
    pair.network.settle()
    with pytest.raises(StreamAborted) as caught:
        stream.result(0)
    assert caught.value.code == ("Cancelled" if by == "consumer close" else "BadImage")
    if by == "sender":
        assert isinstance(consumer.ends[0], StreamAborted)
        assert consumer.ends[0].args == ("BadImage", "image 2 is broken")
    else:
        assert consumer.ends == []
    pair.assert_ledger_zero()


def test_a_lost_peer_and_a_closed_service_end_their_streams() -> None:
    pair = Pair(configure(16, 32, 4))
    stream, consumer, _ = pair.transfer(1000, admit=False)
    pair.network.settle()
    log = pair.network.log
    (connection,) = {c for e, c, _, _ in log if e.address == "virtual://receiver" and not c.is_sealed_path}
    pair.receiver_service.drop_peer(connection, "its actor died")
    pair.network.settle()
    assert isinstance(consumer.ends[0], PeerLost)
    pair.sender_service.close()
    with pytest.raises(EndpointClosed):
        stream.result(0)
    pair.assert_ledger_zero()


def test_a_failing_consumer_ends_its_own_stream_only() -> None:
    pair = Pair(configure(16, 64, 8))
    broken, consumer, _ = pair.transfer(1000)
    consumer.on_rows = None  # type: ignore[assignment]
    other, good, data = pair.transfer(1000)
    pair.network.run_until(lambda: bool(good.ends))
    assert_rows_equal(good, data)
    other.result(0)
    with pytest.raises(StreamAborted, match="InternalError"):
        broken.result(0)
    assert isinstance(consumer.ends[0], StreamAborted)
    pair.assert_ledger_zero()


def test_misuse_is_a_typed_error() -> None:
    pair = Pair(configure(16, 32, 4, max_streams=2))
    stream, consumer, _ = pair.transfer(10)
    ticket = stream.session.ticket
    with pytest.raises(LocalProtocolError, match="already"):
        pair.listen(ticket)
    with pytest.raises(LocalProtocolError, match="already"):
        pair.send(ticket)
    with pytest.raises(LocalProtocolError):
        stream.announce(10)
    with pytest.raises(LocalProtocolError):
        stream.write(10, make_rows(1))
    with pytest.raises(LocalProtocolError):
        stream.write(10, {"embeddings": make_rows(1)["embeddings"]})
    with pytest.raises(LocalProtocolError, match="contiguous"):
        stream.write(10, {n: r.repeat_interleave(2, 0)[::2] for n, r in make_rows(2).items()})
    pair.listen(Ticket.issue("second"))
    with pytest.raises(Overloaded):
        pair.listen(Ticket.issue("third"))
    pair.network.settle()
    assert consumer.num_rows == 10


def test_a_sender_that_gives_up_before_the_ticket_comes_is_heard() -> None:
    pair = Pair(configure(16, 100, 4))
    ticket = Ticket.issue("early")
    stream = pair.send(ticket)
    pair.network.settle()
    stream.abort("BadImage", "image 0 is broken")
    pair.network.settle()
    consumer = pair.listen(ticket)
    pair.network.settle()
    assert [type(end) for end in consumer.ends] == [StreamAborted]
    assert consumer.ends[0].code == "BadImage"  # type: ignore[attr-defined]
    pair.assert_ledger_zero()
