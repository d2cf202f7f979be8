"""What runs behind all others: its status, its share of the processors, and signals on their way to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.behind import NICE

BEHIND = (sys.executable, "-m", "tests.behind", sys.executable, "-c")
AUTOGROUPS = Path("/proc/sys/kernel/sched_autogroup_enabled")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("script", "status"), [("", 0), ("raise SystemExit(5)", 5), ("import os; os.abort()", 134)])
def test_the_status_is_the_command_s(script: str, status: int) -> None:
    assert subprocess.run([*BEHIND, script], cwd=ROOT, check=False).returncode == status


def test_it_has_a_session_of_its_own_with_a_small_share() -> None:
    script = "import os, pathlib; group = pathlib.Path('/proc/self/autogroup'); "
    script += "print(os.getsid(0) == os.getpid(), os.nice(0), group.read_text() if group.is_file() else '')"
    told = subprocess.run([*BEHIND, script], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert told.split()[:2] == ["True", str(os.nice(0) + NICE)]
    if AUTOGROUPS.is_file() and AUTOGROUPS.read_text().strip() == "1" and os.geteuid() == 0:
        assert told.split()[-1] == str(NICE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on(number: signal.Signals) -> None:
    script = f"import signal; signal.signal({int(number)}, lambda *_: exit(7)); print('up', flush=True); signal.pause()"
    with subprocess.Popen([*BEHIND, script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.wait() == 7
