"""`tandem stop`: ends the clusters that this user serves from this machine, and waits until they have drained.

For whoever holds no handle of the process: a hook that runs before a pod ends, an administrator after logging in again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.runtime_folder import is_running, owners

POLL_S = 0.2


def add_to(commands: Any, ray_address: str | None) -> None:
    parser = commands.add_parser("stop", help="drain and end what is served from this machine", description=__doc__)
    parser.add_argument(
        "--timeout-s", type=float, default=60.0, metavar="S", help="longest wait for running requests to end (60)"
    )
    parser.set_defaults(run=run, ray_address=ray_address)


def run(options: argparse.Namespace) -> int:
    """0 when nothing is served any more, also where nothing was; 1 when something still runs after the wait."""
    pids = owners(Path(tempfile.gettempdir()))
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        print(f"process {pid} was told to drain and stop", file=sys.stderr)
    deadline_s = time.monotonic() + options.timeout_s
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    for pid in left:
        print(f"process {pid} still runs after {options.timeout_s:g} s", file=sys.stderr)
    return 1 if left else 0
