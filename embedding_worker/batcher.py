"""Which images are encoded together: pure bookkeeping under a patch budget, no tensors and no clock."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class PatchBatcher(Generic[Key]):
    """Waiting items in order of arrival, handed out in batches of at most `budget` patches.

    The oldest item is in every batch, so nobody starves; younger ones that still fit ride along. An item that exceeds
    the budget goes alone.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._waiting: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def num_patches(self) -> int:
        """Patches of all waiting items."""
        return sum(self._waiting.values())

    def add(self, key: Key, num_patches: int) -> None:
        """Queue an item. Raises ValueError when it waits already or has no patches."""
        if key in self._waiting or num_patches <= 0:
            raise ValueError(f"item {key!r} with {num_patches} patches waits already or is empty")
        self._waiting[key] = num_patches

    def next_batch(self) -> tuple[Key, ...]:
        """Take the next batch out, in order of arrival; empty when nothing waits."""
        batch: list[Key] = []
        left = self._budget
        for key, num_patches in self._waiting.items():
            if not batch or num_patches <= left:
                batch.append(key)
                left -= num_patches
            if left <= 0:
                break
        for key in batch:
            del self._waiting[key]
        return tuple(batch)
