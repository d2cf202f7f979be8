"""The allocator's tuning is asked for by processes, never at import, and saves the page faults it is for."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from transfer.endpoints import allocator

FAULTS = """
import resource, sys, threading
from transfer.endpoints.allocator import tune_allocator

def use():
    for i in range(21):
        if i == 1:
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        blocks = [bytes(917_504) for _ in range(16)]
        del blocks
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

if sys.argv[1] == "tuned":
    assert tune_allocator()
counts = []
thread = threading.Thread(target=use)  # as a transport's own thread does
thread.start()
thread.join()
print(counts[1] - counts[0])
"""


def _faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, timeout=60, check=True, env={}
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunes glibc only")
def test_memory_of_freed_messages_is_not_faulted_in_again() -> None:
    pages = 20 * 16 * 917_504 // 4096
    assert _faults("plain") > pages // 2  # what the tuning is for does happen without it
    assert _faults("tuned") < pages // 8


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)  # not even opened
    assert not allocator.tune_allocator()
