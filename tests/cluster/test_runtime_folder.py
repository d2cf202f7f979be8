"""Folders of dead clusters go, and nothing else: each test but the first spoils one mark of a folder that would go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import runtime_folder
from cluster.runtime_folder import LOCK_FILE, RuntimeFolder, is_running, remove_stale

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
