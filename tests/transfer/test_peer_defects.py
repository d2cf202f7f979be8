"""The ten defects of the block negotiation that this protocol grew from, and that each of them cannot happen here.

That design: both ends get a request; the language side allocates a guess, sends its block list; the encoder fills it;
too small, the language side reads the true length out of the first block's rows, allocates the remainder while it holds
what it has, and sends the new list; the encoder goes on at rows sent ÷ block size.
"""

from __future__ import annotations

import pytest
import torch

from tests.transfer.test_streams import configure
from tests.transfer.virtual import PLANES, Consumer, Pair, assert_rows_equal, make_rows
from transfer.errors import DoubleFree, ForeignOwner, IncompatibleBlocks, StreamAborted, StreamTimeout
from transfer.protocol.messages import Announce, Block, Filled, Grant, Message, Open, Resume
from transfer.protocol.negotiate import PROTOCOL_VERSION
from transfer.protocol.ticket import Ticket
from transfer.streams.stream_receiver import StreamReceiver
from transfer.tensors import PlaneSpec

pytestmark = pytest.mark.usefixtures("payload")


def finish(pair: Pair, *consumers: Consumer) -> None:
    pair.network.run_until(lambda: all(consumer.ends for consumer in consumers), limit_s=30.0)
    pair.network.run_until(lambda: not pair.sender.stats()["transfer_streams_sending"], limit_s=30.0)


@pytest.mark.parametrize("pool_blocks", [2, 3, 5])
def test_1_holding_blocks_while_waiting_for_the_remainder_deadlocks_nobody(pool_blocks: int) -> None:
    pair = Pair(configure(16, 8192, pool_blocks))
    streams = [
        pair.transfer(16 * pool_blocks * factor + 3) for factor in (1, 4, 10)
    ]  # remainders beyond the whole pool
    finish(pair, *(consumer for _, consumer, _ in streams))
    for _, consumer, data in streams:
        assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


def test_2_a_remainder_comes_in_as_many_rounds_as_it_takes() -> None:
    pair = Pair(configure(16, 16, 2))
    stream, consumer, data = pair.transfer(1000)
    finish(pair, consumer)
    assert stream.result(0).grant_rounds > 10
    assert_rows_equal(consumer, data)


def test_3_a_transfer_that_stands_still_is_bounded_in_time() -> None:
    pair = Pair(configure(16, 32, 4))
    stream, consumer, _ = pair.transfer(1000)
    pair.network.rewrite = lambda m, f: None if isinstance(m, (Block, Filled, Resume)) else (m, f)
    pair.network.advance(125, step=0.5)
    assert pair.network.fired["rewritten away"] > 0
    assert isinstance(consumer.ends[0], StreamTimeout)
    with pytest.raises(StreamTimeout):
        stream.result(0)
    pair.assert_ledger_zero()


def test_4_waiting_for_the_other_side_to_come_up_ends() -> None:
    pair = Pair(configure(16, 32, 4, stream_timeout_s=20.0, idle_timeout_s=20.0))
    alone, unheard = pair.listen(Ticket.issue("receiver only")), pair.send(Ticket.issue("sender only"))
    pair.network.advance(21, step=0.5)
    assert isinstance(alone.ends[0], StreamTimeout)
    with pytest.raises(StreamTimeout):
        unheard.result(0)
    pair.network.advance(6, step=0.5)
    pair.assert_ledger_zero()


def test_5_an_error_in_one_transfer_stops_no_other() -> None:
    pair = Pair(configure(16, 32, 6))
    wrong_planes = (PLANES[0], PlaneSpec(name="token_ids", dtype="int64", row_shape=()))
    ticket = Ticket.issue("wrong")
    failed, refused = pair.listen(ticket), pair.send(ticket, wrong_planes)
    broken_stream, broken, _ = pair.transfer(100)
    broken.on_rows = None  # type: ignore[assignment]
    _, consumer, data = pair.transfer(500)
    finish(pair, consumer, failed, broken)
    assert isinstance(failed.ends[0], IncompatibleBlocks) and isinstance(broken.ends[0], StreamAborted)
    for stream, kind in ((refused, IncompatibleBlocks), (broken_stream, StreamAborted)):
        with pytest.raises(kind):
            stream.result(0)
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


def test_6_a_failed_transfer_leaves_no_mark_on_its_peer() -> None:
    pair = Pair(configure(16, 32, 4))
    for number in range(20):
        stream, consumer, data = pair.transfer(100 + number, admit=number % 2 == 0)
        if number % 2:
            pair.network.settle()
            stream.abort("BadImage", "image 0 is broken")
            pair.network.settle()
            assert isinstance(consumer.ends[0], StreamAborted)
        else:
            finish(pair, consumer)
            assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


def test_7_nothing_is_left_of_streams_that_ended_and_no_block_is_freed_twice() -> None:
    pair = Pair(configure(16, 32, 4))
    for number in range(60):
        stream, consumer, _ = pair.transfer(100, admit=number % 3 != 0)
        pair.network.settle()
        if not consumer.ends:
            pair.receiver.close(stream.stream_id)
            pair.network.settle()
    streams = pair.receiver._streams
    assert not streams.by_id and not streams._schedule._times and not streams.strays._parked
    assert not pair.receiver._areas.wire._planner._demands and not pair.receiver._tickets
    pair.assert_ledger_zero()
    pool = pair.receiver._areas.wire.pool
    allocation = pool.allocate(16, "one")
    pool.free(allocation)
    with pytest.raises(DoubleFree):
        pool.free(allocation)
    again = pool.allocate(16, "two")
    with pytest.raises((DoubleFree, ForeignOwner)):
        pool.free(allocation)
    pool.free(again)


