"""Outages: for how long which host or link did not work, so that a failure can be told from a needless one."""

from __future__ import annotations

from dataclasses import dataclass

from transfer.memory.segment_area import ASK_S
from transfer.memory.segment_host import STUCK_S


@dataclass(frozen=True, slots=True)
class Outage:
    """From `start_s` to `end_s` something kept these two hosts apart; None means any host.

    leap_s: a clock leapt so far, at once, which is as long a silence to whoever reads it. is_mute: only what a sender
    says of its slots was lost, and nothing else.
    """

    start_s: float
    end_s: float
    sender: str | None
    receiver: str | None
    leap_s: float = 0.0
    is_mute: bool = False

    def share_s(self, start_s: float, end_s: float) -> float:
        """How much of it lies between these times."""
        if self.end_s < start_s or self.start_s > end_s:
            return 0.0
        return self.leap_s + min(self.end_s, end_s) - max(self.start_s, start_s)


class Outages:
    """The outages of a run, and whether they excuse that an end gave a stream up."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._outages: list[Outage] = []

    def add(self, start_s: float, seconds: float, *, sender: str | None = None, receiver: str | None = None) -> None:
        """Something does not work from `start_s` on for so many seconds."""
        self._outages.append(Outage(start_s, start_s + seconds, sender, receiver))

    def add_leap(self, now: float, seconds: float, *, sender: str | None = None, receiver: str | None = None) -> None:
        """A clock leaps forward."""
        self._outages.append(Outage(now, now, sender, receiver, seconds))

    def add_mute(self, start_s: float, seconds: float, *, sender: str, receiver: str) -> None:
        """What a sender says of its slots is lost."""
        self._outages.append(Outage(start_s, start_s + seconds, sender, receiver, is_mute=True))

    def excuse(self, sender: str, receiver: str, start_s: float, end_s: float) -> bool:
        """Whether outages between these hosts, taken together, lasted long enough to exhaust an end's patience."""
        return self._total_s(sender, receiver, start_s, end_s, is_mute=False) >= self._patience_s

    def excuse_silence(self, sender: str, receiver: str, now: float) -> bool:
        """Whether a sender could not be heard for so long that a segment whose slots it had was abandoned."""
        start_s = now - 2 * STUCK_S
        return self._total_s(sender, receiver, start_s, now, is_mute=True) >= STUCK_S - 2 * ASK_S - 1

    def _total_s(self, sender: str, receiver: str, start_s: float, end_s: float, *, is_mute: bool) -> float:
        return sum(
            outage.share_s(start_s, end_s)
            for outage in self._outages
            if outage.sender in (None, sender) and outage.receiver in (None, receiver) and outage.is_mute <= is_mute
        )
