"""SegmentBook: which slots of a segment are free, granted or fenced, and whether the segment may still be used.

Pure; knows slot numbers and owners, not memory. A slot is *granted* to a stream until its rows were handed on (its
writer sealed it, and so gave it away) or its writer said that it will not write it. When a stream ends without that,
its slots are *fenced*: its writer may still write them, so nobody gets them. They come free when the writer says that
it let go; if it is lost instead, the segment is *abandoned*: nothing of it is granted ever again.
"""

from __future__ import annotations

from collections.abc import Sequence

from transfer.block_pool import Allocation, BlockPool
from transfer.errors import DoubleFree, ForeignOwner, PoolExhausted


class SegmentBook:
    """Slots 0 to num_slots - 1 of one segment. Every call is all or nothing."""

    def __init__(self, num_slots: int, block_size: int) -> None:
        self._pool = BlockPool(num_slots, block_size)
        self._granted: dict[str, set[int]] = {}
        self._fenced: dict[str, tuple[int, ...]] = {}
        self._owner_of: dict[int, str] = {}  # of every fenced slot: whose it is in the pool
        self._is_abandoned = False

    def allocate(self, num_tokens: int, owner: str) -> Allocation:
        """Slots for `num_tokens` rows. Raises PoolExhausted when too few are free, or the segment is abandoned."""
        if self._is_abandoned:
            raise PoolExhausted("the segment is abandoned: a sender that was lost may still write it")
        allocation = self._pool.allocate(num_tokens, owner)
        self._granted.setdefault(owner, set()).update(allocation.block_ids)
        return allocation

    def free_blocks(self, owner: str, block_ids: Sequence[int]) -> None:
        """Slots whose writer gave them away, sealed or unused. ForeignOwner or DoubleFree as for any pool.

        A fenced slot is nobody's to free but through `release`.
        """
        granted = self._granted_to(owner, block_ids)
        self._pool.free_blocks(owner, block_ids)
        granted.difference_update(block_ids)
        if not granted:
            self._granted.pop(owner, None)

    def fence(self, owner: str, block_ids: Sequence[int], writer: str) -> None:
        """`writer` filled slots for `owner` and was not heard since: keep these from everybody. Raises as free does."""
        granted = self._granted_to(owner, block_ids)
        self._fenced[writer] = self._fenced.get(writer, ()) + tuple(block_ids)
        self._owner_of.update(dict.fromkeys(block_ids, owner))
        granted.difference_update(block_ids)
        if not granted:
            self._granted.pop(owner, None)

    def release(self, writer: str) -> int:
        """A writer let go of its slots: they are free again. How many there were."""
        slots = self._fenced.pop(writer, ())
        for slot in slots:
            self._pool.free_blocks(self._owner_of.pop(slot), (slot,))
        return len(slots)

    def abandon(self) -> None:
        """Grant nothing any more. Streams that hold slots may still finish with them."""
        self._is_abandoned = True

    def _granted_to(self, owner: str, block_ids: Sequence[int]) -> set[int]:
        granted = self._granted.get(owner, set())
        if not granted.issuperset(block_ids):
            strangers = sorted(set(block_ids) - granted)
            raise ForeignOwner(f"{owner!r} gives slots {strangers} of a segment back, which it was not granted or lost")
        if len(set(block_ids)) != len(block_ids):
            raise DoubleFree(f"{owner!r} gives a slot of a segment back twice in one call: {list(block_ids)}")
        return granted

    @property
    def is_abandoned(self) -> bool:
        """Whether nothing is granted any more."""
        return self._is_abandoned

    @property
    def block_size(self) -> int:
        """Rows of one slot."""
        return self._pool.block_size

    @property
    def num_free(self) -> int:
        """Slots that can be granted."""
        return 0 if self._is_abandoned else self._pool.num_free

    @property
    def num_in_use(self) -> int:
        """Slots granted to open streams."""
        return self._pool.num_in_use - len(self._owner_of)

    @property
    def num_fenced(self) -> int:
        """Slots whose writer is still to let go."""
        return len(self._owner_of)

    def in_use_by(self, owner: str) -> int:
        """How many slots are granted to an open stream."""
        return len(self._granted.get(owner, ()))

    def held_by(self, owner: str) -> tuple[int, ...]:
        """Which slots are granted to an open stream."""
        return tuple(sorted(self._granted.get(owner, ())))

    def check(self) -> None:
        """Assert that every slot is in exactly one state; for tests."""
        granted = [slot for slots in self._granted.values() for slot in slots]
        fenced = [slot for slots in self._fenced.values() for slot in slots]
        assert (
            len(set(granted)) == len(granted)
            and set(fenced) == set(self._owner_of)
            and len(fenced) == len(self._owner_of)
        )
        assert not set(granted) & set(fenced)
        assert self._pool.num_free + len(granted) + len(fenced) == self._pool.num_blocks
