"""BlockPool: which blocks are free, who holds the others, and since which allocation.

Owns block ids only; the bytes live in `buffers`. Every call is all or nothing. Thread-safe.
A block id means something only together with the generation of the allocation it came from: a freed and
re-allocated id belongs to its new holder, and freeing it through the old Allocation is a typed error.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from transfer.errors import DoubleFree, ForeignOwner, PoolExhausted


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """Whole blocks held by one owner: `allocated_tokens == len(block_ids) * block_size`, always."""

    block_ids: tuple[int, ...]
    allocated_tokens: int
    owner: str
    generation: int


class BlockPool:
    """`num_blocks` blocks of `block_size` rows. ValueError unless both are positive ints."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if type(value) is not int or value <= 0:
                raise ValueError(f"{name} must be a positive int, not {value!r}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the block freed last is warm in cache
        self._holder: list[tuple[str, int] | None] = [None] * num_blocks  # (owner, generation)
        self._held: dict[str, int] = {}
        self._generation = 0
        self._lock = threading.Lock()

    def allocate(self, num_tokens: int, owner: str) -> Allocation:
        """Blocks for `num_tokens` rows, rounded up to whole blocks.

        Raises ValueError when num_tokens <= 0, PoolExhausted (and takes nothing) when too few blocks are free.
        """
        if type(num_tokens) is not int or num_tokens <= 0:
            raise ValueError(f"num_tokens must be a positive int, not {num_tokens!r}")
        count = -(-num_tokens // self.block_size)
        with self._lock:
            if count > len(self._free):
                raise PoolExhausted(
                    f"{num_tokens} tokens need {count} blocks of {self.block_size}, only {len(self._free)} of "
                    f"{self.num_blocks} are free: wait for a free, or enlarge pool_tokens"
                )
            self._generation += 1
            block_ids = tuple(self._free.pop() for _ in range(count))
            for block_id in block_ids:
                self._holder[block_id] = (owner, self._generation)
            self._held[owner] = self._held.get(owner, 0) + count
            return Allocation(
                block_ids=block_ids,
                allocated_tokens=count * self.block_size,
                owner=owner,
                generation=self._generation,
            )

    def free(self, allocation: Allocation) -> None:
        """Return every block of `allocation`.

        Raises DoubleFree when any of them was returned already (even if its owner holds it again through a later
        allocation), ForeignOwner when any now belongs to someone else; then nothing is freed.
        """
        self._release(allocation.owner, allocation.block_ids, allocation.generation)

    def free_blocks(self, owner: str, block_ids: Sequence[int]) -> None:
        """Return some of `owner`'s blocks, whatever allocations they came from. Raises like `free`."""
        self._release(owner, block_ids, None)

    def free_owner(self, owner: str) -> int:
        """Return everything `owner` holds; how many blocks that was (0 is fine)."""
        held = self.held_by(owner)
        self._release(owner, held, None)
        return len(held)

    def held_by(self, owner: str) -> list[int]:
        """The blocks that `owner` holds; looks at the whole pool."""
        return [i for i, holder in enumerate(self._holder) if holder is not None and holder[0] == owner]

    def _release(self, owner: str, block_ids: Sequence[int], generation: int | None) -> None:
        with self._lock:
            for block_id in block_ids:
                self._check(block_id, owner, generation)
            if len(block_ids) > 1 and len(set(block_ids)) != len(block_ids):
                raise DoubleFree(f"{owner!r} frees a block twice in one call: {list(block_ids)}")
            for block_id in reversed(block_ids):
                self._holder[block_id] = None
                self._free.append(block_id)
            left = self._held.get(owner, 0) - len(block_ids)
            if left > 0:
                self._held[owner] = left
            else:
                self._held.pop(owner, None)

    def _check(self, block_id: int, owner: str, generation: int | None) -> None:
        if not 0 <= block_id < self.num_blocks:
            raise ForeignOwner(f"{owner!r} frees block {block_id}, but the pool has blocks 0 to {self.num_blocks - 1}")
        holder = self._holder[block_id]
        if holder is None:
            raise DoubleFree(f"{owner!r} frees block {block_id}, which is free already")
        if holder[0] != owner:
            raise ForeignOwner(f"{owner!r} frees block {block_id}, which belongs to {holder[0]!r}")
        if generation is not None and holder[1] != generation:
            raise DoubleFree(
                f"{owner!r} frees block {block_id} of allocation {generation}, which was freed; "
                f"it is now held through allocation {holder[1]}"
            )

    def in_use_by(self, owner: str) -> int:
        """Blocks that `owner` holds."""
        return self._held.get(owner, 0)

    @property
    def num_free(self) -> int:
        """Blocks nobody holds."""
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        """Blocks somebody holds."""
        return self.num_blocks - len(self._free)


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, length) of the runs of consecutive integers in `numbers`, in their order."""
    if not numbers:
        return []
    first = end = numbers[0]
    if tuple(numbers) == tuple(range(first, first + len(numbers))):  # mostly they are one run
        return [(first, len(numbers))]
    found: list[tuple[int, int]] = []
    for number in numbers:
        if number != end:
            found.append((first, end - first))
            first = number
        end = number + 1
    return [*found, (first, end - first)]
