"""Requests and attempts: one plan, the streams opened for it, the senders each stream had, and who is to blame.

Plain records, and one judgement: whether what was done to a stream explains that an end of it gave up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transfer.errors import PeerLost, StreamAborted, StreamTimeout, TicketRejected, TransferError
from transfer.protocol.ticket import Ticket
from transfer.simulation.books import SenderBook, StreamBook
from transfer.simulation.consumers import Consumer
from transfer.simulation.hosts import ReceiverHost, SenderHost
from transfer.simulation.outages import Outages
from transfer.simulation.producers import Producer
from transfer.simulation.scenario import RequestPlan
from transfer.streams.receive_areas import NO_SEGMENT
from transfer.streams.stream_sender import OutgoingStream

SLACK_S = 1.0


@dataclass(slots=True)
class Sending:
    """One epoch of an attempt at its sender. harms: what explains that this sender fails."""

    ticket: Ticket
    host: SenderHost
    book: SenderBook
    stream: OutgoingStream | None = None
    producer: Producer | None = None
    harms: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Attempt:
    """One stream of a request: its receiver's life, and the senders it had. harms: what explains that it fails."""

    host: ReceiverHost
    book: StreamBook
    consumer: Consumer
    started_s: float
    sendings: list[Sending]
    is_over: bool = False
    is_complete: bool = False
    is_replacing: bool = False  # another sender is being looked for
    lost_s: float | None = None  # since when it has had no sender, as far as the onlooker knows
    harms: list[str] = field(default_factory=list)

    @property
    def stream_id(self) -> str:
        """Of all its epochs."""
        return self.book.stream_id

    @property
    def sending(self) -> Sending:
        """The current epoch."""
        return self.sendings[-1]

    @property
    def has_sender(self) -> bool:
        """Whether a sender of the current epoch is there and goes on."""
        sender = self.sending.book
        is_there = self.book.opened_epoch == self.book.epoch and not self.book.is_orphaned
        return is_there and sender.process.is_alive and sender.outcome is None


@dataclass(slots=True)
class Request:
    """One plan and how far it is. outcome: None until it is over."""

    plan: RequestPlan
    attempts: list[Attempt] = field(default_factory=list)
    num_messages: int = 0
    num_contents: int = 1
    outcome: str | None = None
    is_falsified: bool = False  # its misaligned grant was carried

    @property
    def attempt(self) -> Attempt | None:
        """The attempt under way."""
        return self.attempts[-1] if self.attempts and not self.attempts[-1].is_over else None


def explains_receiver(request: Request, attempt: Attempt, outages: Outages, error: TransferError, now: float) -> bool:
    """Whether a consumer's failure has a reason that was put into the run."""
    if attempt.harms or _is_expired(request, attempt, error, now):
        return True
    if attempt.lost_s is not None and not attempt.book.opened_epoch and isinstance(error, StreamTimeout):
        return True  # its only sender died before it could open the stream, and nobody noticed
    waited_s = 0.0 if attempt.lost_s is None else now + attempt.host.process.leap_s - attempt.lost_s
    if attempt.lost_s is not None and not attempt.has_sender and waited_s >= request.plan.take_over_s - SLACK_S:
        return True
    names = {sending.host.name for sending in attempt.sendings}
    if isinstance(error, PeerLost) and error.args == NO_SEGMENT.args:
        is_abandoned = _was_cut(attempt) or any(outages.excuse_silence(name, attempt.host.name, now) for name in names)
        return is_abandoned and bool(attempt.book.slot_epochs)  # who was granted none of it goes over the wire
    return any(outages.excuse(name, attempt.host.name, attempt.started_s, now) for name in names)


def explains_sender(
    request: Request, attempt: Attempt, sending: Sending, outages: Outages, error: TransferError, now: float
) -> bool:
    """Whether a producer's failure has a reason that was put into the run."""
    if sending.harms or attempt.harms or _is_expired(request, attempt, error, now):
        return True
    if attempt.is_over and not attempt.is_complete:
        return True  # its receiver gave up first, and was asked why
    is_abandoned = _was_cut(attempt) or outages.excuse_silence(sending.host.name, attempt.host.name, now)
    if isinstance(error, TicketRejected) and is_abandoned and sending.ticket.epoch in attempt.book.slot_epochs:
        return True
    return outages.excuse(sending.host.name, attempt.host.name, attempt.started_s, now)


def _was_cut(attempt: Attempt) -> bool:
    """Whether the segment that its sender was asked to map was lost, and its receiver heard so, even if afterwards."""
    invited = attempt.book.invited
    return invited is not None and invited.is_cut and invited.is_abandoned


def _is_expired(request: Request, attempt: Attempt, error: TransferError, now: float) -> bool:
    deadline_s = request.plan.deadline_s
    if deadline_s is None or not isinstance(error, (StreamTimeout, StreamAborted)):  # aborted: the loop died meanwhile
        return False
    hosts = (attempt.host, *(sending.host for sending in attempt.sendings))
    leap_s = max(host.process.leap_s for host in hosts)
    return now + leap_s - attempt.started_s >= deadline_s - 0.05
