"""Rows computed in the granted slots: no copy, and never in a slot that is somebody else's by then."""

from __future__ import annotations

import random

import pytest
import torch

from tests.transfer.segment_pair import SegmentPair, compute, part
from tests.transfer.test_streams import configure
from tests.transfer.virtual import Faults, VirtualNetwork, assert_rows_equal, make_rows
from transfer.errors import LocalProtocolError, StreamAborted
from transfer.memory.buffers import PlaneBuffers
from transfer.memory.segments import is_supported
from transfer.protocol.messages import Revoke, Revoked
from transfer.protocol.ticket import Ticket

pytestmark = pytest.mark.skipif(not is_supported(), reason="this system has no sealed memory files")


def test_rows_computed_in_their_slots_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[int] = []
    place = PlaneBuffers.place

    def noted(self: PlaneBuffers, block_id: int, frames: list[memoryview]) -> None:
        placed.append(block_id)
        place(self, block_id, frames)

    monkeypatch.setattr(PlaneBuffers, "place", noted)
    pair = SegmentPair(configure(16, 64, 4))
    stream, consumer = pair.begin(200)
    data, row = make_rows(200), 0
    while row < 200:
        views = stream.slot_rows(row, 1000)
        assert views is not None and len(views["token_ids"]) <= min(64, 200 - row)
        end = compute(views, data, row)
        stream.write(row, views)
        pair.network.settle()
        row = end
    assert_rows_equal(consumer, data)
    assert len(placed) == 1, "only the last block, which is not whole, is written where it is"
    stream.result(0)
    pair.assert_ledger_zero()


def test_slots_are_for_the_next_rows_and_within_what_is_granted_and_announced() -> None:
    pair = SegmentPair(configure(16, 64, 4))
    stream, _ = pair.begin(admit=False)
    with pytest.raises(LocalProtocolError, match="the next one is 0"):
        stream.slot_rows(16, 16)
    views = stream.slot_rows(0, 1000)
    assert views is not None and len(views["token_ids"]) == 64
    assert stream.slot_rows(0, 16) is None, "something is reserved"
    stream.drop_slots()
    stream.announce(20)
    views = stream.slot_rows(0, 1000)
    assert views is not None and len(views["token_ids"]) == 20
    stream.write(0, views)
    with pytest.raises(LocalProtocolError, match="the next one is 20"):
        stream.slot_rows(0, 16)
    assert stream.slot_rows(20, 16) is None, "nothing is left"
    partly, _ = pair.begin(40, admit=False)
    partly.write(0, make_rows(10))
    assert partly.slot_rows(10, 6) is None, "within a block there are rows of elsewhere already"


@pytest.mark.parametrize("total", [0, 16, 17])
def test_surplus_slots_are_nobodys_while_their_producer_may_write_them(total: int) -> None:
    pair = SegmentPair(configure(16, 128, 8))
    first, _ = pair.begin(admit=False)
    views = first.slot_rows(0, 128)
    assert views is not None and len(views["token_ids"]) == 128
    first.announce(total)
    pair.network.settle()
    second, consumer, data = pair.whole(48, admit=False)
    for view in views.values():
        view.fill_(7)
    first.drop_slots()
    pair.network.settle()
    pair.receiver.admit(second.stream_id)
    pair.network.run_until(lambda: bool(consumer.ends), limit_s=1.0)
    assert_rows_equal(consumer, data)
    pair.receiver.close(first.stream_id)
    pair.network.settle()
    pair.assert_ledger_zero()


def test_surplus_slots_come_back_as_soon_as_the_sender_has_heard() -> None:
    pair = SegmentPair(configure(16, 128, 8))
    stream, _ = pair.begin(admit=False)
    stream.slot_rows(0, 16)  # does not reach into what comes back
    pair.lose(Revoked)
    stream.announce(16)
    pair.network.settle()
    assert pair.num_in_use == 8 and pair.network.fired["rewritten away"] == 1
    pair.lose()
    pair.network.advance(1.5)
    assert pair.num_in_use == 1, "a probe brought the question again"


