"""Segments and their book: layout, seals, sizes that cannot change, views that outlive close, who may have a slot."""

from __future__ import annotations

import gc
import mmap
import os
import tempfile
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from transfer.block_pool import runs
from transfer.errors import (
    ConfigError,
    DoubleFree,
    ForeignOwner,
    LocalProtocolError,
    PoolExhausted,
    RemoteProtocolError,
)
from transfer.memory.segment_book import SegmentBook
from transfer.memory.segments import (
    PAGE_BYTES,
    SEAL_BYTES,
    Filling,
    OwnedSegment,
    SegmentLayout,
    attach,
    is_supported,
)
from transfer.tensors import PlaneSpec

pytestmark = pytest.mark.skipif(not is_supported(), reason="this system has no sealed memory files")

PLANES = (
    PlaneSpec(name="embeddings", dtype="bfloat16", row_shape=(3584,)),
    PlaneSpec(name="token_ids", dtype="int32", row_shape=()),
)
STREAM = "0123456789abcdef" * 2


def layout_of(num_slots: int = 4, block_size: int = 8, planes: tuple[PlaneSpec, ...] = PLANES) -> SegmentLayout:
    return SegmentLayout(num_slots=num_slots, block_size=block_size, planes=planes)


def num_mappings() -> int:
    for thread in threading.enumerate():  # of an earlier test's segment, which it keeps mapped
        if thread.name == "populate segment":
            thread.join()
    gc.collect()
    return Path("/proc/self/maps").read_text().count("/memfd:tandem-")


def num_descriptors() -> int:
    return sum(
        "memfd:tandem-" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if exists(fd)
    )


def exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


# -- layout and seals -------------------------------------------------------------------------------------------------

