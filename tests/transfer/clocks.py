"""Clocks that a test sets forward: what a service does after a minute need not be waited for, and no stall causes it.

A step of `STEP_S` stays below the ping interval of `PATIENT`: of one longer than that, only so much counts as silence.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.waiting import eventually

PATIENT = {"ping_interval_s": 10.0, "peer_timeout_s": 60.0}  # of a TransferConfig whose service has such a clock
STEP_S = 5.0


class HandClock:
    """Stands still but for `advance`; `runs`: goes on by itself, too."""

    def __init__(self, *, runs: bool = False) -> None:
        self._runs = runs
        self._set_s = 1000.0

    def __call__(self) -> float:
        return self._set_s + (time.monotonic() if self._runs else 0.0)

    def advance(self, seconds: float) -> None:
        self._set_s += seconds

    def advance_until(self, condition: Callable[[], bool], what: str = "what time was to bring") -> None:
        """Step by step, for as long as it takes."""

        def is_there() -> bool:
            if not condition():
                self.advance(STEP_S)
                return False
            return True

        eventually(is_there, f"no {what}")
