"""Connection: the handle of one peer, which endpoints hand out and everything above them passes round; and Frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

Frame: TypeAlias = bytes | memoryview


@dataclass(frozen=True, kw_only=True, slots=True)
class Connection:
    """One peer, as one endpoint sees it. `outgoing`: we connected to it; else it connected to us.

    `is_sealed_path`: goes one way and carries sealed Blocks and Probes only; whose they are, their seals must tell.
    """

    endpoint: str
    peer: str
    key: bytes
    outgoing: bool
    is_sealed_path: bool = False

    def __hash__(self) -> int:
        """Of the key alone, which is different for every peer: connections are looked up for every message."""
        return hash(self.key)
