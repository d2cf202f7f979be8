"""Content: the rows one producer sends, as bytes that nobody else sends. The only file here that knows tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from transfer.memory.buffers import tensor_bytes
from transfer.tensors import PlaneSpec

_DTYPES = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32,
    "int8": torch.int8, "int32": torch.int32, "int64": torch.int64,
}  # fmt: skip
DTYPES = tuple(_DTYPES)


class Content:
    """`num_rows` rows of `planes`, drawn from `seed`; equal keys have equal rows."""

    def __init__(self, key: str, planes: Sequence[PlaneSpec], num_rows: int, seed: str) -> None:
        self.key = key
        self.num_rows = num_rows
        self._planes = tuple(planes)
        source = random.Random(seed)
        self._bytes = {plane.name: source.randbytes(num_rows * plane.row_bytes) for plane in self._planes}
        self._tensors = {plane.name: _tensor(plane, num_rows, self._bytes[plane.name]) for plane in self._planes}

    def tensors(self, first_row: int, num_rows: int) -> dict[str, Tensor]:
        """Rows as a producer writes them."""
        return {name: tensor[first_row : first_row + num_rows] for name, tensor in self._tensors.items()}

    def put(self, first_row: int, planes: Mapping[str, Tensor]) -> None:
        """Compute rows where a producer was told to."""
        for name, rows in planes.items():
            rows.copy_(self._tensors[name][first_row : first_row + len(rows)])

    def frames(self, first_row: int, num_rows: int) -> list[bytes]:
        """The bytes of these rows, one piece per plane."""
        end = first_row + num_rows
        return [self._bytes[p.name][first_row * p.row_bytes : end * p.row_bytes] for p in self._planes]

    def difference(self, first_row: int, planes: Mapping[str, Tensor]) -> str | None:
        """What is wrong with rows that were handed to a consumer as rows `first_row` ..., or None."""
        if list(planes) != [plane.name for plane in self._planes]:
            return f"the planes are {list(planes)}"
        num_rows = len(next(iter(planes.values())))
        for (name, rows), expected in zip(planes.items(), self.frames(first_row, num_rows), strict=True):
            if bytes(tensor_bytes(rows)) != expected:
                return f"plane {name!r} differs in rows {first_row} to {first_row + num_rows - 1}"
        return None

    def holds(self, planes: Mapping[str, Tensor]) -> bool:
        """Whether these rows are some rows of this content, in any place."""
        return all(bytes(tensor_bytes(rows)) in self._bytes[name] for name, rows in planes.items())


def _tensor(plane: PlaneSpec, num_rows: int, data: bytes) -> Tensor:
    shape = (num_rows, *plane.row_shape)
    if not math.prod(shape):
        return torch.empty(shape, dtype=_DTYPES[plane.dtype])
    return torch.frombuffer(bytearray(data), dtype=_DTYPES[plane.dtype]).view(shape)
