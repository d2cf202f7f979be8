"""The fault plan of the chaos proxy: which bytes of which link pass, change, vanish or cut it. Pure and seeded.

Bytes go in, steps come out; there is no socket, clock or thread here. Every decision hangs on the seed, the link's
number, the direction and the byte's offset alone, so the same traffic meets the same faults however the reads fall.
TCP loses no byte silently: what an application can meet is a link that ends, stalls, slows, or carries wrong bytes, so
that is what the faults are made of.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, fields
from enum import Enum
from typing import TypeAlias

from transfer.errors import ConfigError


class Direction(Enum):
    """Which way bytes go: UP from whoever connected to the upstream, DOWN back."""

    UP = "up"
    DOWN = "down"


DIRECTIONS: dict[str, frozenset[Direction]] = {
    "up": frozenset({Direction.UP}),
    "down": frozenset({Direction.DOWN}),
    "both": frozenset(Direction),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """What to do to each link; nothing by default. ConfigError for values out of range.

    drop             probability per segment that bytes of it are swallowed and the link is cut after
    corrupt          probability per segment that one bit of it is flipped
    delay_ms         every byte comes this much later ...
    jitter_ms        ... plus or minus up to this much, segment by segment, never out of order
    throttle_bytes_per_s  rate of each direction of each link; 0: as fast as it goes
    cut_after_bytes  once, when this many bytes passed over all links together: exactly so many; 0: never
    cut_every_bytes  each link, after exactly this many bytes of its own; 0: never
    half_open        instead of a cut: neither end is told, nothing passes any more
    reset            a cut is a TCP reset, which may overtake bytes, instead of an orderly end
    segment_bytes    what drop, corrupt and jitter are drawn for
    direction        up, down or both: which bytes the faults above concern and count
    """

    drop: float = 0.0
    corrupt: float = 0.0
    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    throttle_bytes_per_s: int = 0
    cut_after_bytes: int = 0
    cut_every_bytes: int = 0
    half_open: bool = False
    reset: bool = False
    segment_bytes: int = 16384
    direction: str = "both"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{field.name} must be finite and not negative, not {value!r}")
        for name in ("drop", "corrupt"):
            if getattr(self, name) > 1:
                raise ConfigError(f"{name} is a probability from 0 to 1, not {getattr(self, name)!r}")
        if self.segment_bytes < 1:
            raise ConfigError("segment_bytes must be at least 1")
        if self.jitter_ms > self.delay_ms:
            raise ConfigError(f"a jitter of {self.jitter_ms:g} ms needs a delay of at least as much")
        if self.direction not in DIRECTIONS:
            raise ConfigError(f"direction must be one of {', '.join(DIRECTIONS)}, not {self.direction!r}")

    def asked_for(self) -> tuple[str, ...]:
        """The names under which these faults are counted when they fire."""
        names = {
            "drop": self.drop, "corrupt": self.corrupt, "delay": self.delay_ms, "throttle": self.throttle_bytes_per_s,
            "cut_after": self.cut_after_bytes, "cut_every": self.cut_every_bytes,
        }  # fmt: skip
        return tuple(name for name, value in names.items() if value)


@dataclass(frozen=True, slots=True)
class Pass:
    """Forward these bytes, `delay_s` after they came."""

    data: bytes
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Swallow:
    """Read so many bytes and forward none of them."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class Cut:
    """End the link once everything before has left; nothing of it passes after."""

    reason: str


Step: TypeAlias = Pass | Swallow | Cut


class FaultPlan:
    """The plan of one proxy: hands out a plan per link and counts what fired in `fired`."""

    def __init__(self, faults: Faults, seed: int = 0) -> None:
        self.faults = faults
        self.seed = seed
        self.fired: Counter[str] = Counter()
        self.num_links = 0
        self.num_bytes = 0  # passed so far over all links, in the directions that count

    def link(self) -> LinkPlan:
        """The plan of the next link."""
        self.num_links += 1
        return LinkPlan(self, self.num_links - 1)

    def until_cut_after(self) -> int | None:
        """Bytes until the one cut of `cut_after_bytes`; None when there is none to come."""
        if not self.faults.cut_after_bytes or self.fired["cut_after"]:
            return None
        return self.faults.cut_after_bytes - self.num_bytes