def test_8_every_message_names_its_kind_version_stream_and_epoch_and_late_ones_match_nothing() -> None:
    pair = Pair(configure(16, 32, 4))
    ticket = Ticket.issue("test")
    consumer = pair.listen(ticket, take_over_s=60.0)
    first = pair.send(ticket, content_key="k")
    first.announce(100)
    first.write(0, {n: r[:64].clone() for n, r in make_rows(100).items()})
    pair.network.settle()
    late = [entry for entry in pair.network.log if entry[0].address == "virtual://receiver"]
    assert {m.epoch for _, _, m, _ in late} == {1}  # type: ignore[union-attr]
    opened = next(m for _, _, m, _ in late if isinstance(m, Open))
    assert opened.offer.versions == (PROTOCOL_VERSION, PROTOCOL_VERSION)
    second_ticket = pair.reissue(ticket.stream_id)
    assert second_ticket is not None
    second = pair.send(second_ticket, content_key="k")  # even from the same worker, over the same connection
    pair.network.settle()
    before = pair.receiver.stats()["transfer_blocks_received_total"]
    for target, source, message, frames in late:
        target.deliver(source, message, frames)
    assert pair.receiver.stats()["transfer_blocks_received_total"] == before
    assert pair.receiver.stats()["transfer_dropped_stale_epoch"] >= len(late) - 1
    second.announce(100)
    second.write(64, {n: r[64:].clone() for n, r in make_rows(100).items()})
    finish(pair, consumer)
    assert_rows_equal(consumer, make_rows(100))
    pair.assert_ledger_zero()


@pytest.mark.parametrize("num_rows", [0, 1, 16, 32, 33])
def test_9_the_number_of_rows_says_nothing_but_the_number_of_rows(num_rows: int) -> None:
    """Equal to the first grant, to a block, or none at all: announced in a field of its own, with its items."""
    pair = Pair(configure(16, 32, 4))
    _, consumer, data = pair.transfer(num_rows)
    finish(pair, consumer)
    assert consumer.total_rows == num_rows and consumer.items == ({"rows": num_rows},)
    assert_rows_equal(consumer, data)


def test_10_what_was_handed_over_aliases_no_freed_block_and_metadata_survives_every_round() -> None:
    pair = Pair(configure(16, 16, 1))
    items = [{"grid": [1, 4, 12], "rows": 100}, {"grid": [1, 2, 2], "rows": 100}]
    ticket, data = Ticket.issue("test"), make_rows(200)
    consumer, stream = pair.listen(ticket), pair.send(ticket)
    views: list[torch.Tensor] = []
    keep = consumer.on_rows

    def on_rows(first_row: int, planes) -> None:  # type: ignore[no-untyped-def]
        views.append(planes["token_ids"])
        keep(first_row, planes)

    consumer.on_rows = on_rows  # type: ignore[method-assign]
    lost: list[Message] = []

    def rewrite(message: Message, frames: list[bytes]) -> tuple[Message, list[bytes]] | None:
        if isinstance(message, Grant) and message.round and len(lost) < 3:
            lost.append(message)  # the "resume message that no one queues again"
            return None
        return message, frames

    pair.network.rewrite = rewrite
    stream.announce(200, items)
    stream.write(0, data)
    finish(pair, consumer)
    assert len(lost) == 3 and len(views) == 13
    assert_rows_equal(consumer, data)  # rows were in a block while it was handed over, and are right to the last
    assert list(consumer.items) == items, "metadata travels in messages, never inside rows"
    announced = [m for _, _, m, _ in pair.network.log if isinstance(m, Announce)]
    assert all(m.items == tuple(items) for m in announced)
    pair.assert_ledger_zero()


def test_layer_groups_of_a_kv_cache_travel_as_streams_of_one_receiver_as_they_become_ready() -> None:
    pair = Pair(configure(16, 32, 4))
    planes = tuple(
        PlaneSpec(name=f"{kind}.{layer}", dtype=dtype, row_shape=(2, 8))
        for layer, dtype in enumerate(("bfloat16", "int8"))
        for kind in ("k", "v")
    )
    receiver = StreamReceiver(pair._service("virtual://decode", pair.config), pair.config, planes)
    receiver._service.start()
    groups = []
    for group in range(3):
        ticket = Ticket.issue(f"group {group}")
        consumer = Consumer(receiver, ticket.stream_id)
        receiver.open(ticket, consumer)
        stream = pair.sender.open(ticket, "virtual://decode", None, planes)
        stream.announce(100, [{"group": group}])
        rows = {p.name: torch.randint(-9, 9, (100, 2, 8)).to(getattr(torch, p.dtype)) for p in planes}
        groups.append((stream, consumer, rows))
    for stream, consumer, rows in reversed(groups):  # ready in any order
        stream.write(0, rows)
        pair.network.run_until(lambda c=consumer: bool(c.ends))  # type: ignore[misc]
        assert all(torch.equal(consumer.tensor(name), rows[name]) for name in rows)
    assert receiver.stats()["transfer_blocks_in_use"] == 0
