"""SegmentBook: which slots of a segment are free, granted or fenced, and whether the segment may still be used.

Pure; knows slot numbers and owners, not memory. A slot is *granted* to a stream until its rows were handed on (its
writer sealed it, and so gave it away) or its writer said that it will not write it. When a stream ends without that,
its slots are *fenced*: its writer may still write them, so nobody gets them. They come free when the writer says that
it let go; if it is lost instead, the segment is *abandoned*: nothing of it is granted ever again.
"""

from __future__ import annotations

from collections.abc import Sequence

from transfer.block_pool import Allocation
from transfer.errors import DoubleFree, ForeignOwner, PoolExhausted


class SegmentBook:
    """Slots 0 to num_slots - 1 of one segment. Every call is all or nothing.

    The lowest free slots are granted first: so they are neighbours more often, warm in cache, and the memory of slots
    that were never needed is never touched.
    """

    def __init__(self, num_slots: int, block_size: int) -> None:
        self.num_slots = num_slots
        self.block_size = block_size
        self._free = list(range(num_slots))  # sorted
        self._granted: dict[str, set[int]] = {}
        self._fenced: dict[str, tuple[int, ...]] = {}
        self._num_fenced = 0
        self._generation = 0
        self._is_abandoned = False

    def allocate(self, num_tokens: int, owner: str) -> Allocation:
        """Slots for `num_tokens` rows. Raises PoolExhausted when too few are free, or the segment is abandoned."""
        count = -(-num_tokens // self.block_size)
        if count > self.num_free or count < 1:
            why = "it is abandoned: a sender that was lost may still write it" if self._is_abandoned else "wait"
            raise PoolExhausted(f"{count} slots of a segment wanted, {self.num_free} are free: {why}")
        slots = tuple(self._free[:count])
        del self._free[:count]
        self._granted.setdefault(owner, set()).update(slots)
        self._generation += 1
        return Allocation(
            block_ids=slots, allocated_tokens=count * self.block_size, owner=owner, generation=self._generation
        )

    def free_blocks(self, owner: str, block_ids: Sequence[int]) -> None:
        """Slots whose writer gave them away, sealed or unused. Raises ForeignOwner, DoubleFree.

        A fenced slot is nobody's to free but through `release`.
        """
        self._take(owner, block_ids)
        self._put_back(block_ids)

    def fence(self, owner: str, block_ids: Sequence[int], writer: str) -> None:
        """`writer` filled slots for `owner` and was not heard since: keep these from everybody. Raises as free does."""
        self._take(owner, block_ids)
        if block_ids:
            self._fenced[writer] = self._fenced.get(writer, ()) + tuple(block_ids)
            self._num_fenced += len(block_ids)

    def release(self, writer: str) -> int:
        """A writer let go of its slots: they are free again. How many there were."""
        slots = self._fenced.pop(writer, ())
        self._num_fenced -= len(slots)
        self._put_back(slots)
        return len(slots)

    def abandon(self) -> None:
        """Grant nothing any more. Streams that hold slots may still finish with them."""
        self._is_abandoned = True

    @property
    def fenced_writers(self) -> tuple[str, ...]:
        """Who is still to let go of slots."""
        return tuple(self._fenced)

    @property
    def is_abandoned(self) -> bool:
        """Whether nothing is granted any more."""
        return self._is_abandoned

    @property
    def num_free(self) -> int:
        """Slots that can be granted."""
        return 0 if self._is_abandoned else len(self._free)

    @property
    def num_in_use(self) -> int:
        """Slots granted to open streams."""
        return self.num_slots - len(self._free) - self._num_fenced

    @property
    def num_fenced(self) -> int:
        """Slots whose writer is still to let go."""
        return self._num_fenced

    def in_use_by(self, owner: str) -> int:
        """How many slots are granted to an open stream."""
        return len(self._granted.get(owner, ()))

    def held_by(self, owner: str) -> list[int]:
        """Which slots are granted to an open stream."""
        return sorted(self._granted.get(owner, ()))

    def _take(self, owner: str, block_ids: Sequence[int]) -> None:
        granted = self._granted.get(owner, set())
        if not granted.issuperset(block_ids):
            strangers = sorted(set(block_ids) - granted)
            raise ForeignOwner(f"{owner!r} gives slots {strangers} of a segment back, which it was not granted or lost")
        if len(set(block_ids)) != len(block_ids):
            raise DoubleFree(f"{owner!r} gives a slot of a segment back twice in one call: {list(block_ids)}")
        granted.difference_update(block_ids)
        if not granted:
            self._granted.pop(owner, None)

    def _put_back(self, slots: Sequence[int]) -> None:
        self._free.extend(slots)
        self._free.sort()  # nearly sorted: quick

    def check(self) -> None:
        """Assert that every slot is in exactly one state; for tests."""
        granted = [slot for slots in self._granted.values() for slot in slots]
        fenced = [slot for slots in self._fenced.values() for slot in slots]
        assert sorted([*self._free, *granted, *fenced]) == list(range(self.num_slots))
        assert self._free == sorted(self._free) and len(fenced) == self._num_fenced
