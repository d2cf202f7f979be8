"""Shared memory under watch: segments without descriptors or threads, and an account of who may write which slot.

A virtual segment is memory of this process; the receiver's end and every mapping of it are views of the same bytes. A
slot that came back is filled with poison, so that whoever writes it before it is granted again is found out, and so is
who reads rows there that it gave away.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import TypeAlias

from transfer.block_pool import Allocation
from transfer.memory.buffers import PlaneBuffers
from transfer.memory.segment_area import SegmentArea
from transfer.memory.segment_book import SegmentBook
from transfer.memory.segments import Filling, OwnedSegment, Segment, SegmentLayout
from transfer.protocol.messages import Filled
from transfer.simulation.memory import POISON, BlockWatch, Complain, Noted

FREED = "4: a freed block is never written"

OnSeal: TypeAlias = Callable[[Sequence[int], Filling], None]
OnFilled: TypeAlias = Callable[[Filled, int, int, int], None]


class VirtualSegment(OwnedSegment):
    """The receiver's end."""

    def __init__(self, layout: SegmentLayout, generation: int) -> None:
        self.fd = -1
        Segment.__init__(self, mmap.mmap(-1, layout.num_bytes), layout, generation)

    def populate_soon(self, end: int) -> None:
        """Nothing to do: it takes no time here."""


class VirtualMapping(Segment):
    """The sender's end; `on_seal` hears of every slot that it gives away."""

    def __init__(self, segment: VirtualSegment, on_seal: OnSeal) -> None:
        super().__init__(segment.memory, segment.layout, segment.generation)
        self._on_seal = on_seal

    def populate_soon(self, end: int) -> None:
        """Nothing to do: it takes no time here."""

    def seal(self, slots: Sequence[int], filling: Filling) -> None:
        super().seal(slots, filling)
        self._on_seal(slots, filling)


