"""ConnectionUse: how many streams use each connection, and since when the unused ones are idle. Its owner locks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from transfer.connection import Connection


class ConnectionUse:
    """Counts by connection."""

    def __init__(self) -> None:
        self._num_using: Counter[Connection] = Counter()
        self._idle_since: dict[Connection, float] = {}

    def use(self, connection: Connection) -> None:
        """One more stream uses it."""
        self._num_using[connection] += 1
        self._idle_since.pop(connection, None)

    def release(self, connections: Iterable[Connection | None], now: float) -> None:
        """A stream does not use these any more."""
        for connection in connections:
            if connection is None:
                continue
            self._num_using[connection] -= 1
            if not self._num_using[connection]:
                del self._num_using[connection]
                self._idle_since[connection] = now

    def drop(self, connection: Connection) -> None:
        """It is gone: nobody needs to wait for its end."""
        self._idle_since.pop(connection, None)

    def take_idle(self, now: float, limit_s: float) -> list[Connection]:
        """Those that no stream used for so long; they are told once."""
        idle = [connection for connection, since in self._idle_since.items() if now - since >= limit_s]
        for connection in idle:
            del self._idle_since[connection]
        return idle
