"""What happens to this process's stderr and signals while Ray starts; Ray itself is started by the end-to-end tests."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from cluster.ray_connection import _held_back_stderr


@pytest.fixture
def interrupting() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as in a command that is starting."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


def _hold(at: int) -> int:
    """Hold stderr back with a signal just before the `at`-th line that runs; how many lines ran."""
    num_lines = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal num_lines
        if event == "line" and frame.f_code.co_filename.endswith(
            ("ray_connection.py", "contextlib.py", "test_ray_connection.py")
        ):
            num_lines += 1
            if num_lines == at:
                os.kill(os.getpid(), signal.SIGTERM)
        return trace

    sys.settrace(trace)
    try:
        with _held_back_stderr() as held:
            os.write(2, b"noise")
            assert held() == "noise"
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return num_lines


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file closed by its destructor
def test_a_signal_at_any_moment_leaves_stderr_where_it_was(
    interrupting: None, capfd: pytest.CaptureFixture[str]
) -> None:
    def target() -> tuple[int, int]:
        status = os.stat(2)
        return status.st_dev, status.st_ino

    before, fds = target(), set(os.listdir("/proc/self/fd"))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    num_lines = _hold(0)
    assert num_lines > 20
    for at in range(1, num_lines + 1):
        _hold(at)
        assert target() == before, f"line {at}"
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers, f"line {at}"
    assert len(os.listdir("/proc/self/fd")) == len(fds), "descriptors left open"


def test_what_was_not_taken_comes_out_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    with _held_back_stderr() as held:
        os.write(2, b"taken ")
        assert held() == "taken "
        os.write(2, b"left")
        assert Path("/proc/self/fd/2").readlink() != Path("/dev/stderr")
    assert capfd.readouterr().err == "left"
