"""What this machine can give: threads on its CPUs, bytes of its memory. Knows no settings.

Asked before anything is started or allocated: threads beyond all reason end the process inside the thread library, and
memory that cannot be had ends in an error that says nothing of settings.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

GIB = 1024**3
THREADS_PER_CPU = 4
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds in a period of so many, or "max"
FEW_THREADS = 32  # which every machine can start


def num_cpus() -> int:
    return os.cpu_count() or 1


def num_usable_cpus() -> int:
    """Those that this process may use: not the ones that an affinity or a container's quota keeps from it."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else num_cpus()
    try:
        quota, period = QUOTA.read_text(encoding="ascii").split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        return allowed


def most_threads() -> int:
    """How many threads of torch can make sense, and some more."""
    return max(FEW_THREADS, THREADS_PER_CPU * num_cpus())


def memory_bytes(device: torch.device) -> int:
    """All memory of the device, free or not; of the CPU that of the host."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def find_device(name: str) -> torch.device:
    """The device of that name; "auto": the first CUDA device, else the CPU. Raises ValueError for what is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown to torch: {error}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not served; use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices")
    return device
