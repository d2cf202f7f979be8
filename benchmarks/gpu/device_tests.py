"""The kernel tests on the GPU: one pytest process per file, side by side, since most of their time is compiling.

Each runs with the plugin that mirrors the tests' tensors on the device. A process that outlasts the budget is ended
and counts as not finished.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_DEVICE = {  # what they test is not on the device
    "test_compile.py", "test_cpu_turn.py", "test_dispatch.py", "test_gpu_benchmarks.py", "test_native_checks.py",
    "test_native_library.py", "test_on_device.py",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileResult:
    """What one test file came to; `tail` is the end of pytest's output where it did not pass."""

    name: str
    outcome: str  # passed, failed or not finished
    summary: str
    tail: str


def files() -> list[Path]:
    """Test files that run on the device."""
    found = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    return [path for path in found if path.name not in WITHOUT_DEVICE]


def command(path: Path) -> list[str]:
    """How one file is run."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "tests.kernels.on_device"]
    options += ["-W", "default"]  # of other versions of what the tests use; pytest-timeout need not be there
    return [sys.executable, "-m", "pytest", *options, str(path)]


def run(commands: Sequence[tuple[str, list[str]]], budget_s: float) -> list[FileResult]:
    """Run named commands side by side from the repository's root, ending what is left after `budget_s` seconds."""
    deadline = time.monotonic() + budget_s
    results = []
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{i}.log" for i in range(len(commands))]
        processes = []
        for log, (_, arguments) in zip(logs, commands, strict=True):
            with log.open("wb") as output:
                processes.append(subprocess.Popen(arguments, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT))
        for process, log, (name, _) in zip(processes, logs, commands, strict=True):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
                outcome = "failed" if process.returncode else "passed"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                outcome = "not finished"
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            summary = lines[-1] if lines else "no output"
            tail = "" if outcome == "passed" else "\n".join(lines[-60:])
            results.append(FileResult(name=name, outcome=outcome, summary=summary, tail=tail))
    return results
