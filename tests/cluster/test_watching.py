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
