"""StateStore: the tensors behind the slots of recurrent state. Knows sizes, not who owns which slot.

A sequence's state leaves and enters as named tensors [num_layers, *shape], in host memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from language_worker.kv_cache import mapped_zeros
from language_worker.models.base import StateSpec


class StateStore:
    """Per layer the tensors of `spec`, each [num_slots, *shape], contiguous."""

    def __init__(self, spec: StateSpec, *, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self._names = tuple(tensor.name for tensor in spec.tensors)
        self.layers: list[tuple[torch.Tensor, ...]] = [
            tuple(mapped_zeros((num_slots, *t.shape), t.dtype or dtype, device) for t in spec.tensors)
            for _ in range(spec.num_layers)
        ]

    @classmethod
    def of(
        cls, spec: StateSpec | None, *, num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> StateStore | None:
        """For a model with this spec; None where it keeps no state."""
        return None if spec is None else cls(spec, num_slots=num_slots, dtype=dtype, device=device)

    def clear(self, slots: Sequence[int]) -> None:
        """Zeros at these slots."""
        targets = self._on_device(slots)
        for tensor in (tensor for layer in self.layers for tensor in layer):
            tensor.index_fill_(0, targets, 0)

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy (source, target) slots; all sources are read before any target is written."""
        sources, targets = (self._on_device([pair[i] for pair in copies]) for i in (0, 1))
        for tensor in (tensor for layer in self.layers for tensor in layer):
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))

    def read(self, slot: int) -> dict[str, torch.Tensor]:
        """The state at a slot, copied."""
        return {
            name: torch.stack([layer[i][slot] for layer in self.layers]).cpu() for i, name in enumerate(self._names)
        }

    def write(self, slot: int, state: Mapping[str, torch.Tensor]) -> None:
        """What `read` gave, to a slot."""
        for i, name in enumerate(self._names):
            for layer, values in zip(self.layers, state[name], strict=True):
                layer[i][slot].copy_(values)

    def _on_device(self, slots: Sequence[int]) -> torch.Tensor:
        return torch.tensor(slots, dtype=torch.int64).to(self.layers[0][0].device)
