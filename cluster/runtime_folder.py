"""RuntimeFolder: the private folder of one running cluster, where its socket files lie.

Whoever is killed cannot clean up, so everybody removes, before making a folder, those that others left: folders of this
user that carry our marks, whose lock nobody holds and whose recorded process is gone. Everything else is not ours to
touch. The lock is the kernel's, and so ends with its process also where process numbers mean something else (a
container that shares the folder of temporary files).
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

PREFIX = "tandem-"
LOCK_FILE = "owner.lock"  # holds the owner's process number, and is locked while the owner lives


class RuntimeFolder:
    """A fresh folder that only this user can enter; `close` removes it."""

    def __init__(self, parent: str | Path | None = None) -> None:
        """parent: where it is made; None: the folder of temporary files."""
        parent = Path(parent or tempfile.gettempdir())
        remove_stale(parent)
        self.path = tempfile.mkdtemp(prefix=PREFIX, dir=parent)
        self._lock = os.open(Path(self.path) / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.write(self._lock, str(os.getpid()).encode())  # last: a folder without it is never taken for a stale one

    def close(self) -> None:
        """Remove it with all that is in it; closing twice does nothing."""
        if self._lock < 0:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1


def remove_stale(parent: Path) -> list[Path]:
    """Remove what dead processes of this user left in `parent`; returns what was removed."""
    removed = []
    for folder in sorted(parent.glob(PREFIX + "*")):
        with suppress(OSError):  # gone meanwhile, or closed to us
            if _is_own_folder(folder) and _is_abandoned(folder):
                shutil.rmtree(folder)
                logger.info("removed %s, left behind by a process that is gone", folder)
                removed.append(folder)
    return removed


def owners(parent: Path) -> list[int]:
    """The processes of this user that have a folder in `parent` and hold its lock."""
    pids = set()
    for folder in sorted(parent.glob(PREFIX + "*")):
        with suppress(OSError):  # gone meanwhile, or closed to us
            if _is_own_folder(folder):
                owner = _holder(folder)
                pids |= {int(owner)} if owner.isdigit() and int(owner) > 0 else set()
    return sorted(pids)


def is_running(pid: int) -> bool:
    """Whether there is such a process on this host, whoever it belongs to. One that has ended is gone, also while its
    parent has not asked how.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1]
    except OSError:  # a system without it
        return True
    return state != b"Z"


def _is_own_folder(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _is_abandoned(folder: Path) -> bool:
    """The lock is free and the process it names is gone. Raises OSError where there is no lock file."""
    lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owner = os.read(lock, 32)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return owner.isdigit() and int(owner) > 0 and not is_running(int(owner))


def _holder(folder: Path) -> bytes:
    """What a lock that is held says of its holder; nothing where it is free. Raises OSError where there is none."""
    lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(lock, 32)
    finally:
        os.close(lock)
    return b""
