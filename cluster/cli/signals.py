"""SIGINT and SIGTERM for commands that run until they are told to stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopSignal:
    """Catches both signals from construction on.

    Before `may_wait` the command is still starting and nothing is worth draining: a signal raises KeyboardInterrupt, so
    that what was begun is taken down at once. Afterwards it only sets what `wait` waits for.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._may_wait = False
        self._catch()

    def wait(self) -> None:
        """Return when a signal has come."""
        self._may_wait = True
        self._catch()  # again: Ray puts its own SIGTERM handler in the place of ours when it starts
        self._stop.wait()

    def _catch(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()
        if not self._may_wait:
            raise KeyboardInterrupt
