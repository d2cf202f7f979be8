"""Provisions: what an attempt needs: a ticket, a sender with its content, and the admission of its receiver."""

from __future__ import annotations

import random

from transfer.protocol.ticket import SECRET_BYTES, STREAM_ID_CHARS, Ticket
from transfer.simulation.attempts import Request, Sending
from transfer.simulation.books import SenderBook
from transfer.simulation.consumers import Admission
from transfer.simulation.content import Content
from transfer.simulation.hosts import ReceiverHost, SenderHost
from transfer.simulation.judge import Judge
from transfer.simulation.scenario import Scenario


class Provisions:
    """For every request of a run, from the dice of its controller."""

    def __init__(self, scenario: Scenario, judge: Judge, senders: list[SenderHost], dice: random.Random) -> None:
        self._scenario = scenario
        self._judge = judge
        self._senders = senders
        self._dice = dice
        self._admissions: dict[object, Admission] = {}
        self._contents: dict[tuple[int, int], Content] = {}

    def new_ticket(self, request: Request) -> Ticket:
        """Of the next attempt."""
        secret = self._dice.randbytes(SECRET_BYTES)
        last = request.attempts[-1] if request.attempts else None
        if last is not None and not last.book.process.is_alive and self._dice.random() < 0.5:
            # the receiver that issued the epochs is gone: its next life begins with one that it cannot have issued
            epoch = last.book.epoch + 10
            return Ticket(stream_id=last.stream_id, epoch=epoch, owner="request", secret=secret)
        stream_id = self._dice.randbytes(STREAM_ID_CHARS // 2).hex()
        return Ticket(stream_id=stream_id, epoch=1, owner="request", secret=secret)

    def free_sender(self, request: Request) -> SenderHost | None:
        """For a first attempt the host of its plan; then one that is up and does not send this stream already."""
        if not request.attempts:
            return self._senders[request.plan.sender]
        used = request.attempts[-1].stream_id
        free = [host for host in self._senders if host.is_up and not host.num_stops and not host.sends(used)]
        return self._dice.choice(free) if free else None

    def sending(self, request: Request, ticket: Ticket, host: SenderHost, content_number: int) -> Sending:
        """A new epoch of an attempt."""
        content = self._content(request, content_number)
        key = content.key if request.plan.has_key else ""
        return Sending(ticket, host, SenderBook(process=host.process, content=content, key=key))

    def _content(self, request: Request, number: int) -> Content:
        found = self._contents.get((request.plan.number, number))
        if found is None:
            key = f"request-{request.plan.number}-{number}"
            num_rows = request.plan.num_rows
            if number:  # another preprocessing may well give another number of rows
                num_rows = self._dice.choice(
                    (num_rows, num_rows + 1, max(0, num_rows - self._scenario.config.block_size))
                )
            found = Content(key, self._scenario.planes, num_rows, f"{self._scenario.seed}/{key}")
            self._contents[request.plan.number, number] = found
            self._judge.contents.append(found)
        return found

    def admission(self, host: ReceiverHost) -> Admission:
        """Of one life of a receiver."""
        found = self._admissions.get(host.process)
        if found is None:
            dice = random.Random(f"{self._scenario.seed}/admission/{host.process}")
            found = Admission(host, self._scenario.admission, self._scenario.budget_rows, dice)
            self._admissions[host.process] = found
        return found
