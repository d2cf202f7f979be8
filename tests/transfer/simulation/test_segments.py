"""Shared memory in the simulator: who may write which slot, how segments are passed, and what ends a lifeline."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.transfer.simulation.test_parts import Onlooker, run
from tests.transfer.simulation.test_world import PLAN
from transfer.config import TransferConfig
from transfer.errors import ConfigError, PeerLost, RemoteProtocolError, TicketRejected
from transfer.memory.segment_passing import is_lifeline_over
from transfer.memory.segment_server import SegmentOffer
from transfer.memory.segments import Filling, SegmentLayout
from transfer.protocol.messages import WITHDRAWN, Accept, Attached
from transfer.protocol.negotiate import Offer
from transfer.protocol.ticket import Ticket
from transfer.simulation.attempts import Attempt, Request, Sending, explains_receiver, explains_sender
from transfer.simulation.books import StreamBook
from transfer.simulation.judge import Judge
from transfer.simulation.outages import Outages
from transfer.simulation.passing import VirtualPassing, VirtualServer
from transfer.simulation.receiver_rules import ReceiverRules
from transfer.simulation.segments import SlotWatch, VirtualSegment, WatchedBook
from transfer.simulation.story import Story
from transfer.simulation.timeline import Process, Timeline
from transfer.streams.receive_areas import NO_SEGMENT
from transfer.tensors import PlaneSpec

LAYOUT = SegmentLayout(num_slots=4, block_size=2, planes=(PlaneSpec(name="x", dtype="int8", row_shape=(3,)),))
TICKET = Ticket.issue("test")


class Watched:
    """A segment with its book and its account, and what that complained of."""

    def __init__(self) -> None:
        self.segment = VirtualSegment(LAYOUT, 77)
        self.complaints: list[str] = []
        self.watch = SlotWatch(
            self.segment,
            lambda promise, *_: self.complaints.append(promise),
            lambda *_: None,
            lambda *_: None,
            lambda stream_id: 1,
        )
        self.book = WatchedBook(4, 2, self.watch)

    def write(self, slot: int) -> None:
        start, end = LAYOUT.slot_range(0, slot)
        self.segment.memory[start:end] = b"x" * (end - start)


def test_a_slot_is_watched_from_its_grant_to_its_release() -> None:
    watched = Watched()
    book, watch = watched.book, watched.watch
    one = book.allocate(4, "one").block_ids
    assert one == (0, 1) and watch.writers == {0: ("one", 1), 1: ("one", 1)} and watch.num_free == 2
    watched.write(0)
    book.free_blocks("one", [0])
    assert watch.memory.is_poisoned(0) and 0 not in watch.writers
    book.fence("one", [1], "one/1")
    watched.write(1)
    assert watch.writers == {1: ("one", 1)} and watch.num_fenced == 1 and watch.fenced_writers() == [("one", 1)]
    book.release("one/1")
    assert watch.num_free == 4 and watch.memory.is_poisoned(1) and not watched.complaints


def test_a_slot_that_is_used_too_early_or_written_too_late_is_noticed() -> None:
    watched = Watched()
    watched.book.allocate(2, "one")
    watched.book.free_blocks("one", [0])
    watched.write(0)
    watched.book.allocate(2, "two")
    assert watched.complaints == ["4: a freed block is never written"]
    watched.book.fence("two", [0], "two/1")
    watched.watch.took("three", [0])
    assert watched.complaints[1:] == ["4: a slot is used again only after its sender's word"]
    watched.book.abandon()
    assert watched.watch.num_free == 0
    watched.watch.took("three", [3])
    assert watched.complaints[2:] == ["4: nothing of an abandoned segment is granted"]


class Machine:
    """A receiver's server and a sender's process, on one machine; `stranger` is on another."""

    def __init__(self) -> None:
        self.timeline, self.fired = Timeline(0.0), Counter[str]()
        self.receiver, self.sender, self.stranger = (
            Process(name, 1, self.timeline, Onlooker()) for name in ("receiver", "sender", "stranger")
        )
        self.passing = VirtualPassing(("receiver", "sender"), self.fired)
        self.server: VirtualServer = self.passing.serve(self.receiver)
        self.segment = self.passing.make("receiver", LAYOUT, 77)
        self.num_lost = 0
        self.server.offer(
            SegmentOffer(ticket=TICKET, generation=77, fd=-1, num_bytes=LAYOUT.num_bytes, on_lost=self.lose)
        )
        self.sealed: list[object] = []

    def lose(self) -> None:
        self.num_lost += 1

    def fetch(self, process: Process | None = None, ticket: Ticket = TICKET, generation: int = 77):  # type: ignore[no-untyped-def]
        path, guest = self.server.path, process or self.sender
        return self.passing.fetch(guest, path, ticket, generation, on_seal=lambda *what: self.sealed.append(what))


def test_the_answer_of_an_epoch_that_is_over_says_nothing_about_its_segment() -> None:
    """Its receiver drops it, and goes on asking the next streams whether they can map that segment."""
    timeline = Timeline()
    process = Process("receiver", 1, timeline, Onlooker())
    judge = Judge(TransferConfig(), Story(False), lambda: timeline.now)
    judge.watch(process)
    watch = judge.watch_segment(process, VirtualSegment(LAYOUT, 77))
    book = StreamBook("one", 0, process, 1, None, invited=watch, is_registered=True, accepted_epoch=1)
    rules, answer = ReceiverRules(judge, 2), Attached(stream_id="one", epoch=1, generation=77)
    for over in (replace(book, is_ended=True), replace(book, is_orphaned=True), replace(book, epoch=2)):
        rules.arriving(over, answer)
        assert over.area is None and not watch.is_attached
    rules.arriving(book, answer)
    assert book.area is watch and watch.is_attached


def test_who_is_asked_to_map_a_segment_that_was_lost_unnoticed_may_lose_its_sender() -> None:
    """Its receiver stood still when the lifeline ended: it invites another stream first, and hears of it then."""
    watch, host = Watched().watch, cast(Any, SimpleNamespace(name="host"))
    book = StreamBook("one", 0, cast(Any, None), 1, None, invited=watch)
    sending = Sending(TICKET, host, cast(Any, None))
    attempt, request = Attempt(host, book, cast(Any, None), 0.0, [sending]), Request(PLAN)
    outages, over, lost = Outages(patience_s=10.0), TicketRejected("epoch 1 is over"), PeerLost(*NO_SEGMENT.args)
    assert not explains_sender(request, attempt, sending, outages, over, 1.0)
    assert not explains_receiver(request, attempt, outages, lost, 1.0)
    watch.is_cut = True
    assert not explains_sender(request, attempt, sending, outages, over, 1.0), "its receiver does not know"
    watch.is_abandoned = True
    assert not explains_sender(request, attempt, sending, outages, over, 1.0), "it was granted nothing of it"
    assert not explains_receiver(request, attempt, outages, lost, 1.0)
    book.slot_epochs.add(1)
    assert explains_sender(request, attempt, sending, outages, over, 1.0)
    assert explains_receiver(request, attempt, outages, lost, 1.0)
    assert not explains_sender(request, attempt, sending, outages, PeerLost("gone"), 1.0), "this explains nothing else"
    assert not explains_receiver(request, attempt, outages, PeerLost("gone"), 1.0)


@pytest.mark.parametrize(
    ("is_abandoned", "slot_epochs", "is_right"), [(True, set(), True), (False, set(), False), (True, {1}, False)]
)
def test_only_what_was_given_up_and_not_granted_is_withdrawn(
    is_abandoned: bool, slot_epochs: set[int], is_right: bool
) -> None:
    timeline = Timeline()
    process = Process("receiver", 1, timeline, Onlooker())
    judge = Judge(TransferConfig(), Story(False), lambda: timeline.now)
    pool, watch = judge.watch(process), judge.watch_segment(process, VirtualSegment(LAYOUT, 77))
    watch.is_abandoned = is_abandoned
    book = StreamBook("one", 0, process, 1, None, invited=watch, answered_epoch=1, slot_epochs=slot_epochs)
    book.is_registered, book.accepted_epoch = True, 1
    rules, offer = ReceiverRules(judge, 2), Offer(block_size=2, planes=LAYOUT.planes, max_frame_bytes=1 << 20, credit=4)
    withdrawal = Accept(stream_id="one", epoch=1, proof=b"", offer=offer, first_index=0, segment=WITHDRAWN)
    rules.sent(book, withdrawal)
    assert book.area is None and (judge.breach is None) is is_right
    rules.arriving(book, Attached(stream_id="one", epoch=1, generation=77))
    assert book.area is None, "that crossed it"
    rules.arriving(book, Attached(stream_id="one", epoch=1, generation=0))
    rules.sent(book, withdrawal)
    assert book.area is pool, "said once more it changes nothing"


def test_a_mapping_is_the_same_memory_and_tells_what_it_seals() -> None:
    machine = Machine()
    fetched = machine.fetch()
    mapping = fetched.attach(LAYOUT, 77)
    mapping.memory[100] = 9
    filling = Filling(stream_id=TICKET.stream_id, epoch=1, first_index=5, serial=3, num_rows=2)
    mapping.seal([2], filling)
    assert machine.segment.memory[100] == 9 and machine.segment.is_sealed([2], filling)
    assert machine.sealed == [([2], filling)]
    with pytest.raises(RemoteProtocolError):
        machine.fetch().attach(replace(LAYOUT, num_slots=5), 77)


def test_only_neighbours_with_the_ticket_get_a_segment() -> None:
    machine = Machine()
    for error, arguments in (
        (PeerLost, {"process": machine.stranger}),
        (TicketRejected, {"ticket": TICKET.next_epoch()}),
        (TicketRejected, {"generation": 78}),
    ):
        with pytest.raises(error):
            machine.fetch(**arguments)  # type: ignore[arg-type]
    machine.receiver.stop()
    with pytest.raises(PeerLost):
        machine.fetch()
    assert not machine.fired, "none of that is a fault"
    machine.passing.out_of_order.update(("sender", "receiver"))
    with pytest.raises(PeerLost):
        machine.fetch()
    with pytest.raises(ConfigError):
        machine.passing.make("receiver", LAYOUT, 78)
    assert machine.fired == {"segment_refused": 2}


@pytest.mark.parametrize("who", ["sender hangs up", "sender dies", "receiver hangs up", "receiver dies"])
def test_the_end_of_a_lifeline_is_heard_by_the_other_end(who: str) -> None:
    machine = Machine()
    lifeline = machine.fetch().lifeline
    assert not is_lifeline_over(lifeline) and machine.passing.num_lifelines(machine.sender) == 1
    if who == "sender hangs up":
        lifeline.close()
    elif who == "receiver hangs up":
        machine.server.hang_up(77)
    else:
        process = machine.sender if who == "sender dies" else machine.receiver
        process.kill()
        machine.passing.died(process)
    run(machine.timeline)
    assert is_lifeline_over(lifeline) and not machine.passing.live()
    assert machine.num_lost == who.startswith("sender"), "who hangs up knows it"
