"""GrantPlanner: which streams get the pool's free blocks, and which give some back. Pure; knows turns and counts.

Rules, in this order. (1) Every stream that holds no block and may still need one has one block kept for it; such
streams get it as soon as they can use it, in the order of their turns. (2) What is free beyond those kept blocks goes
to the lowest rank, as much as it wants, then to the next; while blocks are kept for others, an admitted stream gets no
more than its credit window. A rank is (does not move, turn): admitted streams before others, then the earlier turn.
(3) Where that leaves an empty stream without its block, others give back all but one: first those that are not
admitted, then those that are. What an admitted stream urgently needs they give back, too, but for streams whose totals
are not known; of an admitted stream that moves only what lies beyond its credit window. (4) The last block goes, too:
to an admitted stream that holds nothing, and has not stalled, from one that is not admitted; and to any from one that
is stalled, which held it for a turn and filled none; its next turn comes after all that wait now.

Why nothing starves: a stream that is not admitted needs one grant only, to announce, and keeps its block for a turn at
most from those that are. Of admitted streams the one with the earliest turn gets the next block: it fills and frees it,
and so comes to its end, or it stalls, and waits behind the others.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

Rank: TypeAlias = tuple[bool, int]
_Heap: TypeAlias = list[tuple[Rank, str]]


class Demand(NamedTuple):
    """What one stream wants, and what it can give.

    rank       whether it does not move (not admitted, or stalled before), and its turn
    wanted     blocks it could use now; urgent: those that others are asked to give back, beyond a first one
    empty      it holds none and may still need one
    held       blocks that may be withdrawn from it; surplus: of an admitted stream's, those beyond its credit window
    announced  its totals are known; admitted: and it has room for all its rows
    stalled    it held its blocks for a turn and filled none
    returning  blocks withdrawn that are not back yet
    """

    rank: Rank
    wanted: int = 0
    urgent: int = 0
    empty: bool = False
    held: int = 0
    surplus: int = 0
    announced: bool = True
    admitted: bool = False
    stalled: bool = False
    returning: int = 0


class Plan(NamedTuple):
    """Blocks per stream: to grant now, and to withdraw."""

    grants: dict[str, int]
    revocations: dict[str, int]


class _Source:
    """Streams that may give blocks back for one reason, the latest turn first; `give(demand)`: how many, 0 for none."""

    def __init__(self, give: Callable[[Demand], int], *, earliest_first: bool = False) -> None:
        self.give = give
        self.heap: _Heap = []
        self._sign = 1 if earliest_first else -1

    def entry(self, key: str, demand: Demand) -> tuple[Rank, str]:
        return (False, self._sign * demand.rank[1]), key


_NOTHING = Plan({}, {})


class GrantPlanner:
    """Demands by stream id, and the plan for a number of free blocks. O(log streams) for each stream served."""

    def __init__(self) -> None:
        self._demands: dict[str, Demand] = {}
        self._num_empty = 0
        self._num_waiting = 0  # empty streams that can use a block now
        self._num_starving = 0  # those among them that are admitted, and have not stood still
        self._urgent = 0
        self._returning = 0
        self._first: _Heap = []  # heaps with stale entries, checked against _demands when popped
        self._more: _Heap = []
        self._announced = _Source(lambda d: d.held - 1 if d.announced and not d.admitted else 0)
        self._idle = _Source(lambda d: d.held - 1 if d.admitted and d.stalled else 0)
        self._unannounced = _Source(lambda d: 0 if d.announced else d.held - 1)
        self._surplus = _Source(lambda d: min(d.held - 1, d.surplus) if d.admitted and not d.stalled else 0)
        self._moving = _Source(lambda d: d.held - 1 if d.admitted and not d.stalled else 0)
        self._last = _Source(lambda d: min(d.held, 1) if not d.admitted else 0)
        self._last_idle = _Source(lambda d: min(d.held, 1) if d.stalled else 0, earliest_first=True)
        self._sources = (
            *(self._announced, self._idle, self._unannounced, self._surplus, self._moving),
            *(self._last, self._last_idle),
        )

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
            demand = self._demands[key]
            most = demand.urgent if demand.admitted and self._num_empty else demand.wanted
            count = min(most, num_free - self._num_empty)
            if count:
                grants[key] = grants.get(key, 0) + count
                num_free -= count
            self._grant(key, count, is_all=count == most)
        return Plan(grants, self._withdraw() if self._num_waiting + self._urgent > self._returning else {})

    def _withdraw(self) -> dict[str, int]:
        taken: dict[str, int] = {}
        for_empty = self._num_waiting - self._returning
        for_any = for_empty + self._urgent
        num = self._take(self._announced, for_any, taken)
        num += self._take(self._idle, for_any - num, taken)
        num += self._take(self._unannounced, for_empty - num, taken)
        num += self._take(self._surplus, for_any - num, taken)
        num += self._take(self._moving, for_empty - num, taken)
        num += self._take(self._last, min(for_empty - num, self._num_starving), taken)
        self._take(self._last_idle, for_empty - num, taken)
        return taken

    def _take(self, source: _Source, limit: int, taken: dict[str, int]) -> int:
        """Up to `limit` blocks from the streams of a source; how many there were."""
        num, heap = 0, source.heap
        while num < limit and heap:
            key = heap[0][1]
            old = self._demands.get(key)
            count = 0 if old is None or source.entry(key, old) != heap[0] else source.give(old)
            if old is None or count <= 0:
                heapq.heappop(heap)  # stale
                continue
            count = min(count, limit - num)
            taken[key] = taken.get(key, 0) + count
            num += count
            new = old._replace(
                held=old.held - count, surplus=max(0, old.surplus - count), returning=old.returning + count
            )
            self._change(key, old, new)
        return num

    def _grant(self, key: str, count: int, *, is_all: bool = False) -> None:
        """`is_all`: it is not to get more before it used some."""
        old = self._demands[key]
        urgent = max(0, old.urgent - (count - old.empty))
        wanted = 0 if is_all else old.wanted - count
        self._change(key, old, old._replace(wanted=wanted, urgent=min(urgent, wanted), empty=False))

    def _change(self, key: str, old: Demand | None, new: Demand) -> None:
        if old is not None:
            self._count(old, -1)
        self._demands[key] = new
        self._count(new, 1)
        self._push(key, old, new)

    def _count(self, demand: Demand, sign: int) -> None:
        self._returning += sign * demand.returning
        if demand.empty:
            self._num_empty += sign
            if demand.wanted:
                self._num_waiting += sign
                self._num_starving += sign * (not demand.rank[0])
        else:
            self._urgent += sign * demand.urgent

    def _push(self, key: str, old: Demand | None, demand: Demand) -> None:
        if demand.wanted:
            heap = self._first if demand.empty else self._more
            self._trim(heap)
            heapq.heappush(heap, ((demand.rank[0] and not demand.empty, demand.rank[1]), key))
        for source in self._sources if demand.held else ():
            if source.give(demand) > 0 and (old is None or source.give(old) <= 0 or old.rank[1] != demand.rank[1]):
                self._trim(source.heap)
                heapq.heappush(source.heap, source.entry(key, demand))

    def _trim(self, heap: _Heap) -> None:
        """A heap that is mostly stale or repeated loses what is."""
        if len(heap) > 64 and len(heap) > 4 * len(self._demands):
            heap[:] = sorted({entry for entry in heap if entry[-1] in self._demands})

    def _pop(self, heap: _Heap, *, want_empty: bool) -> str | None:
        while heap:
            rank, key = heapq.heappop(heap)
            demand = self._demands.get(key)
            if demand is None or demand.empty != want_empty or not demand.wanted:
                continue
            if rank == (demand.rank[0] and not want_empty, demand.rank[1]):
                return key
        return None
