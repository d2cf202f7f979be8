"""A receive pool under watch: who owns which block, poison in every free one, and nothing written but what belongs.

WatchedPool and WatchedBuffers do what their parents do and tell the `BlockWatch`, which keeps its own account. Shared
memory is watched alike, in `segments`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

from transfer.block_pool import Allocation, BlockPool
from transfer.memory.buffers import PlaneBuffers, Tensor, tensor_bytes
from transfer.tensors import PlaneSpec

POISON = 0xA5

Complain: TypeAlias = Callable[[str, str | None, str], None]
Noted: TypeAlias = Callable[[str, int], None]


class Contents(Protocol):
    """Whoever can tell what blocks hold."""

    def content(self, block_id: int, num_rows: int) -> list[bytes]: ...
    def is_poisoned(self, block_id: int) -> bool: ...


class BlockWatch:
    """The account of one pool of `num_blocks`: block id -> stream.

    `complain(promise, stream_id, text)` is told of every breach, `on_placed` and `on_gave` (stream_id, block_id) of
    every block written and given back.
    """

    def __init__(self, num_blocks: int, complain: Complain, on_placed: Noted, on_gave: Noted) -> None:
        self.num_blocks = num_blocks
        self.owners: dict[int, str] = {}
        self.writing: tuple[str, int] | None = None  # stream and block id of the Block being handled
        self._complain = complain
        self._on_placed = on_placed
        self._on_gave = on_gave
        self.buffers: Contents | None = None
        self.touch: Callable[[], None] = lambda: None  # called before every step that the account would show

    @property
    def num_free(self) -> int:
        """Blocks that can be granted."""
        return self.num_blocks - len(self.owners)

    def num_held(self) -> Counter[str]:
        """Blocks by owner."""
        return Counter(self.owners.values())

    def took(self, stream_id: str, block_ids: Sequence[int]) -> None:
        """The pool gave these blocks to a stream."""
        for block_id in block_ids:
            owner = self.owners.get(block_id)
            if owner is not None:
                self._complain("4: no block has two owners", stream_id, f"block {block_id} still belongs to {owner}")
            self.owners[block_id] = stream_id

    def gave(self, stream_id: str, block_ids: Sequence[int]) -> None:
        """A stream gave these blocks back."""
        for block_id in block_ids:
            owner = self.owners.pop(block_id, None)
            if owner != stream_id:
                self._complain(
                    "4: no block has two owners", stream_id, f"it freed block {block_id}, which {owner} owns"
                )
            self._on_gave(stream_id, block_id)

    def placing(self, block_id: int, *, is_verified: bool) -> None:
        """Somebody writes into a block, what was found right or what is only being looked at."""
        owner = self.owners.get(block_id)
        if owner is None:
            self._complain("4: a freed block is never written", None, f"block {block_id} was written while it was free")
        elif self.writing != (owner, block_id):
            self._complain(
                "4: a block is its owner's alone", owner, f"its block {block_id} was written for {self.writing}"
            )
        elif is_verified:
            self._on_placed(owner, block_id)


class WatchedPool(BlockPool):
    """A BlockPool whose every step the watch sees."""

    def __init__(self, num_blocks: int, block_size: int, watch: BlockWatch, poison: Callable[[int], None]) -> None:
        super().__init__(num_blocks, block_size)
        self._watch = watch
        self._poison = poison

    def allocate(self, num_tokens: int, owner: str) -> Allocation:
        self._watch.touch()
        allocation = super().allocate(num_tokens, owner)
        self._watch.took(owner, allocation.block_ids)
        return allocation

    def free(self, allocation: Allocation) -> None:
        super().free(allocation)
        self._gone(allocation.owner, allocation.block_ids)

    def free_blocks(self, owner: str, block_ids: Sequence[int]) -> None:
        self._watch.touch()
        super().free_blocks(owner, block_ids)
        self._gone(owner, block_ids)

    def free_owner(self, owner: str) -> int:
        held = [block_id for block_id, holder in self._watch.owners.items() if holder == owner]
        num_blocks = super().free_owner(owner)
        self._gone(owner, held)
        return num_blocks

    def _gone(self, owner: str, block_ids: Sequence[int]) -> None:
        self._watch.gave(owner, block_ids)
        for block_id in block_ids:
            self._poison(block_id)


class WatchedBuffers(PlaneBuffers):
    """PlaneBuffers that know poison."""

    def __init__(self, num_blocks: int, block_size: int, planes: Sequence[PlaneSpec], watch: BlockWatch) -> None:
        super().__init__(num_blocks, block_size, planes)
        self._watch = watch
        self._block_size = block_size
        for block_id in range(num_blocks):
            self.poison(block_id)

    def place(self, block_id: int, frames: Sequence[memoryview]) -> None:
        self._watch.touch()
        self._watch.placing(block_id, is_verified=True)
        super().place(block_id, frames)

    def frames(self, block_id: int, num_rows: int) -> list[memoryview]:
        """As the parent's; whoever asks for writable views is going to write."""
        self._watch.touch()
        self._watch.placing(block_id, is_verified=False)
        return super().frames(block_id, num_rows)

    def content(self, block_id: int, num_rows: int) -> list[bytes]:
        """What a block holds, for reading only."""
        return [bytes(tensor_bytes(tensor)) for tensor in self.rows(block_id, num_rows).values()]

    def poison(self, block_id: int) -> None:
        """Fill a block with bytes that nobody sends."""
        for data in self._views(block_id):
            data[:] = bytes([POISON]) * len(data)

    def is_poisoned(self, block_id: int) -> bool:
        """Whether nobody wrote into a block since `poison`."""
        return all(bytes(data) == bytes([POISON]) * len(data) for data in self._views(block_id))

    def _views(self, block_id: int) -> list[memoryview]:
        rows: Mapping[str, Tensor] = self.rows(block_id, self._block_size)
        return [tensor_bytes(tensor) for tensor in rows.values()]
