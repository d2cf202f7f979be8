"""What happens to this process's stderr and signals while Ray starts; Ray itself is started by the end-to-end tests."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from cluster import ray_connection
from cluster.config import build_config
from cluster.errors import ConfigError
from cluster.launch import GATEWAY
from cluster.ray_connection import _held_back_stderr, role_resource
from tests.waiting import eventually


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

    gc.collect()
    before, fds = target(), set(os.listdir("/proc/self/fd"))
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    num_lines = _hold(0)
    assert num_lines > 20
    for at in range(1, num_lines + 1):
        _hold(at)
        assert target() == before, f"line {at}"
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers, f"line {at}"
    gc.collect()
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= len(fds), "descriptors left open")


def test_what_was_not_taken_comes_out_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    with _held_back_stderr() as held:
        os.write(2, b"taken ")
        assert held() == "taken "
        os.write(2, b"left")
        assert Path("/proc/self/fd/2").readlink() != Path("/dev/stderr")
    assert capfd.readouterr().err == "left"


@pytest.mark.parametrize("workers", [{"language": 2}, {"prefill": 1, "decode": 2}])
def test_a_ray_of_our_own_has_room_for_every_role(workers: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where actors are placed by roles, one that no node offers would wait for ever."""
    started: dict[str, Any] = {}
    monkeypatch.setattr(ray_connection.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_connection.ray, "init", lambda **options: started.update(options))
    config = build_config({"model": {"device": "cpu"}, "workers": {"placement": "roles", "embedding": 1, **workers}})
    assert ray_connection.connect(config, None, lambda status: None)
    offered = started["resources"]
    for kind, count in {**config.workers.counts, GATEWAY: 1}.items():
        assert offered.get(role_resource(kind), 0) >= count, kind


def test_a_ray_that_is_too_slow_to_start_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray says so with a bare Exception."""

    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray_connection.ray, "init", init)
    with pytest.raises(ConfigError, match=r"cannot start Ray on this machine: The current node timed out"):
        ray_connection.connect(build_config({"model": {"device": "cpu"}}), None, lambda text: None)
