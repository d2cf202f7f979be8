"""Who is silent, from the times of what was sent and heard. Pure; no clock inside.

`Liveness` says which peers to ping and which to give up, `Silence` which connections to make anew.
"""

from __future__ import annotations

from transfer.connection import Connection


class Liveness:
    """Watches peers with open calls. Silence of `ping_s` asks for a ping, silence of `lost_s` is a loss.

    Between two checks at most `ping_s` of silence counts: who was stopped for longer has heard nobody.
    """

    def __init__(self, ping_s: float, lost_s: float) -> None:
        self._ping_s = ping_s
        self._lost_s = lost_s
        self._heard: dict[Connection, float] = {}
        self._pinged: dict[Connection, float] = {}
        self._checked: float | None = None

    def heard(self, connection: Connection, now: float) -> None:
        """Something came from a peer."""
        if connection in self._heard:
            self._heard[connection] = now

    def check(self, watched: set[Connection], now: float) -> tuple[list[Connection], list[Connection]]:
        """(to ping, lost) among `watched`; peers no longer watched are forgotten, new ones count as heard now."""
        for gone in self._heard.keys() - watched:
            del self._heard[gone]
            self._pinged.pop(gone, None)
        away = now - (now if self._checked is None else self._checked) - self._ping_s
        self._checked = now
        if away > 0:
            self._heard = {connection: heard + away for connection, heard in self._heard.items()}
        ping, lost = [], []
        for connection in watched:
            silent = now - self._heard.setdefault(connection, now)
            if silent >= self._lost_s:
                lost.append(connection)
            elif silent >= self._ping_s and now - self._pinged.get(connection, -self._ping_s) >= self._ping_s:
                self._pinged[connection] = now
                ping.append(connection)
        return ping, lost


class Silence:
    """Connections that were sent something `limit_s` ago or longer, and on which nothing came since."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._asked: dict[Connection, float] = {}  # the oldest sending that nothing was heard after, oldest first

    def sent(self, connection: Connection, now: float) -> None:
        """Something was sent."""
        self._asked.setdefault(connection, now)

    def heard(self, connection: Connection) -> None:
        """Something came, or the connection is no longer of interest."""
        self._asked.pop(connection, None)

    def take_silent(self, now: float) -> list[Connection]:
        """These connections, each once; their time starts anew with what is sent next."""
        silent: list[Connection] = []
        for connection, asked in self._asked.items():
            if now - asked < self._limit_s:
                break
            silent.append(connection)
        for connection in silent:
            del self._asked[connection]
        return silent
