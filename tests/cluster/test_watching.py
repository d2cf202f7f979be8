"""The launcher's watch over its actors, with actors that only count what they are asked."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from cluster.launch import RayCluster


class Actor:
    """A worker's actor; its health is asked of it with `health.remote()`, and the answer never comes."""

    def __init__(self) -> None:
        self.health = self
        self.num_asked = 0

    def remote(self) -> object:
        self.num_asked += 1
        return object()


class Rounds(threading.Event):
    """Is set after so many rounds."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count

    def wait(self, timeout: float | None = None) -> bool:
        self.left -= 1
        return self.left < 0


def test_an_actor_that_has_not_answered_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions would pile up at a worker that loads its model."""
    monkeypatch.setattr("cluster.launch.ray.wait", lambda refs, timeout: ([], refs))
    actor = Actor()
    watched: Any = object.__new__(RayCluster)
    watched._stopping, watched._actors, watched._restarting = Rounds(5), {"language-0": actor}, set()
    watched._has_ended = lambda name: False
    watched._patience_s = lambda name: 60.0
    watched._tell_gateway = lambda: None
    watched._watch()
    assert watched._stopping.left == -1 and actor.num_asked == 1


class Clock:
    """Stands still but between rounds, which are a second each; one of them took much longer."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


class SlowRounds(Rounds):
    def __init__(self, clock: Clock, count: int, stopped: int) -> None:
        super().__init__(count)
        self._clock, self._stopped = clock, stopped

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        is_over = super().wait(timeout)
        self._clock.now_s += 100.0 if self.left == self._stopped else timeout
        return is_over


@pytest.mark.parametrize(("count", "is_silent"), [(16, False), (18, True)])
def test_who_was_stopped_takes_nobody_for_hung(monkeypatch: pytest.MonkeyPatch, count: int, is_silent: bool) -> None:
    """What a whole machine's standstill kept from answering has its full time again; who stays silent is ended."""
    monkeypatch.setattr("cluster.launch.ray.wait", lambda refs, timeout: ([], refs))
    clock = Clock()
    monkeypatch.setattr("cluster.launch.time", clock)
    ended: list[str] = []
    watched: Any = object.__new__(RayCluster)
    watched._stopping, watched._actors = SlowRounds(clock, count, stopped=5), {"language-0": Actor()}
    watched._restarting = set()
    watched._has_ended = lambda name: False
    watched._patience_s = lambda name: 15.0
    watched._on_silence = ended.append
    watched._tell_gateway = lambda: None
    watched._watch()
    assert ended == (["language-0"] if is_silent else [])
