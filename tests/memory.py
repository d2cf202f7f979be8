"""This process's memory, read from the kernel: what is resident now, and the most that was since a moment."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Resident set after a collection."""
    gc.collect()
    return _field("VmRSS")


class Peak:
    """num_bytes: how far the resident set rose above its size at the beginning, once the block is over."""

    num_bytes = 0


@contextmanager
def peak_rise() -> Iterator[Peak]:
    """Measure the block's rise, whatever the process needed before."""
    peak = Peak()
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    yield peak
    peak.num_bytes = _field("VmHWM") - before


def _field(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
