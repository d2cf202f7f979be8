"""Folders of dead clusters go, and nothing else: each test but the first spoils one mark of a folder that would go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import runtime_folder
from cluster.cli.parser import build_parser
from cluster.runtime_folder import LOCK_FILE, RuntimeFolder, is_running, owners, remove_stale

CHILD = """
import runpy, signal, sys
folder = runpy.run_path(sys.argv[1])["RuntimeFolder"](sys.argv[2])  # without all that the package imports
print(folder.path, flush=True)
signal.pause()
"""


@pytest.fixture
def child(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with a folder of its own in tmp_path; its line of output is the folder."""
    command = [sys.executable, "-c", CHILD, runtime_folder.__file__, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture
def left(child: subprocess.Popen[str], tmp_path: Path) -> Path:
    """What a killed process left behind."""
    folder = _folder(child)
    (folder / "language-0-1a2b3c4d.sock").touch()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert folder.is_dir() and folder.parent == tmp_path
    return folder


def _folder(child: subprocess.Popen[str]) -> Path:
    assert child.stdout is not None
    return Path(child.stdout.readline().strip())


def test_the_folder_of_a_killed_process_is_removed_at_the_next_start(left: Path, tmp_path: Path) -> None:
    folder = RuntimeFolder(tmp_path)
    assert not left.exists()
    assert Path(folder.path).stat().st_mode & 0o777 == 0o700
    assert (Path(folder.path) / LOCK_FILE).read_text() == str(os.getpid())
    folder.close()
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_live_process_stays(child: subprocess.Popen[str], tmp_path: Path) -> None:
    folder = _folder(child)
    assert remove_stale(tmp_path) == []
    os.kill(child.pid, signal.SIGSTOP)  # alive, if not very
    assert remove_stale(tmp_path) == [] and folder.is_dir()


def test_a_lock_that_is_held_is_believed_more_than_the_process_number(
    child: subprocess.Popen[str], tmp_path: Path
) -> None:
    """As seen from another container, where the number means nobody."""
    folder = _folder(child)
    (folder / LOCK_FILE).write_text(_number_of_nobody())
    assert remove_stale(tmp_path) == [] and folder.is_dir()


def test_a_process_number_in_use_keeps_the_folder(left: Path, tmp_path: Path) -> None:
    (left / LOCK_FILE).write_text(str(os.getpid()))
    assert remove_stale(tmp_path) == [] and left.is_dir()


@pytest.mark.parametrize("content", ["", "0", "-1", "junk"])
def test_a_lock_file_without_a_process_number_keeps_the_folder(left: Path, tmp_path: Path, content: str) -> None:
    (left / LOCK_FILE).write_text(content)
    assert remove_stale(tmp_path) == [] and left.is_dir()


def test_a_folder_without_our_marks_stays(left: Path, tmp_path: Path) -> None:
    named = tmp_path / "other-1"
    left.rename(named)
    unlocked = tmp_path / "tandem-notes"
    unlocked.mkdir()
    (unlocked / "text").touch()
    linked = tmp_path / "tandem-link"
    linked.symlink_to(named)
    assert remove_stale(tmp_path) == []
    assert named.is_dir() and (unlocked / "text").exists() and linked.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_the_folder_of_another_user_stays(left: Path, tmp_path: Path) -> None:
    os.chown(left, 12345, -1)
    assert remove_stale(tmp_path) == [] and left.is_dir()


def test_processes_are_found() -> None:
    assert is_running(os.getpid())
    assert not is_running(int(_number_of_nobody()))


def _number_of_nobody() -> str:
    """The number of a process that has just ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return str(process.pid)


def _stop(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`tandem stop` where `folder` is the one for temporary files."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(folder))
    options = build_parser().parse_args(["stop", *arguments])
    return int(options.run(options))


def test_stop_ends_who_holds_a_folder_and_nobody_else(
    child: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _folder(child)
    (tmp_path / "tandem-of-somebody").mkdir()
    (tmp_path / "tandem-of-somebody" / LOCK_FILE).write_text(str(os.getpid()))  # nobody holds this lock
    assert owners(tmp_path) == [child.pid]
    waiter = threading.Thread(target=child.wait, daemon=True)  # a process that is not waited for stays as a zombie
    waiter.start()
    assert _stop(tmp_path, monkeypatch) == 0
    waiter.join(30)
    assert child.returncode == -signal.SIGTERM
    assert owners(tmp_path) == [] and _stop(tmp_path, monkeypatch) == 0


def test_stop_tells_of_a_process_that_does_not_end(
    child: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _folder(child)
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)  # of two signals that wait, SIGTERM would be heard first
    assert _stop(tmp_path, monkeypatch, "--timeout-s", "0.1") == 1
    assert f"process {child.pid} still runs" in capsys.readouterr().err
    child.kill()
    child.send_signal(signal.SIGCONT)


def test_a_process_that_nobody_waits_for_has_ended_all_the_same(child: subprocess.Popen[str], tmp_path: Path) -> None:
    """Whoever started it may never ask, or ask later: a container's first process, say, or one that waits for us."""
    _folder(child)
    assert is_running(child.pid)
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still to be waited for
    os.kill(child.pid, 0)
    assert not is_running(child.pid)