@pytest.mark.parametrize("fault", ["a part", "a later part", "other rows", "one plane elsewhere", "another start"])
def test_what_is_not_exactly_what_was_reserved_is_refused_and_harms_nothing(fault: str) -> None:
    pair = SegmentPair(configure(16, 64, 4))
    stream, consumer = pair.begin(64)
    data = make_rows(64)
    views = stream.slot_rows(0, 64)
    assert views is not None
    compute(views, data, 0)
    wrong, first_row = {
        "a part": ({n: v[:63] for n, v in views.items()}, 0),
        "a later part": ({n: v[16:] for n, v in views.items()}, 0),
        "other rows": (part(data, 0, 64), 0),
        "one plane elsewhere": ({**views, "token_ids": data["token_ids"]}, 0),
        "another start": (views, 16),
    }[fault]
    with pytest.raises(LocalProtocolError):
        stream.write(first_row, wrong)
    stream.write(0, views)
    pair.network.settle()
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


def test_slots_that_were_given_away_cannot_be_written_again() -> None:
    pair = SegmentPair(configure(16, 64, 4))
    stream, _ = pair.begin(200)
    views = stream.slot_rows(0, 64)
    assert views is not None
    stream.write(0, views)
    for again in (views, {name: view[8:24] for name, view in views.items()}):
        with pytest.raises(LocalProtocolError, match="not reserved"):
            stream.write(64, again)
    stream.write(64, {name: view.clone() for name, view in views.items()})


def test_rows_dropped_may_be_written_from_elsewhere() -> None:
    pair = SegmentPair(configure(16, 64, 4))
    stream, consumer = pair.begin(64)
    data = make_rows(64)
    views = stream.slot_rows(0, 64)
    assert views is not None
    compute(views, make_rows(64, 5), 0)
    stream.drop_slots()
    stream.drop_slots()
    stream.write(0, part(data, 0, 40))
    stream.write(40, part(data, 40, 64))
    pair.network.settle()
    assert_rows_equal(consumer, data)


@pytest.mark.parametrize("ending", ["drop", "write"])
@pytest.mark.parametrize("by", ["sender", "receiver"])
def test_a_stream_that_ends_while_its_producer_writes_keeps_its_slots_from_others(ending: str, by: str) -> None:
    pair = SegmentPair(configure(16, 64, 8))
    other, _ = pair.begin(16)
    stream, _ = pair.begin(64)
    views = stream.slot_rows(0, 64)
    assert views is not None
    if by == "sender":
        stream.abort("Cancelled", "not wanted")
    else:
        pair.receiver.close(stream.stream_id)
    pair.network.settle()
    with pytest.raises(StreamAborted):
        stream.result(0)
    assert pair.num_fenced == 4
    _, consumer, data = pair.whole(300)
    for view in views.values():
        view.fill_(7)
    pair.network.run_until(lambda: bool(consumer.ends), limit_s=5.0)
    assert_rows_equal(consumer, data)
    if ending == "drop":
        stream.drop_slots()
    else:
        stream.write(0, views)
    pair.network.settle()
    assert pair.num_fenced == 0, "its producer is done: now they are anybody's"
    assert stream.slots is None and stream.slot_rows(64 if ending == "write" else 0, 16) is None
    stream.drop_slots()
    other.write(0, make_rows(16))
    pair.network.settle()
    pair.assert_ledger_zero()


