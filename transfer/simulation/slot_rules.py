"""SlotRules: what may happen in shared memory, judged as it happens: computing, sealing, and taking for filled.

Who may write a slot, and what was sealed in it, is known from the account of its segment; which rows belong there, from
the books. What is said about slots in messages is the onlooker's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from transfer.memory.segments import Filling
from transfer.protocol.messages import Filled
from transfer.simulation.books import SenderBook, StreamBook
from transfer.simulation.judge import Judge
from transfer.simulation.segments import SlotWatch
from transfer.simulation.timeline import Process

SLOT_COUNTS = ("streams_through_slots", "blocks_through_slots", "blocks_computed_in_slots")
OWN = "4: a slot is its writer's alone"


class SlotRules:
    """Tells `judge` of every broken promise; counts in `counts` what went through shared memory."""

    def __init__(self, judge: Judge, block_size: int) -> None:
        self.counts: Counter[str] = Counter()
        self._judge = judge
        self._size = block_size

    def computing(self, book: StreamBook, epoch: int, indexes: range) -> None:
        """A producer writes rows where they are to be, in the slots that it reserved; whole blocks need no credit."""
        sender = book.senders[epoch]
        self.counts["blocks_computed_in_slots"] += len(indexes)
        sender.placed.update(indexes)
        if sender.has_released:
            text = f"its producer writes block {indexes.start}, and its sender said that nobody does"
            self._judge.complain("4: released means let go", book.number, text)

    def sealed(self, process: Process, watch: SlotWatch, slots: Sequence[int], filling: Filling) -> None:
        """A sender gave slots away."""
        book = self._judge.streams.get(filling.stream_id)
        sender = None if book is None else book.senders.get(filling.epoch)
        if book is None or sender is None:
            return  # of a stream that began anew under another ticket
        self.counts["streams_through_slots"] += not sender.sealed  # and epochs
        self.counts["blocks_through_slots"] += len(slots)
        if sender.process is not process:
            self._judge.complain(OWN, book.number, f"{process} seals for epoch {filling.epoch}, which is not its own")
        if filling.serial < sender.last_serial:
            self._judge.complain("4: a serial is used once", book.number, f"{filling} after {sender.last_serial}")
        sender.last_serial = filling.serial
        for offset, slot in enumerate(slots):
            index = filling.first_index + offset
            num_rows = min(self._size, filling.num_rows - offset * self._size)
            self._check_sealed(book, sender, watch, filling, index, slot, num_rows)
            watch.sealed[slot] = index, filling.serial
            sender.sealed[index] = slot, filling.serial

    def _check_sealed(
        self,
        book: StreamBook,
        sender: SenderBook,
        watch: SlotWatch,
        filling: Filling,
        index: int,
        slot: int,
        num_rows: int,
    ) -> None:
        writer = watch.writers.get(slot)
        if writer != (filling.stream_id, filling.epoch) and not watch.is_closed:
            self._judge.complain(
                OWN, book.number, f"epoch {filling.epoch} filled slot {slot} for block {index}; it is {writer}'s"
            )
        if slot in watch.sealed:
            self._judge.complain(
                "4: a sealed slot is given away", book.number, f"slot {slot}, which holds {watch.sealed[slot]}, again"
            )
        if watch.memory.content(slot, num_rows) != sender.content.frames(index * self._size, num_rows):
            self._judge.complain(
                "3: a block holds the producer's rows", book.number, f"block {index} in slot {slot} has other bytes"
            )

    def filled(self, watch: SlotWatch, message: Filled, first: int, count: int, num_rows: int) -> None:
        """A receiver takes slots for filled."""
        book = self._judge.streams[message.stream_id]
        sender = book.senders.get(message.epoch)
        if message.epoch != book.epoch or sender is None:
            text = f"{message} was taken; the epoch is {book.epoch}"
            return self._judge.complain("4: an old epoch is fenced", book.number, text)
        for offset in range(first, first + count):
            index, slot = message.first_index + offset, message.block_ids[offset]
            rows = min(self._size, num_rows - (offset - first) * self._size)
            if watch.owners.get(slot) != book.stream_id:
                text = f"slot {slot} was taken for block {index}; it is {watch.owners.get(slot)}'s"
                self._judge.complain("4: a block is its owner's alone", book.number, text)
            if watch.memory.content(slot, rows) != sender.content.frames(index * self._size, rows):
                self._judge.complain(
                    "4: damaged or foreign bytes are dropped",
                    book.number,
                    f"slot {slot} was taken for block {index}, with other bytes",
                )
            self._judge.store(book, index, slot)
