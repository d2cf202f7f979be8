"""SIGINT and SIGTERM for commands that run until they are told to stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopSignal:
    """Catches both signals from construction on, on the main thread. number: the first that came, 0 before.

    Before `expect` the command is still starting and nothing is worth draining: the first signal raises
    KeyboardInterrupt, so that what was begun is taken down, and more of them do not disturb that. Afterwards a signal
    only sets what `wait` waits for.
    """

    def __init__(self) -> None:
        self.number = 0
        self._stop = threading.Event()
        self._is_expected = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    @property
    def exit_code(self) -> int:
        """Of a command that a signal ended early, as shells spell it: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + (self.number or signal.SIGINT)

    def expect(self) -> None:
        """From here on a signal interrupts nothing."""
        self._is_expected = True

    def wait(self) -> None:
        """Return when a signal has come."""
        self.expect()
        self._stop.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        is_first, self.number = not self.number, self.number or number
        self._stop.set()
        if is_first and not self._is_expected:
            raise KeyboardInterrupt  # whatever is raised here, Ray's own code makes this of it
