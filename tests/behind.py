"""Runs a command behind all others: `python -m tests.behind COMMAND ...`; its exit status is the command's.

Linux deals processors out to sessions first, and by priority only within each (sched(7), "The autogroup feature"). So
the command gets a session of its own, of which the share is made small, and signals are passed on to it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

NICE = 10
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(command: Sequence[str]) -> int:
    """Its exit status; 128 and the signal's number where a signal ended it, as in a shell."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until there is somebody to pass them on to
    with subprocess.Popen(command, preexec_fn=_step_back) as process:

        def pass_on(number: int, _: FrameType | None) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

        for number in SIGNALS:
            signal.signal(number, pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        status = process.wait()
    return 128 - status if status < 0 else status


def _step_back() -> None:
    os.setsid()
    os.nice(NICE)
    with contextlib.suppress(OSError):  # a kernel without such groups, or one whose owner may not
        Path("/proc/self/autogroup").write_text(str(NICE))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
