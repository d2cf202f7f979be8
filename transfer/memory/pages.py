"""Memory as the kernel gives it, in large pages where the administrator allows them.

A block is some hundred small pages, and a copy from or to a pool that fits no cache waits at each of them for its
address; a large page holds two blocks. Knows sizes, not what lies there.
"""

from __future__ import annotations

import contextlib
import mmap

from transfer.errors import ConfigError


def private_memory(num_bytes: int, what: str) -> mmap.mmap:
    """Zeros for this process alone, taken from the system as they are first touched. ConfigError if it has none."""
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"no memory of {num_bytes} bytes for {what}: {error}; make it smaller") from error
    advise_huge(memory)
    return memory


def advise_huge(memory: mmap.mmap) -> None:
    """Ask for large pages; where there are none of them this changes nothing."""
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
