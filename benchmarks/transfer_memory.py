"""Cold memory for the transfer benchmark: pools larger than any cache, whose items are used in shuffled order.

An item is what an encoder writes at once: ITEM_BLOCKS blocks that lie together (1024 rows with blocks of 128).
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import torch
from numpy.typing import NDArray

ROW_WIDTH = 3584  # elements of a row, bfloat16
ITEM_BLOCKS = 8
POOL_MIB = 256
SOURCE_SEED, TARGET_SEED = 1, 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """block_rows x ROW_WIDTH bfloat16 per block: 917,504 bytes with 128 rows. num_items: how many a pool holds."""

    block_rows: int = 128
    num_items: int = -(-(POOL_MIB << 20) // (128 * ROW_WIDTH * 2 * ITEM_BLOCKS))

    @property
    def num_blocks(self) -> int:
        return self.num_items * ITEM_BLOCKS

    @property
    def block_bytes(self) -> int:
        return self.block_rows * ROW_WIDTH * 2


class Content:
    """What a pool made with `seed` holds, and its shuffled order: either process can know it."""

    def __init__(self, shape: Shape, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.shape = shape
        self.pattern = generator.integers(0, 256, shape.block_bytes, dtype=np.uint8)
        self._items = [int(i) for i in generator.permutation(shape.num_items)]

    def place(self, i: int) -> int:
        """Which block of the pool is the i-th in shuffled order; the order repeats."""
        item, block = divmod(i, ITEM_BLOCKS)
        return self._items[item % self.shape.num_items] * ITEM_BLOCKS + block

    def matches(self, i: int, block: NDArray[np.uint8]) -> bool:
        """Whether `block` has the bytes of the i-th block: its place, then the pattern."""
        place = int(block[:8].view(np.int64)[0])
        return place == self.place(i) and bool(np.array_equal(block[8:], self.pattern[8:]))


class Pool:
    """num_blocks blocks of memory, written once so that their pages are there."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.content = Content(shape, seed)
        self._blocks: NDArray[np.uint8] = np.empty((shape.num_blocks, shape.block_bytes), dtype=np.uint8)
        self._blocks[:] = self.content.pattern
        self._blocks[:, :8] = np.arange(shape.num_blocks, dtype=np.int64).view(np.uint8).reshape(-1, 8)

    def block(self, i: int) -> NDArray[np.uint8]:
        """The i-th block in shuffled order."""
        return self._blocks[self.content.place(i)]

    def rows(self, i: int, count: int) -> torch.Tensor:
        """`count` blocks of one item from the i-th on, as [count * block_rows, ROW_WIDTH] bfloat16."""
        place = self.content.place(i)
        assert i % ITEM_BLOCKS + count <= ITEM_BLOCKS
        rows = torch.from_numpy(self._blocks[place : place + count].reshape(-1)).view(torch.bfloat16)
        return rows.view(count * self.content.shape.block_rows, ROW_WIDTH)


def memcpy_seconds(source: Pool, target: Pool, first: int, count: int) -> float:
    """One thread copies blocks from shuffled places to shuffled places."""
    pairs = [(target.block(i).data, source.block(i).data) for i in range(first, first + count)]
    started = time.perf_counter()
    for place, origin in pairs:
        place[:] = origin
    return time.perf_counter() - started
