"""tune_allocator: keep the memory of large messages inside the process, instead of asking the kernel for each anew.

A transport allocates every payload frame it receives. glibc maps allocations of that size one by one and unmaps them
when freed, so that each page of each frame is faulted in and cleared again. Nothing happens with other C libraries.
Knows nothing of transfers; a process calls it once, for itself: never at import.
"""

from __future__ import annotations

import ctypes
import platform

MMAP_THRESHOLD_BYTES = 32 << 20  # glibc's upper limit: larger blocks are still mapped one by one
TRIM_THRESHOLD_BYTES = 1 << 30  # free memory at the top of the heap that stays with the process
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def tune_allocator() -> bool:
    """Whether it was done: False where the C library is another one."""
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    settings = ((_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES), (_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES))
    return all(library.mallopt(name, value) == 1 for name, value in settings)
