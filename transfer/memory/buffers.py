"""Where torch meets the wire: the receive pool's memory, and raw-byte views of tensors to send.

Owns bytes, not their meaning: which block belongs to whom is `block_pool`'s business. Only this
file and `checkpoint` import torch; the others of this package use the `Tensor` name from here.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from mmap import mmap

import numpy as np
import torch
from torch import Tensor

from transfer.errors import LocalProtocolError
from transfer.memory.pages import private_memory
from transfer.tensors import PlaneSpec

__all__ = ["PlaneBuffers", "RowQueue", "Tensor", "dtype_name", "is_same_memory", "plane_of", "tensor_bytes"]

_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64,
    "int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64,
    "bool": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
PLANE_ALIGNMENT = 4096  # each plane begins on a page


def dtype_name(dtype: torch.dtype) -> str:
    """The plane dtype of a torch dtype. LocalProtocolError when planes cannot have it."""
    if dtype not in _NAMES:
        raise LocalProtocolError(f"{dtype} cannot travel; planes have one of {', '.join(_DTYPES)}")
    return _NAMES[dtype]


def plane_of(name: str, rows: Tensor) -> PlaneSpec:
    """The plane that `rows` [n, *row_shape] belongs to."""
    return PlaneSpec(name=name, dtype=dtype_name(rows.dtype), row_shape=tuple(rows.shape[1:]))


def tensor_bytes(rows: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy. LocalProtocolError for any other tensor."""
    if rows.device.type != "cpu" or not rows.is_contiguous():
        raise LocalProtocolError(f"rows must be contiguous CPU tensors, not on {rows.device} with {rows.stride()=}")
    if rows.requires_grad:
        rows = rows.detach()
    return rows.reshape(-1).view(torch.uint8).numpy().data


def _memory_of(rows: Tensor) -> range:
    return range(rows.data_ptr(), rows.data_ptr() + rows.numel() * rows.element_size())


