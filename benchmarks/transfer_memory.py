"""Cold memory for the transfer benchmark: pools larger than any cache, whose blocks are used in shuffled order."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import torch
from numpy.typing import NDArray

ROW_WIDTH = 3584  # elements of a row, bfloat16
POOL_MIB = 256
SOURCE_SEED, TARGET_SEED = 1, 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """block_rows x ROW_WIDTH bfloat16 per block: 917,504 bytes with 128 rows. num_blocks: how many a pool holds."""

    block_rows: int = 128
    num_blocks: int = (POOL_MIB << 20) // (128 * ROW_WIDTH * 2)

    @property
    def block_bytes(self) -> int:
        return self.block_rows * ROW_WIDTH * 2


class Content:
    """What a pool made with `seed` holds, and its shuffled order: either process can know it."""

    def __init__(self, shape: Shape, seed: int) -> None:
        generator = np.random.default_rng(seed)
        self.shape = shape
        self.pattern = generator.integers(0, 256, shape.block_bytes, dtype=np.uint8)
        self.order = [int(i) for i in generator.permutation(shape.num_blocks)]

    def place(self, i: int) -> int:
        """Which block of the pool is the i-th in shuffled order; the order repeats."""
        return self.order[i % self.shape.num_blocks]

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

    def rows(self, i: int) -> torch.Tensor:
        """The same block as [block_rows, ROW_WIDTH] bfloat16."""
        rows = torch.from_numpy(self.block(i)).view(torch.bfloat16)
        return rows.view(self.content.shape.block_rows, ROW_WIDTH)


def memcpy_seconds(source: Pool, target: Pool, first: int, count: int) -> float:
    """One thread copies blocks from shuffled places to shuffled places."""
    pairs = [(target.block(i).data, source.block(i).data) for i in range(first, first + count)]
    started = time.perf_counter()
    for place, origin in pairs:
        place[:] = origin
    return time.perf_counter() - started
