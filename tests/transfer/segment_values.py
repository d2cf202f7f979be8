"""What the two processes of the segment tests agree on: a small layout, a stream, and what goes into its slots."""

from __future__ import annotations

from transfer.memory.segments import Filling, Segment, SegmentLayout
from transfer.protocol.ticket import Ticket
from transfer.tensors import PlaneSpec

LAYOUT = SegmentLayout(
    num_slots=5, block_size=4, planes=(PlaneSpec(name="embeddings", dtype="float32", row_shape=(64,)),)
)
TICKET_ID = "ab" * 16


def fill(segment: Segment, ticket: Ticket) -> None:
    """Every slot full of its own number + 1, and sealed."""
    for slot in range(LAYOUT.num_slots):
        start, end = LAYOUT.slot_range(0, slot)
        segment.memory[start:end] = bytes([slot + 1]) * (end - start)
    segment.seal(range(LAYOUT.num_slots), filling_of(ticket))


def filling_of(ticket: Ticket) -> Filling:
    """What `fill` seals the slots with."""
    num_rows = LAYOUT.num_slots * LAYOUT.block_size
    return Filling(stream_id=ticket.stream_id, epoch=ticket.epoch, first_index=0, serial=1, num_rows=num_rows)


def first_bytes(segment: Segment) -> list[int]:
    """The first byte of every slot."""
    return [segment.memory[LAYOUT.slot_range(0, slot)[0]] for slot in range(LAYOUT.num_slots)]