class LinkPlan:
    """The plan of one link, until its cut."""

    def __init__(self, plan: FaultPlan, number: int) -> None:
        self.number = number
        self.is_cut = False
        self._plan = plan
        self._num_bytes = 0
        self._segments = {
            direction: _Segments(plan.faults, random.Random(f"{plan.seed}/{number}/{direction.value}"))
            for direction in DIRECTIONS[plan.faults.direction]
        }

    def feed(self, direction: Direction, data: bytes) -> list[Step]:
        """What becomes of the next bytes of one direction, in order. After a Cut all is swallowed."""
        if self.is_cut:
            return [Swallow(len(data))]
        segments = self._segments.get(direction)
        if segments is None:
            return [Pass(data)]
        steps: list[Step] = []
        start = 0
        while start < len(data) and not self.is_cut:
            segment = segments.current()
            end = min(len(data), start + segment.left)
            reason = None
            if segment.drop_at is not None and start + segment.drop_at < end:  # the first byte to vanish has come
                end, reason = start + segment.drop_at, "drop"
            for name, distance in self._cuts():
                if distance is not None and start + distance <= end:
                    end, reason = start + distance, name
            self._add(steps, segment.take(data[start:end], self._plan.fired), segment.delay_s)
            self._num_bytes += end - start
            self._plan.num_bytes += end - start
            start = end
            if reason is not None:
                self._plan.fired[reason] += 1
                self.is_cut = True
                steps += [Swallow(len(data) - start)] if start < len(data) else []
                steps.append(Cut(reason))
        return steps

    def _cuts(self) -> tuple[tuple[str, int | None], ...]:
        """Bytes until each orderly cut of this link; where two meet, the last named has it."""
        every = self._plan.faults.cut_every_bytes
        return (
            ("cut_every", every - self._num_bytes if every else None),
            ("cut_after", self._plan.until_cut_after()),
        )

    def _add(self, steps: list[Step], data: bytes, delay_s: float) -> None:
        if not data:
            return
        if delay_s:
            self._plan.fired["delay"] += 1
        if steps and isinstance(steps[-1], Pass) and steps[-1].delay_s == delay_s:
            steps[-1] = Pass(steps[-1].data + data, delay_s)
        else:
            steps.append(Pass(data, delay_s))


class _Segments:
    """The segments of one direction of one link: a fixed number of draws each, so that none depends on another."""

    def __init__(self, faults: Faults, rng: random.Random) -> None:
        self._faults = faults
        self._random = rng
        self._segment = _Segment(0, None, None, 0, 0.0)

    def current(self) -> _Segment:
        """The segment that the next byte belongs to."""
        if not self._segment.left:
            faults, draw = self._faults, self._random.random
            size = faults.segment_bytes
            drops, drop_at = draw() < faults.drop, int(draw() * size)
            corrupts, corrupt_at, bit = draw() < faults.corrupt, int(draw() * size), int(draw() * 8)
            delay_s = (faults.delay_ms + faults.jitter_ms * (2 * draw() - 1)) / 1000
            self._segment = _Segment(size, drop_at if drops else None, corrupt_at if corrupts else None, bit, delay_s)
        return self._segment


@dataclass(slots=True)
class _Segment:
    """One segment, offsets counted from its first byte that has not passed."""

    left: int
    drop_at: int | None
    corrupt_at: int | None
    bit: int
    delay_s: float

    def take(self, data: bytes, fired: Counter[str]) -> bytes:
        """The next bytes of this segment, as they leave."""
        at, size = self.corrupt_at, len(data)
        if at is not None and at < size:
            fired["corrupt"] += 1
            data = data[:at] + bytes([data[at] ^ 1 << self.bit]) + data[at + 1 :]
            at = None
        self.left -= size
        self.corrupt_at = None if at is None else at - size
        self.drop_at = None if self.drop_at is None else self.drop_at - size
        return data


class Pace:
    """Spreads bytes over time: how long to wait before the next ones. The caller brings the clock."""

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = -math.inf

    @property
    def piece_bytes(self) -> int:
        """How many bytes to send at once, so that they come evenly: a twentieth of a second's worth."""
        return max(1, self._bytes_per_s // 20)

    def wait_s(self, num_bytes: int, now: float) -> float:
        """Seconds to wait before `num_bytes` may leave; they count as sent."""
        start = max(now, self._free_at)
        self._free_at = start + num_bytes / self._bytes_per_s
        return start - now
