"""Outages: for how long which host or link did not work, so that a failure can be told from a needless one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outage:
    """From `start_s` to `end_s` something kept these two hosts apart; None means any host.

    leap_s: a clock leapt so far, at once, which is as long a silence to whoever reads it.
    """

    start_s: float
    end_s: float
    sender: str | None
    receiver: str | None
    leap_s: float = 0.0

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

    def excuse(self, sender: str, receiver: str, start_s: float, end_s: float) -> bool:
        """Whether outages between these hosts, taken together, lasted long enough to exhaust an end's patience."""
        total_s = sum(
            outage.share_s(start_s, end_s)
            for outage in self._outages
            if outage.sender in (None, sender) and outage.receiver in (None, receiver)
        )
        return total_s >= self._patience_s
