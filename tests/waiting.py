"""Waiting for an effect in another thread or process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PAUSE_S = 0.005


def eventually(condition: Callable[[], T | None], what: Callable[[], str] | str, timeout_s: float = 120.0) -> T:
    """The first true value of `condition`, asked again and again; AssertionError with `what` after `timeout_s`."""
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while True:
        is_late = time.monotonic() >= deadline
        if value := condition():
            return value
        if is_late:
            break
        pause.wait(PAUSE_S)
    raise AssertionError(f"{timeout_s:g} s later there was still: {what if isinstance(what, str) else what()}")
