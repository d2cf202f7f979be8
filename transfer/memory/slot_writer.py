"""SlotWriter: one stream's rows on their way into the slots of its receiver's segment.

Rows that the producer wrote elsewhere are copied once; rows that it computed in their slots are not. A slot that was
sealed is never written again: what was lost on the way is only told again, as it was told before. `reserve`, `commit`
and `drop` are for the producer's thread; everything else runs on the service's I/O thread. From `commit` until the I/O
thread has taken the rows in (`placed`, then `settled`) nothing is given back: it would not know what to copy out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat

from transfer.block_pool import runs
from transfer.errors import LocalProtocolError, RemoteProtocolError
from transfer.memory.buffers import RowQueue, Tensor, is_same_memory
from transfer.memory.segment_area import with_checksums
from transfer.memory.segment_guest import MappedSegment
from transfer.memory.segments import Filling
from transfer.protocol.actions import SendFilled
from transfer.protocol.messages import Filled, Revoked
from transfer.protocol.ticket import Ticket


class SlotWriter:
    """The slots that one epoch of a stream is granted in a mapped segment.

    `settle` is to be called (from any thread) after every `commit` or `drop` that was one; `settled` follows.
    """

    def __init__(
        self, mapped: MappedSegment, ticket: Ticket, block_size: int, settle: Callable[[], None] = lambda: None
    ) -> None:
        self.settle = settle
        self._mapped = mapped
        self._ticket = ticket
        self._block_size = block_size
        self._filled: dict[int, tuple[int, int]] = {}  # index -> (slot, serial), for what may be told again
        self._lock = threading.Lock()
        self._granted: dict[int, int] = {}  # index -> slot
        self._reserved: tuple[int, Mapping[str, Tensor]] | None = None  # first row, views that the producer writes
        self._num_unsettled = 0  # reservations that the producer is done with, and this side not yet
        self._placed: set[int] = set()  # whole blocks that were computed in their slots
        self._placed_end = 0  # no row from here on was
        self._serial = 0  # of the last revocation that was confirmed
        self._is_over = False

    # -- the producer's thread ------------------------------------------------------------------------------------

    def reserve(self, first_row: int, num_rows: int) -> dict[str, Tensor] | None:
        """Views of granted slots for up to `num_rows` rows from `first_row` on, or None; see OutgoingStream.

        The caller vouches that these rows are the next to be written, and within the announced total.
        """
        index, offset = divmod(first_row, self._block_size)
        if offset or num_rows < 1:
            return None
        with self._lock:
            if self._is_over or self._reserved is not None:
                return None
            slot = self._granted.get(index)
            if slot is None:
                return None
            count = 1
            while count * self._block_size < num_rows and self._granted.get(index + count) == slot + count:
                count += 1
            views = self._mapped.buffers.rows(slot, min(num_rows, count * self._block_size))
            self._reserved = first_row, views
            return views

    def commit(self, first_row: int, planes: Mapping[str, Tensor]) -> bool:
        """The producer writes `planes`: whether they are what it reserved, which it so gives up.

        LocalProtocolError, and nothing happens, where they are a part of it, or other rows while it has it, or rows of
        the receiver's memory that are not its own (any more): somebody else's rows may be there by the time they are
        sent.
        """
        with self._lock:
            if self._reserved is None:
                if any(self._mapped.buffers.overlaps(rows) for rows in planes.values()):
                    raise LocalProtocolError(
                        f"stream {self._ticket.stream_id}: rows {first_row} ... lie in the receiver's memory and are "
                        "not reserved (any more): write each of slot_rows once, or write copies"
                    )
                return False
            reserved_row, views = self._reserved
            if first_row != reserved_row or not all(is_same_memory(planes[name], views[name]) for name in views):
                raise LocalProtocolError(
                    f"stream {self._ticket.stream_id}: rows {first_row} ... written while slots are reserved for row "
                    f"{reserved_row} and those after it: write exactly these views, or call drop_slots first"
                )
            self._reserved = None
            self._num_unsettled += 1
            return True

    def drop(self) -> bool:
        """The producer gives up what it reserved; whether there was something."""
        with self._lock:
            if self._reserved is None:
                return False
            self._reserved = None
            self._num_unsettled += 1
            return True

    # -- the I/O thread -------------------------------------------------------------------------------------------

    def granted(self, first_index: int, slots: Sequence[int]) -> None:
        """The stream may fill these. RemoteProtocolError for slots that the segment does not have."""
        if max(slots) >= self._mapped.segment.layout.num_slots:
            raise RemoteProtocolError(
                f"slot {max(slots)} granted in a segment of {self._mapped.segment.layout.num_slots}"
            )
        self._mapped.segment.populate_soon(max(slots) + 1)
        with self._lock:
            self._granted.update(enumerate(slots, first_index))

    def gives_back(self, revoked: Revoked, rows: RowQueue) -> bool:
        """A revocation is to be confirmed: whether nobody writes its slots any more, so that it may be.

        Rows that were computed in them are copied out, for they are to be sent again.
        """
        if revoked.serial <= self._serial:
            return True  # confirmed before; since then the same indexes may have been granted anew
        with self._lock:
            self._granted = {index: slot for index, slot in self._granted.items() if index < revoked.first_index}
            if self._num_unsettled or self._reserved_end() > revoked.first_index * self._block_size:
                return False  # the producer writes there, or did a moment ago: `settled` comes
        self._serial = revoked.serial
        self._filled = {index: told for index, told in self._filled.items() if index < revoked.first_index}
        self._placed = {index for index in self._placed if index < revoked.first_index}
        if revoked.first_index * self._block_size < self._placed_end:
            rows.own(revoked.first_index * self._block_size)
        return True

    def placed(self, first_row: int, end_row: int) -> None:
        """The producer computed these rows in their slots, and the queue of rows refers to them there."""
        whole = range(first_row // self._block_size, end_row // self._block_size)
        self._placed.update(index for index in whole if index in self._granted)  # the others are being given back
        self._placed_end = max(self._placed_end, end_row)

    def settled(self) -> None:
        """What a `commit` or `drop` was about was taken in, or is not wanted any more."""
        with self._lock:
            self._num_unsettled -= 1

    def placed_until(self, index: int) -> int:
        """The end of the run of whole blocks from `index` on that lie in their slots already."""
        while index in self._placed:
            index += 1
        return index

    def fill(self, action: SendFilled, rows: RowQueue) -> list[Filled]:
        """Write what is not written yet, seal it, and what to tell the receiver."""
        if self._filled.keys().isdisjoint(range(action.first_index, action.first_index + len(action.block_ids))):
            self._write(action, action.first_index, len(action.block_ids), rows)
            return [self._message(action.first_index, action.block_ids, action.serial)]
        told: list[tuple[int, int, int]] = []  # index, slot, serial
        fresh: list[int] = []
        for index, slot in enumerate(action.block_ids, action.first_index):
            before = self._filled.get(index)
            if before is not None and before[0] == slot:
                told.append((index, slot, before[1]))
                continue
            fresh.append(index)
            told.append((index, slot, action.serial))
        for first_index, count in runs(fresh):
            self._write(action, first_index, count, rows)
        return self._messages(told)

    def release(self, before_row: int) -> None:
        """Rows below are stored for good."""
        before = before_row // self._block_size
        if self._filled and min(self._filled) < before:
            self._filled = {index: told for index, told in self._filled.items() if index >= before}
        if self._placed and min(self._placed) < before:
            self._placed = {index for index in self._placed if index >= before}

    def end(self) -> bool:
        """The stream is over; whether nobody writes its slots any more."""
        with self._lock:
            self._is_over = True
            self._granted.clear()
            return self._reserved is None and not self._num_unsettled

    # -- helpers --------------------------------------------------------------------------------------------------

    def _reserved_end(self) -> int:
        if self._reserved is None:
            return 0
        first_row, views = self._reserved
        return first_row + len(next(iter(views.values())))

    def _write(self, action: SendFilled, first_index: int, count: int, rows: RowQueue) -> None:
        self._copy(action, first_index, first_index + count, rows)
        self._seal(action, first_index, count)

    def _copy(self, action: SendFilled, index: int, end: int, rows: RowQueue) -> None:
        """Rows that were not computed in their slots, in as few copies as there are pieces of memory at both ends."""
        size, end_row = self._block_size, action.first_row + action.num_rows
        while (index := self.placed_until(index)) < end:
            slots = action.block_ids[index - action.first_index : end - action.first_index]
            first_row, count = index * size, 1
            left, together = end_row - first_row, rows.num_together(first_row)
            while count < len(slots) and slots[count] == slots[0] + count and min((count + 1) * size, left) <= together:
                count += 1
            self._mapped.buffers.place(slots[0], rows.frames(first_row, min(count * size, left)))
            index += count

    def _seal(self, action: SendFilled, first_index: int, count: int) -> None:
        offset = first_index - action.first_index
        slots = action.block_ids[offset : offset + count]
        left = action.num_rows - offset * self._block_size
        filling = Filling(
            stream_id=self._ticket.stream_id,
            epoch=self._ticket.epoch,
            first_index=first_index,
            serial=action.serial,
            num_rows=min(count * self._block_size, left),
        )
        if self._mapped.has_checksums:
            filling = with_checksums(filling, self._ticket, slots, self._mapped.buffers, self._block_size)
        self._mapped.segment.seal(slots, filling)
        self._filled.update(
            zip(range(first_index, first_index + count), zip(slots, repeat(action.serial)), strict=True)
        )

    def _messages(self, told: Sequence[tuple[int, int, int]]) -> list[Filled]:
        messages: list[Filled] = []
        start = 0
        for end in range(1, len(told) + 1):
            if end < len(told) and told[end][2] == told[start][2]:
                continue
            index, _, serial = told[start]
            messages.append(self._message(index, tuple(slot for _, slot, _ in told[start:end]), serial))
            start = end
        return messages

    def _message(self, first_index: int, slots: tuple[int, ...], serial: int) -> Filled:
        ticket = self._ticket
        return Filled(
            stream_id=ticket.stream_id, epoch=ticket.epoch, first_index=first_index, block_ids=slots, serial=serial
        )
