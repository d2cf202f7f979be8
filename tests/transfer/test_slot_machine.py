"""Any order of what producers, consumers, the network and time may do to streams in one segment: never a wrong row.

A machine drives real services over the virtual network. Every producer may compute in the slots it is granted, keep
them for as long as it likes, scribble over them as long as they are its own, and be cut off meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.profiles import IS_SOAK
from tests.transfer.segment_pair import Rows, SegmentPair, compute, part
from tests.transfer.test_streams import configure
from tests.transfer.virtual import Consumer, Faults, VirtualNetwork, assert_rows_equal, make_rows
from transfer.errors import LocalProtocolError, TransferError
from transfer.memory.segments import is_supported
from transfer.protocol.messages import Message, Released
from transfer.protocol.ticket import Ticket
from transfer.streams.stream_sender import OutgoingStream, StreamSender

pytestmark = pytest.mark.skipif(not is_supported(), reason="this system has no sealed memory files")

MAX_STREAMS = 6
BLOCK = 4


@dataclass(eq=False)
class Producer:
    """One epoch of a stream at its sender, and the rows it reserved."""

    stream: OutgoingStream
    views: Rows | None = None
    is_cut_off: bool = False  # another one has its place, or its stream is over

    def give_up(self) -> None:
        self.views = None
        self.stream.drop_slots()

    def scribble(self, value: int) -> None:
        """Until it gives them up its slots are its own to write."""
        for view in (self.views or {}).values():
            view.fill_(torch.tensor(value, dtype=view.dtype))


@dataclass(eq=False)
class Work:
    """One stream: what its consumer is to get, and who sends it."""

    ticket: Ticket
    consumer: Consumer
    data: Rows
    total: int
    producers: list[Producer] = field(default_factory=list)
    row: int | None = 0  # None: not known yet where to go on
    num_admitted: int = -1  # how often it had started over when it was admitted
    is_announced: bool = False
    is_cancelled: bool = False

    @property
    def producer(self) -> Producer:
        return self.producers[-1]

    @property
    def is_open(self) -> bool:
        return not self.consumer.ends and not self.is_cancelled


class Machine(RuleBasedStateMachine):
    """Streams of two workers into one."""

    @initialize(
        seed=st.integers(0, 1 << 30),
        default=st.sampled_from([1, 8, 32]),
        num_slots=st.sampled_from([2, 4, 7]),
        drop=st.sampled_from([0.0, 0.0, 0.1]),
        repeat=st.sampled_from([0.0, 0.1]),
        loses_releases=st.booleans(),
    )
    def begin(self, seed: int, default: int, num_slots: int, drop: float, repeat: float, loses_releases: bool) -> None:
        faults = Faults(drop=drop, repeat=repeat)
        config = configure(BLOCK, default, num_slots, stream_timeout_s=600.0)
        self.pair = SegmentPair(config, network=VirtualNetwork(seed, faults))
        self.senders: list[StreamSender] = [self.pair.sender, self.pair.another_sender()]
        self.works: list[Work] = []
        self.num_streams = 0
        if loses_releases:
            self.pair.network.rewrite = self.lose_releases

    @staticmethod
    def lose_releases(message: Message, frames: list[bytes]) -> tuple[Message, list[bytes]] | None:
        return None if isinstance(message, Released) and message.epoch % 2 else (message, frames)

    def pick(self, number: int) -> Work:
        return self.works[number % len(self.works)]

    def has_works(self) -> bool:
        return bool(self.works)

    # -- streams --------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.works) < MAX_STREAMS)
    @rule(total=st.sampled_from([0, 3, 8, 17, 40, 40]), sender=st.integers(0, 1), count=st.sampled_from([0, 4, 40]))
    def open(self, total: int, sender: int, count: int) -> None:
        self.num_streams += 1
        ticket = Ticket.issue("test")
        consumer = self.pair.listen(ticket, admit=False, take_over_s=500.0)
        stream = self.pair.send(ticket, sender=self.senders[sender], content_key=ticket.stream_id)
        data = make_rows(total, 1000 * self.num_streams)
        self.works.append(Work(ticket, consumer, data, total, [Producer(stream)]))
        self.pair.network.settle()
        if count:
            self.reserve(self.works[-1], count)

    @precondition(has_works)
    @rule(number=st.integers(0, 99), does_admit=st.booleans())
    def announce_or_admit(self, number: int, does_admit: bool) -> None:
        work = self.pick(number)
        if not work.is_announced and not work.producer.is_cut_off:
            work.is_announced = True
            work.producer.stream.announce(work.total)
        elif does_admit:
            self.admit(work)

    def admit(self, work: Work) -> None:
        consumer = work.consumer
        if work.is_open and consumer.total_rows is not None and work.num_admitted != consumer.restarts:
            work.num_admitted = consumer.restarts
            self.pair.receiver.admit(work.ticket.stream_id, num_restarts=consumer.restarts)

    @precondition(has_works)
    @rule(number=st.integers(0, 99), sender=st.integers(0, 1))
    def take_over(self, number: int, sender: int) -> None:
        work = self.pick(number)
        ticket = self.pair.reissue(work.ticket.stream_id) if work.is_open else None
        if ticket is None:
            return
        work.producer.is_cut_off = True  # and it may go on computing for a while
        stream = self.pair.send(ticket, sender=self.senders[sender], content_key=ticket.stream_id)
        work.ticket, work.row, work.is_announced = ticket, None, False
        work.producers.append(Producer(stream))

    @precondition(has_works)
    @rule(number=st.integers(0, 99), kind=st.sampled_from(["by sender", "by receiver", "lifeline", "neither"]))
    def break_off(self, number: int, kind: str) -> None:
        work = self.pick(number)
        if kind == "lifeline" and self.pair.passing.lifelines:
            self.pair.passing.lose(number)
        elif kind.startswith("by") and work.is_open:
            work.is_cancelled = work.producer.is_cut_off = True
            if kind == "by sender":
                work.producer.stream.abort("Cancelled", "not wanted")
            self.pair.receiver.close(work.ticket.stream_id)

    # -- producers ------------------------------------------------------------------------------------------------

    @precondition(has_works)
    @rule(number=st.integers(0, 99), count=st.sampled_from([1, 4, 9, 40]))
    def produce_in_place(self, number: int, count: int) -> None:
        """First the slots, at another time the rows."""
        work = self.pick(number)
        if work.producer.views is None:
            self.reserve(work, count)
        else:
            self.write_reserved(work)

    @precondition(has_works)
    @rule(numbers=st.lists(st.integers(0, 99), max_size=4), count=st.sampled_from([4, 40]))
    def some_produce(self, numbers: list[int], count: int) -> None:
        for number in numbers:
            self.produce_in_place(number, count)
            self.pair.network.settle()

    @precondition(has_works)
    @rule(number=st.integers(0, 99), count=st.sampled_from([1, 5, 40]))
    def produce_elsewhere(self, number: int, count: int) -> None:
        work = self.pick(number)
        row, producer = self.next_row(work), work.producer
        if row is None or row >= work.total:
            return
        end = min(work.total, row + count)
        rows = part(work.data, row, end)
        if producer.views is None:
            producer.stream.write(row, rows)
            work.row = end
        else:
            with pytest.raises(LocalProtocolError):
                producer.stream.write(row, rows)

    @precondition(has_works)
    @rule(number=st.integers(0, 99), epoch=st.integers(0, 99), does_give_up=st.booleans())
    def scribble(self, number: int, epoch: int, does_give_up: bool) -> None:
        for work in self.works:
            for producer in work.producers:
                producer.scribble(77)
        producers = self.pick(number).producers
        if does_give_up:
            producers[epoch % len(producers)].give_up()

    def next_row(self, work: Work) -> int | None:
        if work.row is None:
            work.row = work.producer.stream.first_row
        return None if work.producer.is_cut_off else work.row

    def reserve(self, work: Work, count: int) -> None:
        row, producer = self.next_row(work), work.producer
        if row is not None and producer.views is None:
            producer.views = producer.stream.slot_rows(row, count)
            producer.scribble(99)

    def write_reserved(self, work: Work) -> None:
        row, producer = self.next_row(work), work.producer
        if row is None or producer.views is None:
            return
        if row + len(producer.views["token_ids"]) > work.total:
            producer.give_up()  # more than it needs: the total was not announced
            return
        work.row = compute(producer.views, work.data, row)
        producer.stream.write(row, producer.views)
        producer.views = None

    # -- the rest of the world ------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.0, 0.1, 1.0, 3.0]))
    def advance(self, seconds: float) -> None:
        self.pair.network.settle()
        self.pair.network.advance(seconds, step=0.25)

    @invariant()
    def every_slot_has_one_holder_and_what_came_is_right(self) -> None:
        if not hasattr(self, "pair"):
            return
        for area in self.pair.areas:
            area.book.check()
        for work in self.works:
            for name, tensors in work.consumer.rows.items():
                got = torch.cat(tensors)
                assert torch.equal(got, work.data[name][: len(got)]), name

    def teardown(self) -> None:
        if not hasattr(self, "pair"):
            return
        try:
            self.finish()
        finally:
            self.pair.host.close()

    def finish(self) -> None:
        """Everything that is open comes to its end."""
        for work in self.works:
            for producer in work.producers:
                producer.give_up()
        for _ in range(600):
            open_ = [work for work in self.works if work.is_open]
            if not open_:
                break
            for work in open_:
                self.admit(work)
                self.finish_producing(work)
            self.pair.network.advance(0.5, step=0.25)
        for work in self.works:
            assert work.is_cancelled or work.consumer.ends, "a stream never ends"
            ends: list[Any] = work.consumer.ends
            assert work.is_cancelled or not isinstance(ends[0], TransferError), ends
            if not work.is_cancelled:
                assert_rows_equal(work.consumer, work.data)
        self.pair.network.advance(15.0, step=0.5)
        self.pair.assert_ledger_zero()

    def finish_producing(self, work: Work) -> None:
        if work.producer.stream._ended.is_set():
            self.take_over(self.works.index(work), 0)
        if not work.is_announced:
            work.is_announced = True
            work.producer.stream.announce(work.total)
        row = self.next_row(work)
        if row is not None and row < work.total:
            work.row = work.total
            work.producer.stream.write(row, part(work.data, row, work.total))


Machine.TestCase.settings = settings(
    max_examples=4000 if IS_SOAK else 150, stateful_step_count=60, deadline=None, derandomize=True
)
TestSlots = Machine.TestCase
