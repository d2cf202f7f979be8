"""Bugs of shared memory, at either end. See `tests.transfer.simulation.planted`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from transfer.memory.buffers import RowQueue
from transfer.memory.receive_area import ReceiveArea
from transfer.memory.segment_area import SegmentArea
from transfer.memory.segment_book import SegmentBook
from transfer.memory.segment_host import SegmentHost
from transfer.memory.segments import Segment
from transfer.memory.slot_writer import SlotWriter
from transfer.protocol.actions import SendFilled
from transfer.protocol.messages import Filled, Revoke
from transfer.protocol.receiver_life import ReceiverLife
from transfer.protocol.receiver_window import ReceiverWindow
from transfer.streams.incoming_streams import IncomingStream
from transfer.streams.receive_areas import ReceiveAreas

Planted = Callable[[], AbstractContextManager[Any]]


def use_a_slot_before_its_release() -> AbstractContextManager[Any]:
    """What a stream gave back is free, though its sender may still write it."""

    def wrong(self: SegmentBook, owner: str, block_ids: Sequence[int], writer: str) -> None:
        self._take(owner, block_ids)
        self._put_back(block_ids)

    return patch.object(SegmentBook, "fence", wrong)


def count_a_release_twice() -> AbstractContextManager[Any]:
    """Slots come free as often as their sender says that it let go of them."""

    def wrong(self: SegmentBook, writer: str) -> int:
        slots = self._fenced.get(writer, ())
        self._put_back(slots)
        return len(slots)

    return patch.object(SegmentBook, "release", wrong)


def take_any_seal() -> AbstractContextManager[Any]:
    """What is said to be filled counts as filled."""
    return patch.object(Segment, "is_sealed", lambda self, slots, filling: True)


def use_withdrawn_slots_at_once() -> AbstractContextManager[Any]:
    """Slots that are asked back are free before their sender said that it will not fill them."""
    right = ReceiverWindow.revoke

    def wrong(self: ReceiverWindow, revoke: Revoke, *, withhold: bool) -> tuple[int, ...]:
        return right(self, revoke, withhold=False)

    return patch.object(ReceiverWindow, "revoke", wrong)


def let_go_while_the_producer_writes() -> AbstractContextManager[Any]:
    """A sender says that nobody writes its slots, whatever its producer has in hand."""
    right = SlotWriter.end

    def wrong(self: SlotWriter) -> bool:
        right(self)
        return True

    return patch.object(SlotWriter, "end", wrong)


def give_back_while_the_producer_writes() -> AbstractContextManager[Any]:
    """A sender gives withdrawn slots back, whatever its producer has in hand."""
    return patch.object(SlotWriter, "_reserved_end", lambda self: 0)


def leave_rows_in_withdrawn_slots() -> AbstractContextManager[Any]:
    """Rows that were computed in slots that are given back are not copied out."""
    return patch.object(RowQueue, "own", lambda self, first_row: None)


def fill_a_sealed_slot_again() -> AbstractContextManager[Any]:
    """What was lost on the way is written and sealed anew, and not only told again."""
    right = SlotWriter.fill

    def wrong(self: SlotWriter, action: SendFilled, rows: RowQueue) -> list[Filled]:
        self._filled.clear()
        return right(self, action, rows)

    return patch.object(SlotWriter, "fill", wrong)


def ignore_the_end_of_a_lifeline() -> AbstractContextManager[Any]:
    """A receiver goes on with a segment that its peer has let go of."""
    return patch.object(SegmentHost, "_abandon", lambda self, generation: None)


def fence_what_was_handed_on() -> AbstractContextManager[Any]:
    """After a restart slots wait for the word of a sender that sealed them and says nothing more."""
    right = ReceiveArea.retain

    def wrong(self: ReceiveArea, stream_id: str, held: Sequence[int], *, fenced: bool) -> None:
        right(self, stream_id, held, fenced=True)

    return patch.object(ReceiveArea, "retain", wrong)


def forget_where_blocks_are_to_be() -> AbstractContextManager[Any]:
    """After a restart a stream that was just accepted is granted blocks of the pool, and not of its segment."""
    return patch.object(ReceiveAreas, "restarted", lambda self: None)


def wait_for_word_of_the_pools_blocks() -> AbstractContextManager[Any]:
    """Blocks that only the receiver writes come back when their sender heard of it, as slots do."""
    right = ReceiverLife.place_in

    def wrong(self: ReceiverLife, *, shared_memory: bool) -> None:
        right(self, shared_memory=True)

    return patch.object(ReceiverLife, "place_in", wrong)


def lose_whom_nothing_was_granted() -> AbstractContextManager[Any]:
    """When a segment is given up, streams that were only invited to it have lost their sender, too."""
    return patch.object(ReceiverLife, "can_withdraw_segment", False)


def invite_to_what_is_given_up() -> AbstractContextManager[Any]:
    """Who was invited to a segment that is given up is not told so."""
    return patch.object(ReceiveAreas, "_withdraw", lambda self, stream, area: None)


def grant_before_the_withdrawal_was_heard() -> AbstractContextManager[Any]:
    """Blocks of the pool are granted to a sender that still takes them for slots."""
    right = ReceiveAreas._withdraw

    def wrong(self: ReceiveAreas, stream: IncomingStream, area: SegmentArea) -> None:
        right(self, stream, area)
        self._use(stream, self.wire)

    return patch.object(ReceiveAreas, "_withdraw", wrong)


BUGS: tuple[Planted, ...] = (
    use_a_slot_before_its_release,
    count_a_release_twice,
    take_any_seal,
    use_withdrawn_slots_at_once,
    let_go_while_the_producer_writes,
    give_back_while_the_producer_writes,
    leave_rows_in_withdrawn_slots,
    fill_a_sealed_slot_again,
    ignore_the_end_of_a_lifeline,
    fence_what_was_handed_on,
    forget_where_blocks_are_to_be,
    wait_for_word_of_the_pools_blocks,
    lose_whom_nothing_was_granted,
    invite_to_what_is_given_up,
    grant_before_the_withdrawal_was_heard,
)
