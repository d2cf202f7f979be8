"""A matrix whose rows come as a checkpoint stores them: whole numbers of 4 or 8 bits, (number - zero) * scale.

It is kept so, bit by bit, wherever 4-bit products can read it:

    4 bits   as they are; groups of any size are cut into smaller ones, with the same scale and zero each
    8 bits   as two matrices of 4 bits side by side, 16 * (high - its zero) and (low - its zero), read with x twice
    inputs   whose groups lie apart are put in the order of their groups, and x with them

What cannot be read so (rows of one fused matrix in different orders, rows in full precision among them, groups of odd
sizes) is widened to the dtype of the activations, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from kernels.quantised_linear import int4_linear, pack_int4, unpack_int4
from kernels.quantised_matrix import GROUP_SIZES, QuantisedMatrix, Rows


class Grouped(Protocol):
    """Rows as they are stored: numbers [n, in] and zeros [n, G] uint8, scales [n, G] float32, groups [in] int64: each
    input's."""

    @property
    def bits(self) -> int: ...
    @property
    def numbers(self) -> torch.Tensor: ...
    @property
    def scales(self) -> torch.Tensor: ...
    @property
    def zeros(self) -> torch.Tensor: ...
    @property
    def groups(self) -> torch.Tensor: ...

    def dequantised(self) -> torch.Tensor:
        """All of it in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _PackedRows:
    """As `int4_linear` reads them. places: which inputs it is given (int64), None for all in order."""

    numbers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    places: torch.Tensor | None

    @classmethod
    def of(cls, rows: Grouped, device: torch.device) -> _PackedRows | None:
        """None where the groups cannot be had."""
        order, size = None, _group_size(rows.groups)
        if not size:
            order = torch.argsort(rows.groups, stable=True)
            size = _group_size(rows.groups[order])
        if not size:
            return None
        numbers, groups = rows.numbers, rows.groups
        if order is not None:
            numbers, groups = numbers[:, order], groups[order]
        of_cut = groups[::size]
        scales, zeros = rows.scales[:, of_cut], rows.zeros[:, of_cut]
        if rows.bits == 8:
            order = torch.arange(len(groups)) if order is None else order
            order = torch.cat((order, order))
            numbers, scales = torch.cat((numbers >> 4, numbers & 15), 1), torch.cat((16 * scales, scales), 1)
            zeros = torch.cat((zeros >> 4, zeros & 15), 1)
        packed = pack_int4(numbers, size)
        return cls(
            numbers=packed.to(device),
            scales=scales.to(device, copy=True),
            zeros=zeros.to(device, copy=True),
            places=None if order is None else order.to(device),
        )

    def is_beside(self, other: _PackedRows) -> bool:
        """Whether both can be rows of one matrix."""
        if self.scales.shape[1] != other.scales.shape[1] or (self.places is None) != (other.places is None):
            return False
        return self.places is None or other.places is None or torch.equal(self.places, other.places)

    def widened(self, inputs: int, dtype: torch.dtype) -> torch.Tensor:
        weight = unpack_int4(self.numbers, self.scales, torch.float32, self.zeros)
        if self.places is not None:
            whole = weight.new_zeros(len(weight), inputs)
            weight = whole.index_add_(1, self.places, weight)
        return weight.to(dtype)


class StoredMatrix(QuantisedMatrix):
    """See the module. numbers, scales, zeros: as `int4_linear` reads them, once it is finished; places: which of its
    inputs are read (None: all in order). zeros: None where all are 8. num_parts: how many sources it was put together
    from."""

    def __init__(self, out: int, inputs: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(out, inputs, dtype=dtype, device=device)
        self._pieces: dict[int, _PackedRows | torch.Tensor] = {}  # by their first row
        self.numbers = torch.empty(0, dtype=torch.uint8)
        self.scales = torch.empty(0)
        self.zeros: torch.Tensor | None = None
        self.places: torch.Tensor | None = None
        self.num_parts = 0

    def __getitem__(self, rows: slice) -> _StoredRows:
        return _StoredRows(self, range(self.shape[0])[rows])

    @property
    def num_bytes(self) -> int:
        held = (self.numbers, self.scales, self.zeros, self.places)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def fill(self, first: int, weight: torch.Tensor) -> None:
        self._pieces[first] = weight.to(self.device, self.dtype, copy=True)

    def take_groups(self, rows: Grouped) -> None:
        """The whole of it."""
        self.put(0, rows)

    def put(self, first: int, rows: Grouped) -> None:
        """Take stored rows as rows from `first` on."""
        packed = _PackedRows.of(rows, self.device)
        self._pieces[first] = rows.dequantised().to(self.device, self.dtype) if packed is None else packed

    def finish(self) -> QuantisedMatrix | torch.Tensor:
        """Itself, or a plain tensor."""
        pieces = [piece for _, piece in sorted(self._pieces.items())]
        self._pieces = {}
        packed = [piece for piece in pieces if isinstance(piece, _PackedRows)]
        if len(packed) < len(pieces) or not all(packed[0].is_beside(other) for other in packed[1:]):
            inputs = self.shape[1]
            wide = [p if isinstance(p, torch.Tensor) else p.widened(inputs, self.dtype) for p in pieces]
            return wide[0] if len(wide) == 1 else torch.cat(wide)
        self.numbers = torch.cat([piece.numbers for piece in packed])
        self.scales = torch.cat([piece.scales for piece in packed])
        zeros = torch.cat([piece.zeros for piece in packed])
        self.zeros = None if bool((zeros == 8).all()) else zeros
        self.places, self.num_parts = packed[0].places, len(packed)
        return self

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        read = x if self.places is None else x.index_select(-1, self.places)
        return int4_linear(read, self.numbers, self.scales, bias, self.zeros)


class _StoredRows(Rows):
    """A range of such a matrix's rows."""

    __slots__ = ("_put",)

    def __init__(self, matrix: StoredMatrix, rows: range) -> None:
        super().__init__(matrix, rows)
        self._put = partial(matrix.put, rows.start)

    def take_groups(self, rows: Grouped) -> None:
        """Instead of `copy_`: they stay as they are stored."""
        self._put(rows)


def _group_size(groups: torch.Tensor) -> int:
    """The largest of the sizes into which inputs of these groups can be cut in order, each within a group; 0 for
    none."""
    for size in GROUP_SIZES:
        if len(groups) % size == 0:
            cut = groups.view(-1, size)
            if bool((cut == cut[:, :1]).all()):
                return size
    return 0
