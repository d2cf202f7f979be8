"""Affine and Norm: a linear layer and a layer norm with their weights, for families whose layers have many small ones.

Built empty; what fills them finds their tensors by name.
"""

from __future__ import annotations

import torch

from kernels.linear import linear
from kernels.norm import layer_norm


class Affine:
    """`x @ weight.T + bias`: weight [rows, columns], bias [rows] or None."""

    __slots__ = ("bias", "weight")

    def __init__(
        self, rows: int, columns: int, *, has_bias: bool = True, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.weight = torch.empty((rows, columns), dtype=dtype, device=device)
        self.bias = torch.empty(rows, dtype=dtype, device=device) if has_bias else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, columns] -> [T, rows]."""
        return linear(x, self.weight, self.bias)

    def parameters(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors to fill, by name."""
        named = {f"{name}.weight": self.weight}
        return named if self.bias is None else {**named, f"{name}.bias": self.bias}


class Norm:
    """Layer norm over the last dimension."""

    __slots__ = ("bias", "eps", "weight")

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.empty(size, dtype=dtype, device=device)
        self.bias = torch.empty(size, dtype=dtype, device=device)
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def parameters(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors to fill, by name."""
        return {f"{name}.weight": self.weight, f"{name}.bias": self.bias}
