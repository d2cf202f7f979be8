"""Segments: memory that two processes of one host share, cut into slots of one block each, each slot with a seal.

The receiver makes a segment for one peer (a memfd that can no longer change its size), the peer maps it and writes
rows into slots that it was granted, and a seal says whose rows a slot holds. A sealed slot is given away: its writer
never touches it again. There is no file behind it: the kernel frees the memory when both ends are gone, however they
went. Who holds which slot is `segment_book`'s business, how a peer gets the memory `segment_passing`'s.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import mmap
import os
import secrets
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from transfer.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from transfer.memory.pages import advise_huge
from transfer.tensors import PlaneSpec

SEAL_BYTES = 64
SEAL_WORDS = 8  # stream id (2), epoch, index, segment generation, serial, rows, checksum
PAGE_BYTES = 4096
POPULATE_STEP_BYTES = 256 << 10  # other threads may need the address space in between
MADV_POPULATE_WRITE = 23  # Linux 5.14; not in the mmap module yet
_MAX_BYTES = 1 << 46
_STREAM_WORDS = struct.Struct("<QQ")


def is_supported() -> bool:
    """Whether this system has sealed memory files."""
    return hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")


@dataclass(frozen=True, kw_only=True, slots=True)
class Filling:
    """Rows of blocks first_index, first_index + 1, ... of a stream and epoch, written in one go, one block a slot.

    `serial` counts what the stream sends under its epoch, so a slot that is filled again never looks the same.
    `num_rows` is all of them; every block but the last is full. `checksums`, one a block, where they are on.
    """

    stream_id: str
    epoch: int
    first_index: int
    serial: int
    num_rows: int
    checksums: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentLayout:
    """Where things lie: the seals of all slots first, then for each plane all its slots, each part on a page border.

    Slots with neighbouring numbers so are one run of rows in every plane. ConfigError for sizes out of range.
    """

    num_slots: int
    block_size: int
    planes: tuple[PlaneSpec, ...]
    slot_bytes: tuple[int, ...] = field(init=False)
    plane_offsets: tuple[int, ...] = field(init=False)
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        for name, value in (("num_slots", self.num_slots), ("block_size", self.block_size)):
            if type(value) is not int or not 1 <= value < 1 << 32:
                raise ConfigError(f"a segment's {name} must be a positive int, not {value!r}")
        if not self.planes:
            raise ConfigError("a segment needs at least one plane")
        sizes = tuple(self.block_size * plane.row_bytes for plane in self.planes)
        offsets, end = [], _page_up(self.num_slots * SEAL_BYTES)
        for size in sizes:
            offsets.append(end)
            end = _page_up(end + self.num_slots * size)
        if end > _MAX_BYTES:
            raise ConfigError(f"a segment of {self.num_slots} slots would have {end} bytes: use fewer tokens")
        object.__setattr__(self, "slot_bytes", sizes)
        object.__setattr__(self, "plane_offsets", tuple(offsets))
        object.__setattr__(self, "num_bytes", end)

    def slot_range(self, plane: int, slot: int, num_slots: int = 1) -> tuple[int, int]:
        """Start and end of neighbouring slots of a plane. LocalProtocolError for a slot that does not exist."""
        if not 0 <= slot <= slot + num_slots <= self.num_slots:
            raise LocalProtocolError(f"slot {slot} (+{num_slots}) of a segment with {self.num_slots} slots")
        start = self.plane_offsets[plane] + slot * self.slot_bytes[plane]
        return start, start + num_slots * self.slot_bytes[plane]


class Segment:
    """One mapping of the shared memory. Its pages go back when this object and every view of it are gone."""

    def __init__(self, memory: mmap.mmap, layout: SegmentLayout, generation: int) -> None:
        self.layout = layout
        self.generation = generation
        self._num_populated = 0  # slots below were asked for
        self._memory: mmap.mmap | None = memory
        words = np.frombuffer(memory, dtype=np.uint64, count=layout.num_slots * SEAL_WORDS)
        self._seals: npt.NDArray[np.uint64] | None = words.reshape(layout.num_slots, SEAL_WORDS)

    @property
    def is_open(self) -> bool:
        """Whether close() is still to come."""
        return self._memory is not None

    @property
    def memory(self) -> mmap.mmap:
        """All bytes, as a writable buffer; a view of it keeps the mapping. LocalProtocolError after close."""
        if self._memory is None:
            raise LocalProtocolError(f"segment {self.generation:016x} is closed")
        return self._memory

    def seal(self, slots: Sequence[int], filling: Filling) -> None:
        """Give slots away: from here on their writer may not touch them. The rows must be in them already."""
        self._check_slots(slots)
        if self._seals is None:
            raise LocalProtocolError(f"segment {self.generation:016x} is closed")
        self._seals[_side_by_side(slots)] = self._words(len(slots), filling)

    def is_sealed(self, slots: Sequence[int], filling: Filling) -> bool:
        """Whether every one of the slots holds exactly this."""
        self._check_slots(slots)
        if self._seals is None:
            return False
        return self._seals[_side_by_side(slots)].tobytes() == self._words(len(slots), filling).tobytes()

    def _words(self, num_slots: int, filling: Filling) -> npt.NDArray[np.uint64]:
        block_size, last_rows = self.layout.block_size, filling.num_rows - (num_slots - 1) * self.layout.block_size
        low, high = _STREAM_WORDS.unpack(bytes.fromhex(filling.stream_id))
        first = (low, high, filling.epoch, filling.first_index, self.generation, filling.serial, block_size, 0)
        words = np.empty((num_slots, SEAL_WORDS), dtype=np.uint64)
        words[:] = np.array(first, dtype=np.uint64)
        words[:, 3] += np.arange(num_slots, dtype=np.uint64)
        words[-1, 6] = last_rows
        if filling.checksums:
            words[:, 7] = filling.checksums
        return words

    def populate(self, slot: int, num_slots: int) -> None:
        """Have the pages of neighbouring slots in memory before anybody waits for them. Takes long; holds no lock."""
        if not hasattr(mmap, "MADV_NORMAL") or not num_slots:
            return
        anchor = ctypes.c_char.from_buffer(self.memory)  # also keeps the mapping while this runs
        base = ctypes.addressof(anchor)
        for plane in range(len(self.layout.planes)):
            start, end = self.layout.slot_range(plane, slot, num_slots)
            for at in range(start - start % PAGE_BYTES, end, POPULATE_STEP_BYTES):
                length = min(POPULATE_STEP_BYTES, _page_up(end) - at)
                if not self.is_open or _libc().madvise(base + at, length, MADV_POPULATE_WRITE):
                    return  # closed meanwhile, or a kernel without it: pages then come when they are first touched

    def populate_soon(self, end: int) -> None:
        """Slots below `end` are to be used soon: `populate` those that never were, in a thread of its own.

        Where the system has no thread left, their pages come when they are first touched.
        """
        first, self._num_populated = self._num_populated, max(self._num_populated, end)
        if end > first:
            thread = threading.Thread(
                target=self._populate_quietly, args=(first, end - first), name="populate segment", daemon=True
            )
            with contextlib.suppress(RuntimeError):
                thread.start()

    def _populate_quietly(self, slot: int, num_slots: int) -> None:
        with contextlib.suppress(LocalProtocolError):  # closed meanwhile
            self.populate(slot, num_slots)

    def close(self) -> None:
        """Let go of the mapping; it ends with the last view of it. Safe to repeat."""
        self._memory = self._seals = None

    def _check_slots(self, slots: Sequence[int]) -> None:
        if not slots or min(slots) < 0 or max(slots) >= self.layout.num_slots:
            raise LocalProtocolError(f"slots {list(slots)[:8]} of a segment with {self.layout.num_slots} slots")


class OwnedSegment(Segment):
    """The receiver's end: made here, with the descriptor that peers may be given."""

    def __init__(self, layout: SegmentLayout) -> None:
        """Make the memory and fix its size for good. ConfigError when the system refuses."""
        generation = secrets.randbits(63) | 1
        try:
            self.fd = os.memfd_create(f"tandem-{generation:016x}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(self.fd, layout.num_bytes)
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
                memory = mmap.mmap(self.fd, layout.num_bytes, mmap.MAP_SHARED)
            except BaseException:
                os.close(self.fd)
                raise
        except (OSError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"no shared memory of {layout.num_bytes} bytes: {error}; turn shared_memory off"
            ) from error
        advise_huge(memory)
        super().__init__(memory, layout, generation)

    def unseal(self, slots: Sequence[int]) -> None:
        """Slots are granted anew: what was sealed before counts no more. Nobody else writes them now."""
        self._check_slots(slots)
        if self._seals is not None:
            self._seals[list(slots)] = 0

    def close(self) -> None:
        """Also close the descriptor."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        super().close()


def attach(fd: int, layout: SegmentLayout, generation: int) -> Segment:
    """Map a segment that a peer made; `fd` stays the caller's.

    RemoteProtocolError unless it is a memory file of exactly the layout's size that can never change its size: with a
    shorter one, the first write beyond its end would kill this process.
    """
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        size = os.fstat(fd).st_size
    except OSError as error:
        raise RemoteProtocolError(f"a descriptor that is no memory file came for a segment: {error}") from error
    if sealed & _SIZE_SEALS != _SIZE_SEALS:
        raise RemoteProtocolError("a segment whose size can still change came: it could be cut under our feet")
    if size != layout.num_bytes:
        raise RemoteProtocolError(f"a segment of {size} bytes came, {layout.num_bytes} were agreed on")
    try:
        memory = mmap.mmap(fd, size, mmap.MAP_SHARED)
    except PermissionError as error:
        raise RemoteProtocolError("a segment that may not be written came") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"a segment of {size} bytes cannot be mapped: {error}; turn shared_memory off") from error
    advise_huge(memory)
    return Segment(memory, layout, generation)


def _side_by_side(slots: Sequence[int]) -> slice | list[int]:
    """An index of these slots: a slice where they are neighbours, which is several times quicker."""
    first, after = slots[0], slots[0] + len(slots)
    return slice(first, after) if tuple(slots) == tuple(range(first, after)) else list(slots)


def _page_up(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


_SIZE_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW if is_supported() else 0
