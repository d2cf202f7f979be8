"""The matrices of a layer: which of them are quantised, and the form in which they are read fastest.

A layer's parts name their large matrices; everything else they hold (norms, biases) stays as the checkpoint has it.
Called twice while a model loads: `quantise` before its tensors are filled, `finish` after.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch

from kernels.halved_matrix import halved
from kernels.quantised_matrix import QuantisedMatrix, Quantization, new_matrix
from kernels.stored_matrix import StoredMatrix

Storage: TypeAlias = Quantization | Literal["stored"]  # "stored": as the checkpoint has them quantised


def quantise(owner: Any, matrices: tuple[str, ...], method: Storage, device: torch.device) -> None:
    """Matrices of the format that `method` names in place of the owner's slots, everything on `device`.

    Raises ValueError where the format cannot hold them.
    """
    for name in owner.__slots__:
        held = getattr(owner, name)
        if name in matrices:
            out, inputs = held.shape
            if method == "stored":
                setattr(owner, name, StoredMatrix(out, inputs, dtype=held.dtype, device=device))
            else:
                setattr(owner, name, new_matrix(method, out, inputs, dtype=held.dtype, device=device))
        elif isinstance(held, torch.Tensor):
            setattr(owner, name, held.to(device))


def finish(owner: Any, matrices: tuple[str, ...]) -> None:
    """They are filled: bring them into the form that is read fastest."""
    for name in matrices:
        matrix = getattr(owner, name)
        if isinstance(matrix, QuantisedMatrix):
            matrix = matrix.finish()
        setattr(owner, name, halved(matrix) if isinstance(matrix, torch.Tensor) else matrix)
