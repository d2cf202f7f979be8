"""What a kernel benchmark is: a call, what it has to move or compute, and the peers that do the same job.

A case is built on a device at one of two sizes: `full` for measuring, `tiny` so that tests can run every case on the
CPU. Peers are built only when they are measured (some compile for seconds).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

import torch

Call: TypeAlias = Callable[[], object]
Kind: TypeAlias = Literal["copy", "matmul"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One row of the table. work: bytes that must be read and written (kind `copy`), or floating-point operations
    (kind `matmul`): what the ceiling of that kind bounds. peers: builders by name."""

    name: str
    kind: Kind
    work: float
    call: Call
    peers: Mapping[str, Callable[[], Call]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Where and how large: `full` sizes are those of real models."""

    device: torch.device
    is_tiny: bool = False
    dtype: torch.dtype = torch.bfloat16

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.is_tiny else full

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(self.dtype)

    def index(self, values: range | list[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self.device)

    def shuffled(self, count: int) -> torch.Tensor:
        """A fixed permutation of `count` numbers, int64."""
        return torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(self.device)


def num_bytes(*tensors: torch.Tensor) -> int:
    """Bytes of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def compiled(function: Callable[..., object], *args: object) -> Callable[[], Call]:
    """A peer made by torch.compile."""

    def build() -> Call:
        fast = torch.compile(function, dynamic=False)
        return lambda: fast(*args)

    return build


def called(function: Callable[..., object], *args: object) -> Callable[[], Call]:
    """A peer that is just called."""
    return lambda: lambda: function(*args)
