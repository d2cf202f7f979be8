"""Which keys a query may see, as one small value that both paths of the attention ops understand."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AttentionMask:
    """A query at position p sees key j of its sequence when both rules allow it.

    block_length  1: j <= p (causal); n > 1: j // n <= p // n (block-causal); 0: every key (bidirectional)
    window        0: no limit; w > 0: |p - j| < w (sliding)
    Raises ValueError for negative numbers.
    """

    block_length: int = 1
    window: int = 0

    def __post_init__(self) -> None:
        if self.block_length < 0 or self.window < 0:
            raise ValueError(f"attention mask: {self} holds a negative number")

    def visible(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Bool [Q, K] for positions queries [Q] and keys [K] of one sequence."""
        p, j = queries[:, None], keys[None, :]
        seen = torch.ones(p.shape[0], j.shape[1], dtype=torch.bool, device=queries.device)
        if self.block_length:
            seen &= j // self.block_length <= p // self.block_length
        if self.window:
            seen &= (p - j).abs() < self.window
        return seen


CAUSAL = AttentionMask()
BIDIRECTIONAL = AttentionMask(block_length=0)
