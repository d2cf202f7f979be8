"""How long passing a segment may take in these tests: a stall is no reason to let payload go over the wire instead."""

from __future__ import annotations

from transfer.memory import segment_passing, segment_server

HANDSHAKE_S = 60.0


def allow_for_handshakes(seconds: float = HANDSHAKE_S) -> float:
    """For this process, and those that it forks from now on; what was allowed before."""
    before = segment_server.HANDSHAKE_S
    segment_passing.HANDSHAKE_S = segment_server.HANDSHAKE_S = seconds
    segment_passing.fetch.__defaults__ = (seconds,)
    return before
