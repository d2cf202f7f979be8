"""Producers: write the rows of a stream in pieces, with pauses, or compute them in the slots of its receiver."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from transfer.memory.buffers import Tensor
from transfer.simulation.books import StreamBook
from transfer.simulation.content import Content
from transfer.simulation.scenario import RequestPlan
from transfer.simulation.slot_rules import SlotRules
from transfer.simulation.timeline import Process
from transfer.streams.stream_sender import OutgoingStream

MAX_TRIES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one producer is to do: `content` of an epoch of a stream, at `process`. in_place: in slots, where it can."""

    process: Process
    book: StreamBook
    epoch: int
    content: Content
    plan: RequestPlan
    block_size: int
    in_place: bool


class Producer:
    """Writes into an outgoing stream, and stands still when told to: between two pieces, never with slots in hand."""

    def __init__(self, stream: OutgoingStream, work: Work, rules: SlotRules, dice: random.Random) -> None:
        self._stream = stream
        self._work = work
        self._content = work.content
        self._rules = rules
        self._dice = dice
        self._row = 0
        self._waits = dice.random() < 0.5  # for where to go on
        self._is_announced = False
        self._is_over = False
        self._num_holds = 0
        self._is_due = False  # it would have gone on, had it not been told to stand still
        self._num_tries = 0  # to get slots, in a row
        self._slots: Mapping[str, Tensor] | None = None  # where it computes the rows from `_row` on
        stream.on_done(self._stop)
        self._pause()

    @property
    def is_busy(self) -> bool:
        """Whether rows are still to be written."""
        return not self._is_over and (self._row < self._content.num_rows or not self._is_announced)

    def hold(self) -> None:
        """Stand still until `release`."""
        self._num_holds += 1

    def release(self) -> None:
        """Go on, once every `hold` is over."""
        self._num_holds -= 1
        if not self._num_holds and self._is_due:
            self._is_due = False
            self._pause()

    def _stop(self, stream: OutgoingStream) -> None:
        self._is_over = True

    def _pause(self) -> None:
        self._work.process.after(self._work.plan.gap_s * self._dice.uniform(0, 2), self._go_on)

    def _go_on(self) -> None:
        if self._slots is not None:  # also where the stream is over: it learns of that when it hands them over
            self._compute(self._slots)
        if self._is_over:
            return
        if self._num_holds:
            self._is_due = True
            return
        if self._waits and self._stream.first_row is None:
            return self._work.process.after(0.05, self._go_on)
        if self._waits:  # rows that are stored already need not be computed
            self._waits = False
            self._row = self._dice.randint(0, min(self._stream.first_row or 0, self._content.num_rows))
        plan = self._work.plan
        if not self._is_announced and self._row >= min(plan.announce_at, self._content.num_rows):
            self._is_announced = True
            self._stream.announce(self._content.num_rows, [{"key": self._content.key}])
        count = min(self._dice.randint(1, plan.piece_rows), self._content.num_rows - self._row)
        if count and self._work.in_place:
            count = self._reserve(count)
        if count:
            self._stream.write(self._row, self._content.tensors(self._row, count))
            self._row += count
        if self.is_busy or self._slots is not None:
            self._pause()

    def _reserve(self, num_rows: int) -> int:
        """Ask for slots for the next rows. How many rows to write without: none where slots are, or may be soon."""
        offset = self._row % self._work.block_size
        if offset:
            return min(num_rows, self._work.block_size - offset)
        wanted = max(num_rows, self._dice.choice((1, 3)) * self._work.block_size)
        self._slots = self._stream.slot_rows(self._row, min(wanted, self._content.num_rows - self._row))
        self._num_tries = 0 if self._slots is not None else self._num_tries + 1
        return 0 if self._slots is not None or self._num_tries % MAX_TRIES else num_rows

    def _compute(self, slots: Mapping[str, Tensor]) -> None:
        self._slots = None
        num_rows = len(next(iter(slots.values())))
        if self._dice.random() < 0.1:
            return self._stream.drop_slots()
        first_index, end_index = self._row // self._work.block_size, (self._row + num_rows) // self._work.block_size
        self._rules.computing(self._work.book, self._work.epoch, range(first_index, end_index))
        self._content.put(self._row, slots)
        self._stream.write(self._row, slots)
        self._row += num_rows