planes_strategy = st.lists(
    st.builds(
        PlaneSpec,
        name=st.uuids().map(str),
        dtype=st.sampled_from(["bfloat16", "float32", "int8", "int64", "bool"]),
        row_shape=st.lists(st.integers(1, 40), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=4,
).map(tuple)


@given(num_slots=st.integers(1, 500), block_size=st.integers(1, 200), planes=planes_strategy)
def test_slots_and_seals_lie_apart_inside_the_segment(
    num_slots: int, block_size: int, planes: tuple[PlaneSpec, ...]
) -> None:
    layout = layout_of(num_slots, block_size, planes)
    parts = [(0, num_slots * SEAL_BYTES)]
    for plane, spec in enumerate(planes):
        first, last = layout.slot_range(plane, 0), layout.slot_range(plane, num_slots - 1)
        assert first[0] % PAGE_BYTES == 0
        assert first[1] - first[0] == block_size * spec.row_bytes
        assert (first[0], last[1]) == layout.slot_range(plane, 0, num_slots), "neighbouring slots are one run of rows"
        parts.append((first[0], last[1]))
    assert all(end <= start for (_, end), (start, _) in pairwise(parts))
    assert parts[-1][1] <= layout.num_bytes and layout.num_bytes % PAGE_BYTES == 0


@pytest.mark.parametrize(
    "num_slots, block_size", [(0, 8), (-1, 8), (4, 0), (True, 8), (1 << 32, 1), (1 << 31, 1 << 31)]
)
def test_sizes_out_of_range_are_refused(num_slots: int, block_size: int) -> None:
    with pytest.raises(ConfigError):
        layout_of(num_slots, block_size)


def test_a_layout_needs_a_plane() -> None:
    with pytest.raises(ConfigError):
        layout_of(planes=())


fillings = st.builds(
    Filling,
    stream_id=st.sampled_from([b"\0" * 16, b"\1" + b"\0" * 15, b"\0" * 15 + b"\1", bytes(range(16))]).map(bytes.hex),
    epoch=st.integers(1, 3),
    first_index=st.integers(0, 3) | st.just((1 << 32) - 9),
    serial=st.integers(0, 3) | st.just((1 << 63) - 1),
    num_rows=st.integers(17, 24),
    checksums=st.just(()) | st.tuples(*[st.integers(0, 1) | st.just((1 << 64) - 1)] * 3),
)


@given(one=fillings, other=fillings, slots=st.permutations(range(5)).map(lambda slots: tuple(slots[:3])))
def test_slots_are_sealed_for_exactly_what_they_were_sealed_with(
    one: Filling, other: Filling, slots: tuple[int, ...]
) -> None:
    segment = OwnedSegment(layout_of(5, 8, PLANES[1:]))
    assert not segment.is_sealed(slots, one)
    segment.seal(slots, one)
    assert segment.is_sealed(slots, one)
    plain = replace(one, checksums=one.checksums or (0,) * 3)
    assert segment.is_sealed(slots, other) == (replace(other, checksums=other.checksums or (0,) * 3) == plain)
    assert not segment.is_sealed(slots[::-1], one), "a slot is sealed for its own block"
    last = replace(one, first_index=one.first_index + 2, num_rows=one.num_rows - 16, checksums=one.checksums[2:])
    assert segment.is_sealed(slots[2:], last)
    segment.seal(slots[1:2], replace(one, serial=one.serial ^ 1, num_rows=8, checksums=()))
    assert not segment.is_sealed(slots, one), "one slot of another filling is enough"
    segment.close()


def test_a_seal_is_of_its_own_segment_only() -> None:
    filling = Filling(stream_id=STREAM, epoch=1, first_index=0, serial=1, num_rows=8)
    one, other = OwnedSegment(layout_of()), OwnedSegment(layout_of())
    one.seal([0], filling)
    size = len(one.memory)
    other.memory[:size] = one.memory[:size]
    assert one.is_sealed([0], filling) and not other.is_sealed([0], filling)
    one.close()
    other.close()
    assert not one.is_sealed([0], filling)
    with pytest.raises(LocalProtocolError, match="closed"):
        one.seal([0], filling)


@given(st.lists(st.integers(0, 50), max_size=40))
def test_runs_join_what_is_consecutive_and_nothing_else(slots: list[int]) -> None:
    found = runs(slots)
    assert [slot for first, count in found for slot in range(first, first + count)] == slots
    assert all(first + count != after for (first, count), (after, _) in pairwise(found))


# -- memory -----------------------------------------------------------------------------------------------------------


def test_what_one_mapping_writes_the_other_reads() -> None:
    layout = layout_of()
    with_owner = OwnedSegment(layout)
    peer = attach(with_owner.fd, layout, with_owner.generation)
    start, end = layout.slot_range(0, 3)
    peer.memory[start:end] = bytes(range(256)) * ((end - start) // 256)
    filling = Filling(stream_id=STREAM, epoch=2, first_index=5, serial=9, num_rows=8)
    peer.seal([3], filling)
    assert with_owner.memory[start:end] == bytes(range(256)) * ((end - start) // 256)
    assert with_owner.is_sealed([3], filling)
    assert with_owner.memory[: 3 * SEAL_BYTES] == bytes(3 * SEAL_BYTES), "only the slot that was sealed is"
    with_owner.close()
    peer.close()


def test_each_segment_has_its_own_generation() -> None:
    segments = [OwnedSegment(layout_of(1, 1)) for _ in range(8)]
    assert len({segment.generation for segment in segments}) == 8
    for segment in segments:
        segment.close()


@pytest.mark.parametrize("slot", [-1, 4, 1 << 40])
def test_a_slot_that_does_not_exist_is_refused(slot: int) -> None:
    segment = OwnedSegment(layout_of(4))
    filling = Filling(stream_id=STREAM, epoch=1, first_index=0, serial=0, num_rows=9)
    for reach in (
        lambda: segment.seal([slot, 1], filling),
        lambda: segment.is_sealed([1, slot], filling),
        lambda: segment.seal([], filling),
        lambda: segment.layout.slot_range(0, slot),
        lambda: segment.populate(slot, 1),
    ):
        with pytest.raises(LocalProtocolError):
            reach()
    with pytest.raises(LocalProtocolError):
        segment.layout.slot_range(1, 3, 2)
    segment.close()


def test_the_size_can_never_change() -> None:
    segment = OwnedSegment(layout_of())
    size = os.fstat(segment.fd).st_size
    for other in (0, size - 1, size + PAGE_BYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, other)
    assert os.fstat(segment.fd).st_size == size
    segment.close()


def test_memory_that_could_shrink_or_has_another_size_is_not_mapped() -> None:
    layout = layout_of()
    before = num_mappings()
    unsealed = os.memfd_create("tandem-unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, layout.num_bytes)
    with pytest.raises(RemoteProtocolError, match="can still change"):
        attach(unsealed, layout, 1)
    smaller = OwnedSegment(layout_of(3))
    with pytest.raises(RemoteProtocolError, match="agreed"):
        attach(smaller.fd, layout, smaller.generation)
    smaller.close()
    os.close(unsealed)
    assert num_mappings() == before


def test_what_is_no_writable_memory_file_is_not_mapped() -> None:
    layout = layout_of()
    read_end, write_end = os.pipe()
    with tempfile.TemporaryFile() as file:
        file.truncate(layout.num_bytes)
        for fd in (read_end, file.fileno()):
            with pytest.raises(RemoteProtocolError):
                attach(fd, layout, 1)
    segment = OwnedSegment(layout)
    read_only = os.open(f"/proc/self/fd/{segment.fd}", os.O_RDONLY)
    with pytest.raises(RemoteProtocolError, match="may not be written"):
        attach(read_only, layout, segment.generation)
    for fd in (read_end, write_end, read_only):
        os.close(fd)
    segment.close()


def test_a_view_keeps_the_mapping_and_nothing_else_does() -> None:
    mappings, descriptors = num_mappings(), num_descriptors()
    segment = OwnedSegment(layout_of())
    assert (num_mappings(), num_descriptors()) == (mappings + 1, descriptors + 2), "ours, and mmap's own copy"
    view = memoryview(segment.memory)
    segment.close()
    segment.close()
    view[-1] = 7
    assert view[-1] == 7 and not segment.is_open
    assert (num_mappings(), num_descriptors()) == (mappings + 1, descriptors + 1)
    with pytest.raises(LocalProtocolError, match="closed"):
        _ = segment.memory
    del view
    assert (num_mappings(), num_descriptors()) == (mappings, descriptors)


def resident_kib(name: str) -> int:
    entry = Path("/proc/self/smaps").read_text().split(f"/memfd:{name}", 1)[1]
    return next(int(line.split()[1]) for line in entry.splitlines() if line.startswith("Rss:"))


def test_populating_brings_in_the_pages_of_those_slots_only() -> None:
    segment = OwnedSegment(layout_of(64, 128, PLANES[:1]))
    name = f"tandem-{segment.generation:016x}"
    assert resident_kib(name) == 0
    segment.populate(8, 4)
    start, end = segment.layout.slot_range(0, 8, 4)
    resident = resident_kib(name)
    if resident == 0:
        pytest.skip("this kernel cannot populate on request")
    assert (end - start) // 1024 <= resident <= (end - start) // 1024 + 2 * mmap.PAGESIZE // 1024
    segment.populate(0, 0)
    segment.populate(0, 64)
    assert resident_kib(name) == 64 * 896
    segment.close()
    with pytest.raises(LocalProtocolError):
        segment.populate(0, 1)


# -- the book ---------------------------------------------------------------------------------------------------------


class BookMachine(RuleBasedStateMachine):
    """The book against a plain map from slot to (state, owner or writer), which it must never disagree with."""

    NUM_SLOTS = 7
    OWNERS = st.sampled_from(["a", "b", "c"])
    EPOCHS = st.integers(1, 2)
    SLOTS = st.lists(st.sampled_from(range(NUM_SLOTS)), min_size=1, max_size=4)

    def __init__(self) -> None:
        super().__init__()
        self.book = SegmentBook(self.NUM_SLOTS, 16)
        self.slots: dict[int, tuple[str, str] | None] = dict.fromkeys(range(self.NUM_SLOTS))
        self.abandoned = False

    def held(self, state: str, owner: str) -> list[int]:
        return [slot for slot, held in self.slots.items() if held == (state, owner)]

    @rule(owner=OWNERS, num_tokens=st.integers(1, 80))
    def grant(self, owner: str, num_tokens: int) -> None:
        count = -(-num_tokens // 16)
        free = [slot for slot, held in self.slots.items() if held is None]
        if self.abandoned or count > len(free):
            with pytest.raises(PoolExhausted):
                self.book.allocate(num_tokens, owner)
            return
        allocation = self.book.allocate(num_tokens, owner)
        assert list(allocation.block_ids) == free[:count], "the lowest first"
        assert allocation.allocated_tokens == count * 16
        self.slots.update(dict.fromkeys(allocation.block_ids, ("granted", owner)))

    @rule(owner=OWNERS, ids=SLOTS, epoch=EPOCHS, fenced=st.booleans())
    def give_some_back(self, owner: str, ids: list[int], epoch: int, fenced: bool) -> None:
        self.give_back(owner, ids, f"{owner}/{epoch}" if fenced else None)

    @rule(owner=OWNERS, epoch=EPOCHS, fenced=st.booleans())
    def give_all_back(self, owner: str, epoch: int, fenced: bool) -> None:
        self.give_back(owner, self.held("granted", owner), f"{owner}/{epoch}" if fenced else None)

    def give_back(self, owner: str, ids: list[int], writer: str | None) -> None:
        def step() -> None:
            if writer is None:
                self.book.free_blocks(owner, ids)
            else:
                self.book.fence(owner, ids, writer)

        if len(set(ids)) == len(ids) and set(ids) <= set(self.held("granted", owner)):
            step()
            self.slots.update(dict.fromkeys(ids, None if writer is None else ("fenced", writer)))
        else:
            with pytest.raises((ForeignOwner, DoubleFree)):
                step()

    @rule(owner=OWNERS, epoch=EPOCHS)
    def release(self, owner: str, epoch: int) -> None:
        held = self.held("fenced", f"{owner}/{epoch}")
        assert self.book.release(f"{owner}/{epoch}") == len(held)
        self.slots.update(dict.fromkeys(held))

    @precondition(lambda self: not self.abandoned)
    @rule(really=st.integers(0, 9))
    def abandon(self, really: int) -> None:
        if really == 0:
            self.book.abandon()
            self.abandoned = True

    @invariant()
    def agrees(self) -> None:
        self.book.check()
        states = [held[0] if held else "free" for held in self.slots.values()]
        assert self.book.num_in_use == states.count("granted")
        assert self.book.num_fenced == states.count("fenced")
        assert self.book.num_free == (0 if self.abandoned else states.count("free"))
        assert [self.book.held_by(owner) for owner in "abc"] == [self.held("granted", o) for o in "abc"]
        assert [self.book.in_use_by(o) for o in "abc"] == [len(self.held("granted", o)) for o in "abc"]


TestBook = BookMachine.TestCase
TestBook.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
