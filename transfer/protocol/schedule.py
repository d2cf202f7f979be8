"""Schedule: who is due when. Times mostly move later, so a tick costs what is due, not what is open. Pure."""

from __future__ import annotations

import heapq


class Schedule:
    """At most one time per key counts, the earliest asked for."""

    def __init__(self) -> None:
        self._times: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []

    def at(self, key: str, time: float) -> None:
        """`key` is due at `time`, or earlier where that was asked for before."""
        known = self._times.get(key)
        if known is None or time < known:
            self._times[key] = time
            heapq.heappush(self._heap, (time, key))

    def take_due(self, now: float) -> list[str]:
        """The keys that are due, which are forgotten: ask again with `at`."""
        due: list[str] = []
        heap, times = self._heap, self._times
        while heap and heap[0][0] <= now:
            time, key = heapq.heappop(heap)
            if times.get(key) == time:
                del times[key]
                due.append(key)
        return due

    def remove(self, key: str) -> None:
        """Nothing more is due for `key`."""
        self._times.pop(key, None)
