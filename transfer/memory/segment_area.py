"""SegmentArea: a segment as a place to receive into: its slots are granted like blocks, and written by the sender.

Runs on the service's I/O thread. What a stream gives back while its sender may still write it stays fenced until that
sender lets go; see `segment_book`. A sender that does not say so is asked, and how long it is silent is kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transfer.memory.buffers import PlaneBuffers
from transfer.memory.receive_area import ReceiveArea
from transfer.memory.segment_book import SegmentBook
from transfer.memory.segments import Filling, OwnedSegment, SegmentLayout
from transfer.protocol.integrity import block_tag, tag_seed
from transfer.protocol.messages import Filled
from transfer.protocol.ticket import Ticket

ASK_S = 0.5  # a sender that does not say that it let go is asked as often


@dataclass(slots=True)
class _Silence:
    """Since when a writer whose epoch is over was not heard, and when it was last asked."""

    since: float
    asked: float


class SegmentArea(ReceiveArea):
    """One segment, shared by the streams of one peer. ConfigError when the system has no memory for it."""

    def __init__(self, layout: SegmentLayout, *, has_checksums: bool, segment: OwnedSegment | None = None) -> None:
        self.segment = segment or OwnedSegment(layout)
        self.book = SegmentBook(layout.num_slots, layout.block_size)
        self.has_checksums = has_checksums
        self.is_attached = False  # the peer has mapped it
        self.idle_since: float | None = None  # when its last stream left; None before the first came, and meanwhile
        self._writers: dict[str, Ticket] = {}  # the current epoch of every stream in it
        self._silent: dict[str, _Silence] = {}  # writers of epochs that are over, with slots that are fenced
        buffers = PlaneBuffers.over(
            self.segment.memory, layout.plane_offsets, layout.num_slots, layout.block_size, layout.planes
        )
        super().__init__(self.book, buffers)

    @property
    def num_streams(self) -> int:
        """Streams that are received here."""
        return len(self._writers)

    @property
    def is_open(self) -> bool:
        """Whether new streams may come here."""
        return self.segment.is_open and not self.book.is_abandoned

    def bind(self, ticket: Ticket) -> None:
        """From now on the stream is received here, under this epoch."""
        self._writers[ticket.stream_id] = ticket
        self.idle_since = None

    def allocate(self, stream_id: str, count: int) -> tuple[int, ...]:
        """Slots for a stream that the plan named."""
        slots = super().allocate(stream_id, count)
        self.segment.unseal(slots)
        self.segment.populate_soon(max(slots) + 1)
        return slots

    def place(self, block_id: int, frames: Sequence[memoryview]) -> None:
        """Nothing to do: the sender wrote the rows where they are."""

    def is_filled(self, message: Filled, first: int, count: int, num_rows: int) -> bool:
        """Whether `count` of the slots that a message names, from its `first` on, hold `num_rows` rows as it says."""
        ticket = self._writers.get(message.stream_id)
        slots = message.block_ids[first : first + count]
        if ticket is None or ticket.epoch != message.epoch or max(slots) >= self.segment.layout.num_slots:
            return False
        filling = Filling(
            stream_id=message.stream_id,
            epoch=message.epoch,
            first_index=message.first_index + first,
            serial=message.serial,
            num_rows=num_rows,
        )
        if self.has_checksums:
            filling = with_checksums(filling, ticket, slots, self._buffers, self.segment.layout.block_size)
        return self.segment.is_sealed(slots, filling)

    def free(self, stream_id: str, block_ids: Sequence[int], *, fenced: bool) -> None:
        """Slots come back; `fenced`: their writer may still write them."""
        if fenced:
            self.book.fence(stream_id, block_ids, self._writer(stream_id))
        else:
            self.book.free_blocks(stream_id, block_ids)

    def end(self, stream_id: str) -> None:
        """The stream is over, or goes on elsewhere; what it still holds is fenced."""
        super().end(stream_id)
        self._writers.pop(stream_id, None)

    def release(self, stream_id: str, epoch: int) -> int:
        """The writer of an epoch let go of its slots; how many come free."""
        writer = f"{stream_id}/{epoch}"
        self._silent.pop(writer, None)
        return self.book.release(writer)

    def unheard(self, now: float, is_over: Callable[[str, int], bool]) -> list[tuple[str, int]]:
        """Stream and epoch of the writers to be asked, now, whether they let go: their epoch is over for a while."""
        asked: list[tuple[str, int]] = []
        for writer in self.book.fenced_writers:
            stream_id, _, digits = writer.rpartition("/")
            epoch = int(digits)
            if not is_over(stream_id, epoch):
                continue
            silence = self._silent.setdefault(writer, _Silence(now, now))
            if now - silence.asked >= ASK_S:
                silence.asked = now
                asked.append((stream_id, epoch))
        return asked

    def silence_s(self, now: float) -> float:
        """For how long the writer has been silent that has been so longest."""
        return max((now - silence.since for silence in self._silent.values()), default=0.0)

    @property
    def is_stuck(self) -> bool:
        """Whether its streams wait for slots that only silent writers can give back."""
        return bool(self._writers) and not self.book.num_free and not self.book.num_in_use

    def close(self) -> None:
        """Let go of the memory; it ends with the last view of it."""
        self.book.abandon()
        self.segment.close()

    def _writer(self, stream_id: str) -> str:
        ticket = self._writers.get(stream_id)
        return f"{stream_id}/{0 if ticket is None else ticket.epoch}"


def with_checksums(
    filling: Filling, ticket: Ticket, slots: Sequence[int], buffers: PlaneBuffers, block_size: int
) -> Filling:
    """`filling` with the checksum of what each slot holds now."""
    seed, sums = tag_seed(ticket), []
    for offset, slot in enumerate(slots):
        index = filling.first_index + offset
        num_rows = min(block_size, filling.num_rows - offset * block_size)
        frames = buffers.frames(slot, num_rows)
        tag = block_tag(
            seed, ticket.stream_id, ticket.epoch, index, slot, index * block_size, num_rows, filling.serial, frames
        )
        sums.append(int.from_bytes(tag, "little"))
    return Filling(
        stream_id=filling.stream_id,
        epoch=filling.epoch,
        first_index=filling.first_index,
        serial=filling.serial,
        num_rows=filling.num_rows,
        checksums=tuple(sums),
    )