def test_blocks_revoked_while_their_producer_computes_are_given_back_when_it_is_done() -> None:
    pair = SegmentPair(configure(16, 64, 4))
    stream, consumer = pair.begin(64, admit=False)
    data = make_rows(64)
    views = stream.slot_rows(0, 64)
    assert views is not None
    others = [pair.begin(16, admit=False) for _ in range(2)]
    assert pair.receiver.stats()["transfer_revocations_total"] >= 1
    assert not any(isinstance(message, Revoked) for _, _, message, _ in pair.network.log)
    assert pair.num_in_use == 4, "the others wait"
    compute(views, data, 0)
    stream.write(0, views)
    pair.network.settle()
    assert any(isinstance(message, Revoked) for _, _, message, _ in pair.network.log)
    rows = [make_rows(16, 100 + number) for number in range(2)]
    for (other, _), written in zip(others, rows, strict=True):
        other.write(0, written)
    pair.network.settle()
    for (other, other_consumer), written in zip(others, rows, strict=True):
        pair.receiver.admit(other.stream_id)
        pair.network.settle()
        assert_rows_equal(other_consumer, written)
    pair.receiver.admit(stream.stream_id)
    pair.network.run_until(lambda: bool(consumer.ends), limit_s=5.0)
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


def test_a_revocation_between_the_write_and_its_taking_in_loses_no_row() -> None:
    """The producer wrote, the I/O thread has not taken that in, and reads the Revoke first."""
    pair = SegmentPair(configure(16, 64, 4))
    stream, consumer = pair.begin(64, admit=False)
    data = make_rows(64)
    views = stream.slot_rows(0, 64)
    assert views is not None
    compute(views, data, 0)
    stream.write(0, views)
    endpoint = pair.network.endpoints["virtual://sender"]
    late, endpoint.posted = endpoint.posted, []
    rows = make_rows(16, 100)
    second, second_consumer = pair.begin(16, admit=False)
    second.write(0, rows)
    pair.network.settle()
    assert any(isinstance(message, Revoke) for _, _, message, _ in pair.network.log)
    assert not any(isinstance(message, Revoked) for _, _, message, _ in pair.network.log)
    endpoint.posted += late
    pair.network.settle()
    pair.receiver.admit(second.stream_id)
    pair.network.settle()
    assert_rows_equal(second_consumer, rows)
    pair.receiver.admit(stream.stream_id)
    pair.network.run_until(lambda: bool(consumer.ends), limit_s=5.0)
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


@pytest.mark.parametrize("seed", range(20))
def test_a_take_over_goes_on_in_slots(seed: int) -> None:
    dice = random.Random(seed)
    faults = Faults(drop=dice.choice((0.0, 0.1)), repeat=dice.choice((0.0, 0.1)))
    pair = SegmentPair(configure(4, 16, 4), network=VirtualNetwork(seed, faults))
    data, ticket = make_rows(90), Ticket.issue("test")
    consumer = pair.listen(ticket, take_over_s=600.0)
    senders = [pair.sender, pair.another_sender()]
    num_in_place = 0
    for number in range(5):
        stream = pair.send(ticket, sender=senders[number % 2], content_key="k")
        stream.announce(90)
        pair.network.run_until(lambda stream=stream: stream.first_row is not None)  # type: ignore[misc]
        row = stream.first_row or 0
        views = None
        for _ in range(dice.randint(3, 9) if number < 4 else 1000):
            if row < 90 and dice.random() < 0.7 and (views := stream.slot_rows(row, dice.randint(1, 20))) is not None:
                row_before, row = row, compute(views, data, row)
                if number < 4 and dice.random() < 0.2:
                    break  # it is replaced while it computes
                stream.write(row_before, views)
                num_in_place, views = num_in_place + 1, None
            elif row < 90:
                end = min(90, row + dice.randint(1, 9))
                stream.write(row, part(data, row, end))
                row = end
            pair.network.advance(dice.choice((0.05, 0.5)))
        if consumer.ends:
            break
        following = pair.reissue(ticket.stream_id)
        if views is not None:
            for view in views.values():
                view.fill_(torch.tensor(7, dtype=view.dtype))
            stream.drop_slots()
        if following is None:
            break
        ticket = following
    pair.network.run_until(lambda: bool(consumer.ends))
    assert_rows_equal(consumer, data)
    assert num_in_place, "this seed computed nothing in place"
    pair.network.advance(5.0)
    pair.assert_ledger_zero()
