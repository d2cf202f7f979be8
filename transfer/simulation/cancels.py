"""Cancels: every way in which a request can be given up, from either end, in any state."""

from __future__ import annotations

import random
from collections import Counter

from transfer.simulation.attempts import Attempt, Request
from transfer.simulation.controller import Controller


class Cancels:
    """Gives requests of `controller` up."""

    def __init__(self, controller: Controller, dice: random.Random, fired: Counter[str]) -> None:
        self._controller = controller
        self._dice = dice
        self._fired = fired

    def ways(self) -> list[tuple[str, Request, str]]:
        """Every way to give up a request now: the kind it counts as, the request, and the side that gives up."""
        found = []
        for request in self._controller.requests:
            attempt = request.attempt
            if attempt is None or request.outcome is not None:
                continue
            state = attempt.host.states().get(attempt.stream_id, "unknown")
            found.append((f"cancel_by_receiver_{state}", request, "receiver"))
            stream = attempt.sending.stream
            if stream is not None and attempt.sending.book.process.is_alive and attempt.sending.book.outcome is None:
                found.append((f"cancel_by_sender_{stream.session.state.value}", request, "sender"))
        return found

    def cancel(self, request: Request, side: str) -> None:
        """Give a request up, from one of its ends; nothing happens when that end is not there."""
        attempt = request.attempt
        kind = next((kind for kind, *which in self.ways() if which == [request, side]), None)
        if attempt is None or kind is None:
            return
        self._fired[kind] += 1
        attempt.harms.append("cancel")
        request.outcome = "cancelled"
        if side == "sender" and attempt.sending.stream is not None:
            stream = attempt.sending.stream
            attempt.sending.host.process.after(0.0, stream.abort, "Cancelled", "the producer gives up")
            return
        attempt.is_over = True
        attempt.host.process.after(0.0, self._abort, attempt)

    def _abort(self, attempt: Attempt) -> None:
        attempt.consumer.leave()
        attempt.book.is_ended = attempt.book.is_given_up = True
        if self._dice.random() < 0.5:
            attempt.host.receiver.abort(attempt.stream_id, "Cancelled", "the consumer gives up")
        else:
            attempt.host.receiver.close(attempt.stream_id)
