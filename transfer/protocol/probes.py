"""Probes: which of a sender's questions "how far are you?" may still be answered with an effect. Pure and bounded.

Probes travel in order with the Blocks. An answer therefore tells the fate of everything sent before its question:
what is not stored is lost. After the sender has acted on one loss, answers to earlier questions speak of the same one.
"""

from __future__ import annotations

MAX_OPEN_PROBES = 64


class Probes:
    """Nonces with the number of blocks sent before each."""

    def __init__(self) -> None:
        self._sent_before: dict[int, int] = {}
        self._nonce = 0

    def ask(self, num_sent: int) -> int:
        """The nonce of a new question, after `num_sent` blocks."""
        self._nonce += 1
        self._sent_before[self._nonce] = num_sent
        if len(self._sent_before) > MAX_OPEN_PROBES:
            del self._sent_before[next(iter(self._sent_before))]
        return self._nonce

    def answered(self, nonce: int) -> int | None:
        """Blocks sent before the question, once; None for an answer that says nothing any more."""
        sent_before = self._sent_before.pop(nonce, None)
        if sent_before is not None:
            for older in [other for other in self._sent_before if other < nonce]:
                del self._sent_before[older]
        return sent_before

    def clear(self) -> None:
        """What was asked so far counts no more."""
        self._sent_before.clear()
