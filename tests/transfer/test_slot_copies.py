"""Rows that were written elsewhere come into their slots in as few copies as there are pieces of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transfer.segment_pair import SegmentPair, compute, part
from tests.transfer.test_streams import configure
from tests.transfer.virtual import assert_rows_equal, make_rows
from transfer.memory.buffers import PlaneBuffers
from transfer.memory.segments import is_supported

pytestmark = pytest.mark.skipif(not is_supported(), reason="this system has no sealed memory files")

BLOCK = 4


@contextmanager
def noted_copies() -> Iterator[list[int]]:
    """The first slot of every copy."""
    copies: list[int] = []
    place = PlaneBuffers.place

    def noted(self: PlaneBuffers, block_id: int, frames: list[memoryview]) -> None:
        copies.append(block_id)
        place(self, block_id, frames)

    with patch.object(PlaneBuffers, "place", noted):
        yield copies


@pytest.mark.parametrize(
    ("sizes", "num_copies"),
    [
        ([8 * BLOCK], 1),  # neighbours in both memories
        ([3 * BLOCK, 5 * BLOCK], 2),  # two pieces of the producer's memory
        ([7 * BLOCK + 1], 1),  # the last block is not whole
        ([2 * BLOCK + 1, 5 * BLOCK + 3], 3),  # one block lies across two pieces
    ],
)
def test_neighbouring_rows_are_one_copy(sizes: list[int], num_copies: int) -> None:
    total = sum(sizes)
    pair = SegmentPair(replace(configure(BLOCK, 8 * BLOCK, 8), credit_window_blocks=16))
    data, row = make_rows(total), 0
    stream, consumer = pair.begin()
    for size in sizes:
        stream.write(row, part(data, row, row + size))
        row += size
    with noted_copies() as copies:
        stream.announce(total)  # nothing leaves before
        pair.network.settle()
    assert len(copies) == num_copies
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4 * BLOCK), st.booleans()), min_size=1, max_size=12),
    st.integers(2, 9),
    st.integers(0, 3),
)
def test_pieces_of_any_size_computed_in_place_or_not_arrive(
    pieces: list[tuple[int, bool]], num_slots: int, num_others: int
) -> None:
    total = sum(size for size, _ in pieces)
    pair = SegmentPair(configure(BLOCK, 2 * BLOCK, num_slots))
    others = [pair.whole(3 * BLOCK, seed, admit=False) for seed in range(1, 1 + num_others)]  # they part the slots
    stream, consumer = pair.begin(total)
    data, row = make_rows(total), 0
    for size, in_place in pieces:
        end = min(total, row + size)
        while row < end:
            views = stream.slot_rows(row, end - row) if in_place else None
            after = end if views is None else compute(views, data, row)
            stream.write(row, part(data, row, after) if views is None else views)
            row = after
            pair.network.settle()
    for other, *_ in others:
        other.abort("Cancelled", "it was only in the way")
    pair.network.advance(5.0)
    assert_rows_equal(consumer, data)
    stream.result(0)
