"""Timeline: virtual time. What is to happen is kept in order of time, then in order of arrival; nothing ever waits.

Process: one life of one host's program. What happens in it stands still while it is stopped and is lost when it dies.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

Action: TypeAlias = Callable[..., None]


class Timeline:
    """The one clock of a run, in virtual seconds."""

    def __init__(self, start_s: float = 1000.0) -> None:
        self.now = start_s
        self.num_steps = 0
        self._heap: list[tuple[float, int, Action, tuple[Any, ...]]] = []
        self._count = 0

    def after(self, delay_s: float, action: Action, *arguments: Any) -> None:
        """Run `action(*arguments)` in `delay_s` virtual seconds."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._count, action, arguments))

    def step(self) -> bool:
        """Run the next action; False when there is none."""
        if not self._heap:
            return False
        self.now, _, action, arguments = heapq.heappop(self._heap)
        self.num_steps += 1
        action(*arguments)
        return True


class Watcher(Protocol):
    """Who judges what a process does."""

    def stepped(self, process: Process) -> None:
        """The process did something; nothing is half done now."""

    def escaped(self, process: Process, error: Exception) -> None:
        """An error came out of the program where an endpoint's loop would have had to catch it."""


class LoopDied(BaseException):
    """The I/O loop dies here, in the middle of what it does; no handler of errors can hold it."""


class Process:
    """One life of the program on `host`; `life` counts them from 1. `on_loop_death` starts its I/O loop anew."""

    def __init__(self, host: str, life: int, timeline: Timeline, watcher: Watcher) -> None:
        self.host = host
        self.life = life
        self.is_alive = True
        self.is_stopped = False
        self._timeline = timeline
        self._watcher = watcher
        self.leap_s = 0.0  # how far its clock is ahead
        self.on_loop_death: Action = lambda: None
        self._touches_left: int | None = None  # until the loop dies
        self._backlog: deque[tuple[Action, tuple[Any, ...]]] = deque()

    def __str__(self) -> str:
        return self.host if self.life == 1 else f"{self.host}#{self.life}"

    def now(self) -> float:
        """This program's monotonic clock."""
        return self._timeline.now + self.leap_s

    def jump(self, seconds: float) -> None:
        """The clock leaps forward, as when a virtual machine was suspended."""
        self.leap_s += seconds

    def after(self, delay_s: float, action: Action, *arguments: Any) -> None:
        """Run `action` here in `delay_s` seconds: later when stopped by then, never when dead by then."""
        self._timeline.after(delay_s, self.run, action, arguments)

    def run(self, action: Action, arguments: tuple[Any, ...] = ()) -> None:
        """Run `action` here now, or as `after` says."""
        if not self.is_alive:
            return
        if self.is_stopped:
            self._backlog.append((action, arguments))
            return
        try:
            action(*arguments)
        except LoopDied:
            self.on_loop_death()
        except Exception as error:
            self._watcher.escaped(self, error)
        self._watcher.stepped(self)

    def doom(self, num_touches: int) -> None:
        """Its I/O loop dies when it touches the world (a message, a block) once more than so many times."""
        self._touches_left = num_touches

    def touch(self) -> None:
        """The loop is about to do something that others can see. May raise LoopDied."""
        if self._touches_left is None:
            return
        self._touches_left -= 1
        if self._touches_left < 0:
            self._touches_left = None
            raise LoopDied

    @property
    def num_waiting(self) -> int:
        """What came in while the program was stopped."""
        return len(self._backlog)

    def stop(self) -> None:
        """As SIGSTOP: nothing runs, everything waits, the clock goes on."""
        self.is_stopped = True

    def wake(self) -> None:
        """As SIGCONT: what waited happens now, in order."""
        if not self.is_stopped:
            return
        self.is_stopped = False
        backlog, self._backlog = self._backlog, deque()
        for action, arguments in backlog:
            self._timeline.after(0.0, self.run, action, arguments)

    def kill(self) -> None:
        """As SIGKILL."""
        self.is_alive = False
        self._backlog.clear()
