"""What this machine can give: threads on its CPUs, bytes of its memory. Knows no settings.

Asked before anything is started or allocated: threads beyond all reason end the process inside the thread library, and
memory that cannot be had ends in an error that says nothing of settings.
"""

from __future__ import annotations

import os

import torch

GIB = 1024**3
THREADS_PER_CPU = 4
FEW_THREADS = 32  # which every machine can start


def num_cpus() -> int:
    return os.cpu_count() or 1


def most_threads() -> int:
    """How many threads of torch can make sense, and some more."""
    return max(FEW_THREADS, THREADS_PER_CPU * num_cpus())


def memory_bytes(device: torch.device) -> int:
    """All memory of the device, free or not; of the CPU that of the host."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
