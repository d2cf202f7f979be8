"""StateBatch: which recurrent sequences a packed batch of tokens holds, and where each keeps its state.

Tokens of all sequences lie one after the other; a sequence's state (scan state, convolution tail) has a slot of its
own. Built once per step and shared by all layers, with whatever tables the Triton path derives from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StateBatch:
    """lengths: tokens of each sequence, at least 1; slots: the slot of each, distinct. Raises ValueError otherwise."""

    lengths: Sequence[int]
    slots: Sequence[int]
    _tables: dict[Any, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.slots) or min(self.lengths, default=1) < 1:
            raise ValueError(f"state batch: lengths {list(self.lengths)} for slots {list(self.slots)}")
        if len(set(self.slots)) != len(self.slots) or min(self.slots, default=0) < 0:
            raise ValueError(f"state batch: slots must be distinct and not negative, got {list(self.slots)}")

    def check(self, op: str, num_tokens: int, num_slots: int) -> None:
        """Raise ValueError unless the batch covers just `num_tokens` tokens and `num_slots` slots suffice."""
        if sum(self.lengths) != num_tokens:
            raise ValueError(f"{op}: the sequences have {sum(self.lengths)} tokens, the inputs {num_tokens}")
        if max(self.slots, default=-1) >= num_slots:
            raise ValueError(f"{op}: slot {max(self.slots)} is beyond the {num_slots} there are")

    def spans(self) -> Iterator[tuple[slice, int]]:
        """(tokens, slot) of each sequence."""
        start = 0
        for length, slot in zip(self.lengths, self.slots, strict=True):
            yield slice(start, start + length), slot
            start += length

    def pieces(self, length: int) -> list[tuple[int, int, int, int]]:
        """(first token, tokens, slot, offset of the first token in its sequence) of runs of at most `length`."""
        return [
            (start, min(length, tokens.stop - start), slot, start - tokens.start)
            for tokens, slot in self.spans()
            for start in range(tokens.start, tokens.stop, length)
        ]

    def table(self, key: Any, build: Callable[[], list[tuple[int, ...]]], device: torch.device) -> torch.Tensor:
        """An int32 table of rows, built once per key and device."""
        if (key, device) not in self._tables:
            self._tables[key, device] = torch.tensor(build(), dtype=torch.int32).to(device)
        found: torch.Tensor = self._tables[key, device]
        return found