def is_same_memory(rows: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same bytes in the same shape."""
    return rows.data_ptr() == other.data_ptr() and rows.shape == other.shape and rows.dtype == other.dtype


class PlaneBuffers:
    """Memory of the receive pool: per plane one tensor [num_blocks, block_size, *row_shape], in host memory.

    Pinned when the consumer is on a GPU, so that its copies need no staging; elsewhere in large pages if there are any.
    """

    def __init__(self, num_blocks: int, block_size: int, planes: Sequence[PlaneSpec], device: str = "cpu") -> None:
        if device.startswith("cuda") and torch.cuda.is_available():
            tensors = {
                p.name: torch.empty((num_blocks, block_size, *p.row_shape), dtype=_DTYPES[p.dtype], pin_memory=True)
                for p in planes
            }
        else:
            sizes = [-(-num_blocks * block_size * p.row_bytes // PLANE_ALIGNMENT) * PLANE_ALIGNMENT for p in planes]
            memory = private_memory(sum(sizes), "the pool of received blocks (transfer.pool_tokens)")
            tensors = _lay_over(memory, (0, *accumulate(sizes[:-1])), num_blocks, block_size, planes)
        self._keep(tensors, block_size)

    @classmethod
    def over(
        cls, memory: mmap, offsets: Sequence[int], num_blocks: int, block_size: int, planes: Sequence[PlaneSpec]
    ) -> PlaneBuffers:
        """Blocks in memory that is there already, each plane's from its byte offset on. Keeps `memory` in use."""
        buffers = cls.__new__(cls)
        buffers._keep(_lay_over(memory, offsets, num_blocks, block_size, planes), block_size)
        return buffers

    def _keep(self, tensors: dict[str, Tensor], block_size: int) -> None:
        self._block_size = block_size
        self._tensors = {name: tensor.flatten(0, 1) for name, tensor in tensors.items()}
        self._bytes = [t.view(t.shape[0], -1).view(torch.uint8).numpy() for t in tensors.values()]
        self._flat = [(part.reshape(-1), part.shape[1]) for part in self._bytes]
        self._memory = [_memory_of(tensor) for tensor in tensors.values()]
        self._whole: dict[int, dict[str, Tensor]] = {}  # views of whole blocks that were handed out before

    def place(self, block_id: int, frames: Sequence[memoryview]) -> None:
        """The one copy of the receive side: frames, one per plane, into a block and on into its neighbours."""
        for (flat, block_bytes), frame in zip(self._flat, frames, strict=True):
            start = block_id * block_bytes
            flat[start : start + len(frame)] = np.frombuffer(frame, dtype=np.uint8)

    def rows(self, block_id: int, num_rows: int) -> dict[str, Tensor]:
        """Views [num_rows, *row_shape] from the head of a block on, into its neighbours; valid until they are freed."""
        first = block_id * self._block_size
        if num_rows != self._block_size:
            return {name: tensor[first : first + num_rows] for name, tensor in self._tensors.items()}
        whole = self._whole.get(block_id)
        if whole is None:
            whole = {name: tensor[first : first + num_rows] for name, tensor in self._tensors.items()}
            self._whole[block_id] = whole
        return whole.copy()

    def overlaps(self, rows: Tensor) -> bool:
        """Whether any byte of a contiguous tensor lies in these blocks."""
        if rows.device.type != "cpu" or not rows.numel():
            return False
        memory = _memory_of(rows)
        return any(memory.start < own.stop and own.start < memory.stop for own in self._memory)

    def frames(self, block_id: int, num_rows: int) -> list[memoryview]:
        """The bytes of the first rows of a block, one frame per plane."""
        return [part[block_id, : part.shape[1] // self._block_size * num_rows].data for part in self._bytes]


def _lay_over(
    memory: mmap, offsets: Sequence[int], num_blocks: int, block_size: int, planes: Sequence[PlaneSpec]
) -> dict[str, Tensor]:
    tensors = {}
    for plane, offset in zip(planes, offsets, strict=True):
        shape = (num_blocks, block_size, *plane.row_shape)
        flat = torch.frombuffer(memory, dtype=_DTYPES[plane.dtype], count=math.prod(shape), offset=offset)
        tensors[plane.name] = flat.view(shape)
    return tensors


class RowQueue:
    """Rows written and not yet acknowledged, by reference; gives the frames of any row range among them."""

    def __init__(self, planes: Sequence[PlaneSpec]) -> None:
        self._planes = tuple(planes)
        self._expected = [(plane, _DTYPES[plane.dtype]) for plane in planes]
        self._row_bytes = [plane.row_bytes for plane in planes]
        self._names = {plane.name for plane in planes}
        self._starts: list[int] = []  # first row of each chunk
        self._chunks: list[tuple[int, tuple[memoryview, ...]]] = []  # rows, bytes per plane
        self._num_released = 0  # chunks at the head that are forgotten already
        self.num_rows = 0

    def check(self, planes: Mapping[str, Tensor]) -> tuple[int, tuple[memoryview, ...]]:
        """Number of rows and raw bytes per plane. LocalProtocolError where they do not match the plane specs."""
        if planes.keys() != self._names:
            raise LocalProtocolError(f"planes {sorted(planes)} written, {[p.name for p in self._planes]} opened")
        counts = {tensor.shape[0] for tensor in planes.values() if tensor.dim()}
        if len(counts) != 1:
            raise LocalProtocolError(f"planes must have equal numbers of rows, not {sorted(counts)}")
        for plane, dtype in self._expected:
            rows = planes[plane.name]
            if rows.dtype is not dtype or rows.shape[1:] != plane.row_shape or not rows.dim():
                raise LocalProtocolError(f"rows of {plane_of(plane.name, rows)} written to {plane}")
        return counts.pop(), tuple(tensor_bytes(planes[plane.name]) for plane in self._planes)

    def append(self, num_rows: int, chunk: tuple[memoryview, ...]) -> None:
        """Add what `check` returned."""
        if num_rows:
            self._starts.append(self.num_rows)
            self._chunks.append((num_rows, chunk))
            self.num_rows += num_rows

    def frames(self, first_row: int, num_rows: int) -> list[memoryview]:
        """One frame per plane: a view, or a joined copy where the range lies across two writes."""
        at = bisect.bisect_right(self._starts, first_row, self._num_released) - 1
        if at >= self._num_released:
            low, (count, chunk) = first_row - self._starts[at], self._chunks[at]
            if low + num_rows <= count:
                sizes = zip(self._row_bytes, chunk, strict=True)
                return [data[low * size : (low + num_rows) * size] for size, data in sizes]
        return self._joined(max(at, self._num_released), first_row, first_row + num_rows)

    def num_together(self, first_row: int) -> int:
        """How many rows from `first_row` on were written in one go, and so lie side by side."""
        at = bisect.bisect_right(self._starts, first_row, self._num_released) - 1
        return self._starts[at] + self._chunks[at][0] - first_row if at >= self._num_released else 0

    def _joined(self, at: int, first_row: int, end: int) -> list[memoryview]:
        pieces: list[list[memoryview]] = [[] for _ in self._planes]
        while at < len(self._chunks) and (start := self._starts[at]) < end:
            count, chunk = self._chunks[at]
            low, high = max(first_row, start) - start, min(end, start + count) - start
            for size, data, out in zip(self._row_bytes, chunk, pieces, strict=True):
                out.append(data[low * size : high * size])
            at += 1
        return [memoryview(b"".join(parts)) for parts in pieces]

    def own(self, first_row: int) -> None:
        """Copy what was given by reference at and after `first_row`: its memory belongs to somebody else soon."""
        for at, (count, chunk) in enumerate(self._chunks):
            if self._starts[at] + count > first_row:
                self._chunks[at] = count, tuple(memoryview(bytes(data)) for data in chunk)

    def release(self, before_row: int) -> None:
        """Forget chunks that lie wholly below `before_row`."""
        at, chunks = self._num_released, self._chunks
        while at < len(chunks) and self._starts[at] + chunks[at][0] <= before_row:
            chunks[at] = (0, ())  # the memory goes now, the place in the list with many others
            at += 1
        self._num_released = at
        if at > 64 and 2 * at > len(chunks):
            del chunks[:at], self._starts[:at]
            self._num_released = 0

    def clear(self) -> None:
        """Forget everything."""
        self._starts.clear()
        self._chunks.clear()
        self._num_released = 0
