"""Liveness: which peers to ping and which to give up, from the times they were last heard. Pure; no clock inside."""

from __future__ import annotations

from transfer.connection import Connection


class Liveness:
    """Watches peers with open calls. Silence of `ping_s` asks for a ping, silence of `lost_s` is a loss."""

    def __init__(self, ping_s: float, lost_s: float) -> None:
        self._ping_s = ping_s
        self._lost_s = lost_s
        self._heard: dict[Connection, float] = {}
        self._pinged: dict[Connection, float] = {}

    def heard(self, connection: Connection, now: float) -> None:
        """Something came from a peer."""
        if connection in self._heard:
            self._heard[connection] = now

    def check(self, watched: set[Connection], now: float) -> tuple[list[Connection], list[Connection]]:
        """(to ping, lost) among `watched`; peers no longer watched are forgotten, new ones count as heard now."""
        for gone in self._heard.keys() - watched:
            del self._heard[gone]
            self._pinged.pop(gone, None)
        ping, lost = [], []
        for connection in watched:
            silent = now - self._heard.setdefault(connection, now)
            if silent >= self._lost_s:
                lost.append(connection)
            elif silent >= self._ping_s and now - self._pinged.get(connection, -self._ping_s) >= self._ping_s:
                self._pinged[connection] = now
                ping.append(connection)
        return ping, lost
