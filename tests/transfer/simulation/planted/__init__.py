"""Planted bugs: one wrong line of the protocol each, put in while a `with` block lasts.

Every one is a mistake that somebody could make, and that the tests of a single stream on a good day would not notice.
"""

from __future__ import annotations

from tests.transfer.simulation.planted import receivers, senders, shares, slots
from tests.transfer.simulation.planted.receivers import Planted

BUGS: tuple[Planted, ...] = (*receivers.BUGS, *senders.BUGS, *shares.BUGS, *slots.BUGS)