class SlotWatch(BlockWatch):
    """The account of one segment. `epoch_of(stream_id)`: the epoch under which a stream is granted slots now.

    writers   slot -> stream and epoch that may write it: it was granted the slot, and did not give it back
    sealed    slot -> index and serial that it was sealed with since it was granted
    """

    def __init__(
        self,
        segment: VirtualSegment,
        complain: Complain,
        on_placed: Noted,
        on_gave: Noted,
        epoch_of: Callable[[str], int],
    ) -> None:
        super().__init__(segment.layout.num_slots, complain, on_placed, on_gave)
        self.generation = segment.generation
        self.is_attached = False
        self.is_abandoned = False
        self.is_cut = False  # its lifeline ended while both ends lived, whether or not its receiver knows
        self.is_closed = False
        self.writers: dict[int, tuple[str, int]] = {}
        self.sealed: dict[int, tuple[int, int]] = {}
        self.memory = SlotMemory(segment)
        self.buffers = self.memory
        self._fenced: dict[str, list[int]] = {}
        self._epoch_of = epoch_of
        for slot in range(self.num_blocks):
            self.memory.poison(slot)

    @property
    def num_fenced(self) -> int:
        """Slots that nobody gets before their writer's word."""
        return sum(map(len, self._fenced.values()))

    def fenced_writers(self) -> list[tuple[str, int]]:
        """Stream and epoch of those whose word is waited for."""
        writers = (writer.rpartition("/") for writer, slots in self._fenced.items() if slots)
        return [(stream_id, int(epoch)) for stream_id, _, epoch in writers]

    @property
    def num_free(self) -> int:
        return 0 if self.is_abandoned else self.num_blocks - len(self.writers)

    def took(self, stream_id: str, block_ids: Sequence[int]) -> None:
        super().took(stream_id, block_ids)
        if self.is_abandoned:
            self._complain("4: nothing of an abandoned segment is granted", stream_id, f"slots {list(block_ids)} were")
        for slot in block_ids:
            writer = self.writers.get(slot)
            if writer is not None:
                text = f"slot {slot} was granted while {writer} may write it"
                self._complain("4: a slot is used again only after its sender's word", stream_id, text)
            elif not self.memory.is_poisoned(slot):
                self._complain(FREED, stream_id, f"slot {slot} was written while it was free")
            self.writers[slot] = stream_id, self._epoch_of(stream_id)
            self.sealed.pop(slot, None)

    def gave(self, stream_id: str, block_ids: Sequence[int]) -> None:
        super().gave(stream_id, block_ids)
        self._come_free(block_ids)

    def fence(self, stream_id: str, block_ids: Sequence[int], writer: str) -> None:
        """A stream gave slots back that its writer may still write."""
        super().gave(stream_id, block_ids)
        self._fenced.setdefault(writer, []).extend(block_ids)

    def release(self, writer: str) -> None:
        """A writer let go of its slots."""
        self._come_free(self._fenced.pop(writer, []))

    def _come_free(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.writers.pop(slot, None)
            self.memory.poison(slot)


class SlotMemory:
    """What the slots of a segment hold, for reading and for poison. Keeps the memory in use."""

    def __init__(self, segment: VirtualSegment) -> None:
        layout = segment.layout
        self._block_size = layout.block_size
        self._buffers = PlaneBuffers.over(
            segment.memory, layout.plane_offsets, layout.num_slots, layout.block_size, layout.planes
        )

    def content(self, block_id: int, num_rows: int) -> list[bytes]:
        """The bytes of a slot's rows, one piece per plane."""
        return [bytes(frame) for frame in self._buffers.frames(block_id, num_rows)]

    def poison(self, block_id: int) -> None:
        """Fill a slot with bytes that nobody sends."""
        for frame in self._buffers.frames(block_id, self._block_size):
            frame[:] = bytes([POISON]) * len(frame)

    def is_poisoned(self, block_id: int) -> bool:
        """Whether nobody wrote a slot since `poison`."""
        return all(piece == bytes([POISON]) * len(piece) for piece in self.content(block_id, self._block_size))


class WatchedBook(SegmentBook):
    """A SegmentBook whose every step the watch sees."""

    def __init__(self, num_slots: int, block_size: int, watch: SlotWatch) -> None:
        super().__init__(num_slots, block_size)
        self._watch = watch

    def allocate(self, num_tokens: int, owner: str) -> Allocation:
        self._watch.touch()
        allocation = super().allocate(num_tokens, owner)
        self._watch.took(owner, allocation.block_ids)
        return allocation

    def free_blocks(self, owner: str, block_ids: Sequence[int]) -> None:
        self._watch.touch()
        super().free_blocks(owner, block_ids)
        self._watch.gave(owner, block_ids)

    def fence(self, owner: str, block_ids: Sequence[int], writer: str) -> None:
        self._watch.touch()
        self._watch.fence(owner, block_ids, writer)
        super().fence(owner, block_ids, writer)

    def release(self, writer: str) -> int:
        self._watch.touch()
        self._watch.release(writer)
        return super().release(writer)

    def abandon(self) -> None:
        self._watch.is_abandoned = True
        super().abandon()


class WatchedArea(SegmentArea):
    """A SegmentArea of virtual memory; `on_filled` hears of all that it takes for filled."""

    def __init__(self, segment: VirtualSegment, *, has_checksums: bool, watch: SlotWatch, on_filled: OnFilled) -> None:
        super().__init__(segment.layout, has_checksums=has_checksums, segment=segment)
        self.book = self.pool = WatchedBook(segment.layout.num_slots, segment.layout.block_size, watch)
        self._watch = watch
        self._on_filled = on_filled

    def is_filled(self, message: Filled, first: int, count: int, num_rows: int) -> bool:
        is_right = super().is_filled(message, first, count, num_rows)
        if is_right:
            self._on_filled(message, first, count, num_rows)
        return is_right

    def close(self) -> None:
        super().close()
        self._watch.is_closed = True
