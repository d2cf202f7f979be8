"""GrantPlanner: which streams get the pool's free blocks. Pure; knows ranks and counts, not blocks or messages.

Rules, in this order. (1) Every stream that holds no block and may still need one has one block kept for it; such a
stream gets it as soon as it can use it, lowest rank first. (2) What is free beyond those kept blocks goes to the
lowest rank, as much as it wants, then to the next. A rank is (not admitted, age): admitted streams before others, the
oldest first. Since a stream frees its block before it asks for the next one and admitted streams come first, an
admitted stream always holds at least one block and so always moves: that is why nothing here can deadlock.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TypeAlias

Rank: TypeAlias = tuple[bool, int]


@dataclass(slots=True)
class _Demand:
    rank: Rank
    wanted: int
    empty: bool


class GrantPlanner:
    """Demands by stream id, and the plan for a number of free blocks. O(log streams) for each stream served."""

    def __init__(self) -> None:
        self._demands: dict[str, _Demand] = {}
        self._num_empty = 0
        self._first: list[tuple[Rank, str]] = []  # heaps with stale entries, checked against _demands when popped
        self._more: list[tuple[Rank, str]] = []

    def update(self, key: str, *, rank: Rank, wanted: int, empty: bool) -> None:
        """`wanted` blocks could be used now; `empty`: holds none and may still need one."""
        old = self._demands.get(key)
        if old is not None and (old.rank, old.wanted, old.empty) == (rank, wanted, empty):
            return
        self._num_empty += empty - (old is not None and old.empty)
        self._demands[key] = _Demand(rank, wanted, empty)
        if wanted:
            self._push(key, rank, empty)

    def remove(self, key: str) -> None:
        """The stream is over."""
        old = self._demands.pop(key, None)
        self._num_empty -= old is not None and old.empty

    def plan(self, num_free: int) -> dict[str, int]:
        """Blocks to grant per stream; the demands are updated as if they were granted."""
        grants: dict[str, int] = {}
        while num_free and (key := self._pop(self._first, want_empty=True)) is not None:
            demand = self._demands[key]
            grants[key] = 1
            num_free -= 1
            self._num_empty -= 1
            demand.empty = False
            demand.wanted -= 1
            if demand.wanted:
                self._push(key, demand.rank, False)
        while num_free > self._num_empty and (key := self._pop(self._more, want_empty=False)) is not None:
            demand = self._demands[key]
            count = min(demand.wanted, num_free - self._num_empty)
            grants[key] = grants.get(key, 0) + count
            num_free -= count
            demand.wanted -= count
            if demand.wanted:
                self._push(key, demand.rank, False)
        return grants

    def _push(self, key: str, rank: Rank, empty: bool) -> None:
        heap = self._first if empty else self._more
        if len(heap) > 64 and len(heap) > 4 * len(self._demands):  # mostly stale: rebuild
            keep = {(d.rank, k) for k, d in self._demands.items() if d.wanted and d.empty == empty}
            heap[:] = sorted(keep)
        heapq.heappush(heap, (rank, key))

    def _pop(self, heap: list[tuple[Rank, str]], *, want_empty: bool) -> str | None:
        while heap:
            rank, key = heapq.heappop(heap)
            demand = self._demands.get(key)
            if demand is not None and demand.rank == rank and demand.empty == want_empty and demand.wanted:
                return key
        return None
