"""Whether a long run grows: resident memory now against a moment when everything was warm."""

from __future__ import annotations

import gc
from pathlib import Path


def resident_kib() -> int:
    """Resident memory of this process, after a collection."""
    gc.collect()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


class Memory:
    """Remembers the present."""

    def __init__(self) -> None:
        self._before_kib = resident_kib()

    def grown_kib(self) -> int:
        return resident_kib() - self._before_kib

    def check(self, limit_kib: int) -> None:
        grown_kib = self.grown_kib()
        assert grown_kib < limit_kib, f"memory grew by {grown_kib} KiB"
