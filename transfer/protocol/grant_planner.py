"""GrantPlanner: which streams get the pool's free blocks, and which give some back. Pure; knows ranks and counts.

Rules, in this order. (1) Every stream that holds no block and may still need one has one block kept for it; such a
stream gets it as soon as it can use it, lowest rank first. (2) What is free beyond those kept blocks goes to the
lowest rank, as much as it wants, then to the next. A rank is (not admitted, age): admitted streams before others, the
oldest first. (3) Where that leaves an empty stream without its block, or an admitted one without what it urgently
needs, streams that are not admitted give back all but one block, the youngest first; one whose totals are not known
only for empty streams. (4) For an admitted stream that still holds nothing they give back the last one too. Since a
stream frees its block before it asks for the next one and admitted streams come first, an admitted stream always gets
a block and so always moves: that is why nothing here can deadlock.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple, TypeAlias, TypeVar

Rank: TypeAlias = tuple[bool, int]
_Entry = TypeVar("_Entry", tuple[Rank, str], tuple[bool, int, str], tuple[int, str])


class Demand(NamedTuple):
    """What one stream wants, and what it can give.

    wanted     blocks it could use now; urgent: those that others are asked to give back, beyond a first one
    empty      it holds none and may still need one
    held       blocks that may be withdrawn from it; announced: its totals are known
    returning  blocks withdrawn that are not back yet
    """

    rank: Rank
    wanted: int = 0
    urgent: int = 0
    empty: bool = False
    held: int = 0
    announced: bool = True
    returning: int = 0


class Plan(NamedTuple):
    """Blocks per stream: to grant now, and to withdraw."""

    grants: dict[str, int]
    revocations: dict[str, int]


_NOTHING = Plan({}, {})


class GrantPlanner:
    """Demands by stream id, and the plan for a number of free blocks. O(log streams) for each stream served."""

    def __init__(self) -> None:
        self._demands: dict[str, Demand] = {}
        self._num_empty = 0
        self._num_waiting = 0  # empty streams that can use a block now
        self._num_starving = 0  # admitted ones among them
        self._urgent = 0
        self._returning = 0
        self._first: list[tuple[Rank, str]] = []  # heaps with stale entries, checked against _demands when popped
        self._more: list[tuple[Rank, str]] = []
        self._spare: list[tuple[bool, int, str]] = []  # (not announced, -age): may give back all but one
        self._last: list[tuple[int, str]] = []  # (-age): hold one that may be withdrawn

    def update(self, key: str, demand: Demand) -> None:
        """What a stream wants and can give from now on."""
        old = self._demands.get(key)
        if old == demand:
            return
        self._change(key, old, demand)

    def remove(self, key: str) -> None:
        """The stream is over."""
        old = self._demands.pop(key, None)
        if old is not None:
            self._count(old, -1)

    def plan(self, num_free: int) -> Plan:
        """What to grant and to withdraw; the demands are updated as if that were done."""
        if not self._first and not self._more and self._num_waiting + self._urgent <= self._returning:
            return _NOTHING
        grants: dict[str, int] = {}
        while num_free and (key := self._pop(self._first, want_empty=True)) is not None:
            grants[key] = 1
            num_free -= 1
            self._grant(key, 1)
        while num_free > self._num_empty and (key := self._pop(self._more, want_empty=False)) is not None:
            count = min(self._demands[key].wanted, num_free - self._num_empty)
            grants[key] = grants.get(key, 0) + count
            num_free -= count
            self._grant(key, count)
        return Plan(grants, self._withdraw() if self._num_waiting + self._urgent > self._returning else {})

    def _withdraw(self) -> dict[str, int]:
        taken: dict[str, int] = {}
        for_empty = self._num_waiting - self._returning
        for_any = for_empty + self._urgent
        while for_any > 0 and self._spare:
            unannounced, negative_age, key = self._spare[0]
            demand = self._demands.get(key)
            if demand is None or demand.held < 2 or (not demand.announced, -demand.rank[1]) != self._spare[0][:2]:
                heapq.heappop(self._spare)  # stale
                continue
            limit = for_empty if unannounced else for_any
            if limit <= 0:
                break
            count = min(demand.held - 1, limit)
            taken[key] = count
            for_any -= count
            for_empty -= count
            self._take(key, count)
        starving = min(for_empty, self._num_starving)
        while starving > 0 and self._last:
            negative_age, key = heapq.heappop(self._last)
            demand = self._demands.get(key)
            if demand is None or not demand.held or demand.rank[1] != -negative_age:
                continue  # stale
            taken[key] = taken.get(key, 0) + 1
            starving -= 1
            self._take(key, 1)
        return taken

    def _grant(self, key: str, count: int) -> None:
        old = self._demands[key]
        urgent = max(0, old.urgent - (count - old.empty))
        self._change(key, old, old._replace(wanted=old.wanted - count, urgent=urgent, empty=False))

    def _take(self, key: str, count: int) -> None:
        old = self._demands[key]
        self._change(key, old, old._replace(held=old.held - count, returning=old.returning + count))

    def _change(self, key: str, old: Demand | None, new: Demand) -> None:
        if old is not None:
            self._count(old, -1)
        self._demands[key] = new
        self._count(new, 1)
        self._push(key, new)

    def _count(self, demand: Demand, sign: int) -> None:
        self._returning += sign * demand.returning
        if demand.empty:
            self._num_empty += sign
            if demand.wanted:
                self._num_waiting += sign
                self._num_starving += sign * (not demand.rank[0])
        else:
            self._urgent += sign * demand.urgent

    def _push(self, key: str, demand: Demand) -> None:
        if demand.wanted:
            heap = self._first if demand.empty else self._more
            self._trim(heap)
            heapq.heappush(heap, (demand.rank, key))
        if demand.held:
            age = -demand.rank[1]
            self._trim(self._last)
            heapq.heappush(self._last, (age, key))
            if demand.held > 1:
                self._trim(self._spare)
                heapq.heappush(self._spare, (not demand.announced, age, key))

    def _trim(self, heap: list[_Entry]) -> None:
        """A heap that is mostly stale or repeated loses what is."""
        if len(heap) > 64 and len(heap) > 4 * len(self._demands):
            heap[:] = sorted({entry for entry in heap if entry[-1] in self._demands})

    def _pop(self, heap: list[tuple[Rank, str]], *, want_empty: bool) -> str | None:
        while heap:
            rank, key = heapq.heappop(heap)
            demand = self._demands.get(key)
            if demand is not None and demand.rank == rank and demand.empty == want_empty and demand.wanted:
                return key
        return None
