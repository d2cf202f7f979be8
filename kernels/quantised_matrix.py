"""Matrices of linear layers as 8-bit or 4-bit numbers, quantised row by row as they are read from a checkpoint (or kept
as they are stored there: see `stored_matrix.py`).

A matrix takes the place of a tensor among a loader's destinations: it has a shape, parts of it can be named by a slice
of rows, and full-precision rows are copied into it; `finish` is called once all of them are there. What is held at one
time beyond the numbers is the source and a few rows in float32.

    int8           a scale per row; activations stay as they are
    int8_dynamic   the same numbers; activations are rounded to 8 bits as well, each row by its own largest
    int4           a scale per group of 128 inputs (64 or 32 where these do not divide); activations stay as they are
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, get_args

import torch

from kernels.quantised_linear import (
    GROUP_SIZE,
    SMALLEST_GROUP,
    PackedInt4,
    PackedInt8,
    int4_linear,
    int8_dynamic_linear,
    int8_linear,
    packed_int4_linear,
    packed_int8_dynamic_linear,
    quantise_weight_int4,
    quantise_weight_int8,
    sums_bytes_exactly,
)

Quantization = Literal["none", "int8", "int8_dynamic", "int4"]
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
GROUP_SIZES = (GROUP_SIZE, GROUP_SIZE // 2, SMALLEST_GROUP)  # of 4-bit numbers, the best first
CHUNK_ELEMENTS = 1 << 22  # of a source, in float32 at one time


class QuantisedMatrix(ABC):
    """A weight [out, in] on a device that is no plain tensor. dtype: of the activations that it will meet."""

    def __init__(self, out: int, inputs: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (out, inputs)
        self.dtype = dtype
        self.device = device

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self, range(self.shape[0])[rows])

    def copy_(self, weight: torch.Tensor) -> None:
        """Take the whole of it."""
        self.fill(0, weight)

    @abstractmethod
    def fill(self, first: int, weight: torch.Tensor) -> None:
        """Take rows [n, in] of any floating dtype and device as rows first..first+n."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """What it holds."""

    @abstractmethod
    def finish(self) -> QuantisedMatrix | torch.Tensor:
        """All rows are there: the matrix in the form that is read fastest, most often this one."""

    @abstractmethod
    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x @ matrix.T + bias`, of x's dtype."""


class Rows:
    """A range of a matrix's rows, to be filled."""

    __slots__ = ("_matrix", "_rows")

    def __init__(self, matrix: QuantisedMatrix, rows: range) -> None:
        self._matrix = matrix
        self._rows = rows

    @property
    def shape(self) -> tuple[int, int]:
        return len(self._rows), self._matrix.shape[1]

    def copy_(self, weight: torch.Tensor) -> None:
        self._matrix.fill(self._rows.start, weight)


class RoundedMatrix(QuantisedMatrix):
    """Numbers and their scales, made from full precision."""

    def fill(self, first: int, weight: torch.Tensor) -> None:
        step = max(1, CHUNK_ELEMENTS // self.shape[1])
        for start in range(0, weight.shape[0], step):
            chunk = weight[start : start + step].to(self.device, torch.float32)
            self._store(slice(first + start, first + start + chunk.shape[0]), chunk)

    @abstractmethod
    def _store(self, rows: slice, weight: torch.Tensor) -> None:
        """Quantise float32 rows into place."""


class Int8Matrix(RoundedMatrix):
    """One scale per row."""

    def __init__(self, out: int, inputs: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(out, inputs, dtype=dtype, device=device)
        self.numbers = torch.empty((out, inputs), dtype=torch.int8, device=device)
        self.scales = torch.empty(out, dtype=torch.float32, device=device)

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * (self.shape[1] + 4)

    def _store(self, rows: slice, weight: torch.Tensor) -> None:
        self.numbers[rows], self.scales[rows] = quantise_weight_int8(weight)

    def finish(self) -> QuantisedMatrix:
        return self

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return int8_linear(x, self.numbers, self.scales, bias)


class Int8DynamicMatrix(Int8Matrix):
    """The same numbers, for activations of 8 bits. Raises ValueError on processors that cannot add them up."""

    def __init__(self, out: int, inputs: int, *, dtype: torch.dtype, device: torch.device) -> None:
        if device.type == "cpu" and not sums_bytes_exactly():
            raise ValueError(
                "this processor adds 8-bit products up in 16 bits (it has no VNNI), which overflow; use 'int8'"
            )
        super().__init__(out, inputs, dtype=dtype, device=device)
        self.packed: PackedInt8 | None = None

    def finish(self) -> QuantisedMatrix:
        if PackedInt8.is_served(self.device):
            self.packed = PackedInt8.of(self.numbers, self.scales)
            self.numbers = self.numbers[:0]
        return self

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.packed is not None:
            return packed_int8_dynamic_linear(x, self.packed, bias)
        return int8_dynamic_linear(x, self.numbers, self.scales, bias)


class Int4Matrix(RoundedMatrix):
    """One scale per group of inputs. Raises ValueError where no group divides them."""

    def __init__(self, out: int, inputs: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(out, inputs, dtype=dtype, device=device)
        size = next((s for s in GROUP_SIZES if inputs % s == 0), 0)
        if not size:
            raise ValueError(f"a matrix of {inputs} inputs has no groups of {SMALLEST_GROUP}: 4 bits are not served")
        self.group_size = size
        self.numbers = torch.empty((out, inputs // 2), dtype=torch.uint8, device=device)
        self.scales = torch.empty((out, inputs // size), dtype=torch.float32, device=device)
        self.packed: PackedInt4 | None = None

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * (self.shape[1] // 2 + 4 * self.shape[1] // self.group_size)

    def _store(self, rows: slice, weight: torch.Tensor) -> None:
        self.numbers[rows], self.scales[rows] = quantise_weight_int4(weight, self.group_size)

    def finish(self) -> QuantisedMatrix:
        if PackedInt4.is_served(self.shape[0], self.dtype, self.device):
            self.packed = PackedInt4.of(self.numbers, self.scales, self.dtype)
            self.numbers, self.scales = self.numbers[:0], self.scales[:0]
        return self

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.packed is not None:
            return packed_int4_linear(x, self.packed, bias)
        return int4_linear(x, self.numbers, self.scales, bias)


_KINDS: dict[str, Callable[..., QuantisedMatrix]] = {
    "int8": Int8Matrix,
    "int8_dynamic": Int8DynamicMatrix,
    "int4": Int4Matrix,
}


def new_matrix(
    method: Quantization, out: int, inputs: int, *, dtype: torch.dtype, device: torch.device
) -> torch.Tensor | QuantisedMatrix:
    """An empty weight [out, inputs] in the format that `method` names. Raises ValueError where it cannot be had."""
    if method == "none":
        return torch.empty((out, inputs), dtype=dtype, device=device)
    return _KINDS[method](out, inputs, dtype=dtype, device=device)
