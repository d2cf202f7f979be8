"""Controller: what a cluster's control plane does round streams: issues tickets, notices losses, tries again.

A request goes on, attempt after attempt, until its consumer has every row or somebody gave it up. That a stream may
fail is part of the promises; that a request never ends is not, and neither is a failure that nothing explains.
"""

from __future__ import annotations

import random
from collections import Counter

from transfer.errors import TransferError
from transfer.protocol.actions import StreamStats
from transfer.protocol.ticket import Ticket
from transfer.simulation.attempts import Attempt, Request, Sending, explains_receiver, explains_sender
from transfer.simulation.books import StreamBook
from transfer.simulation.consumers import Consumer
from transfer.simulation.hosts import ReceiverHost, SenderHost
from transfer.simulation.judge import Judge
from transfer.simulation.outages import Outages
from transfer.simulation.producers import Producer, Work
from transfer.simulation.provisions import Provisions
from transfer.simulation.scenario import Scenario
from transfer.simulation.slot_rules import SlotRules
from transfer.simulation.timeline import Timeline
from transfer.streams.stream_sender import OutgoingStream
from transfer.tensors import PlaneSpec

MAX_ATTEMPTS = 60


class Controller:
    """Drives every request of a run."""

    def __init__(
        self,
        scenario: Scenario,
        timeline: Timeline,
        judge: Judge,
        outages: Outages,
        receivers: list[ReceiverHost],
        senders: list[SenderHost],
        rules: SlotRules,
        fired: Counter[str],
    ) -> None:
        self.scenario = scenario
        self.requests = [Request(plan) for plan in scenario.requests]
        self.fired = fired
        self.streams: dict[str, tuple[Request, Attempt]] = {}  # by stream id, the latest
        self._timeline = timeline
        self._judge = judge
        self._outages = outages
        self._rules = rules
        self._receivers = receivers
        self.dice = random.Random(f"{scenario.seed}/controller")
        self._provisions = Provisions(scenario, judge, senders, self.dice)
        for request in self.requests:
            timeline.after(request.plan.start_s, self.start, request)

    @property
    def is_done(self) -> bool:
        """Whether every request is over."""
        return all(request.outcome is not None for request in self.requests)

    # -- attempts -------------------------------------------------------------------------------------------------

    def start(self, request: Request) -> None:
        """Begin an attempt, once both hosts are up."""
        if request.outcome is not None or request.attempt is not None:
            return
        host, plan = self._receivers[request.plan.receiver], request.plan
        sender = self._provisions.free_sender(request)
        if not host.is_up or sender is None or not sender.is_up:
            self._timeline.after(0.3, self.start, request)
            return
        if len(request.attempts) >= MAX_ATTEMPTS:
            self._judge.complain("5: every request ends", plan.number, f"{MAX_ATTEMPTS} attempts failed")
            return
        ticket = self._provisions.new_ticket(request)
        sending = self._provisions.sending(request, ticket, sender, 0)
        book = StreamBook(ticket.stream_id, plan.number, host.process, ticket.epoch, self._judge.watches[host.process])
        book.senders[ticket.epoch] = sending.book
        self._judge.streams[ticket.stream_id] = book
        consumer = Consumer(
            book, self._judge, self._provisions.admission(host), lambda end: self._consumer_ended(request, attempt, end)
        )
        attempt = Attempt(host, book, consumer, self._timeline.now, [sending])
        request.attempts.append(attempt)
        self.streams[ticket.stream_id] = request, attempt
        delays = (0.0, self.dice.choice((0.0, 0.001, 0.5)))
        receiver_delay_s, sender_delay_s = reversed(delays) if plan.sender_first else delays
        host.process.after(receiver_delay_s, self._listen, request, attempt)
        sender.process.after(sender_delay_s, self._send, request, attempt, sending)
        if plan.deadline_s is not None and len(request.attempts) == 1:
            self._timeline.after(plan.deadline_s + 1.0, self._check_deadline, request, False)

    def _listen(self, request: Request, attempt: Attempt) -> None:
        if attempt.is_over:
            return
        attempt.host.receiver.open(
            attempt.sending.ticket,
            attempt.consumer,
            deadline_s=self._deadline_left(request, attempt),
            take_over_s=request.plan.take_over_s,
        )
        attempt.host.process.after(0.0, self._registered, attempt)

    def _registered(self, attempt: Attempt) -> None:
        attempt.book.is_registered = True

    def _deadline_left(self, request: Request, attempt: Attempt) -> float | None:
        deadline_s = request.plan.deadline_s
        if deadline_s is None or len(request.attempts) > 1:
            return None
        return max(0.001, attempt.started_s + deadline_s - self._timeline.now)

    def _send(self, request: Request, attempt: Attempt, sending: Sending) -> None:
        if attempt.is_over or attempt.sending is not sending:
            return
        host, book, plan = sending.host, sending.book, request.plan
        planes = self.scenario.planes
        if plan.is_mismatched and len(request.attempts) == 1:
            planes = _other_planes(planes)
            attempt.harms.append("mismatched_blocks")
            self.fired["mismatched_blocks"] += 1
        stream = sending.stream = host.sender.open(
            sending.ticket,
            attempt.host.address,
            None,
            planes,
            book.key,
            deadline_s=self._deadline_left(request, attempt) if plan.does_sender_know_deadline else None,
        )
        stream.on_done(lambda stream: self._sender_ended(request, attempt, sending, stream))
        if planes is self.scenario.planes:
            dice = random.Random(f"{self.scenario.seed}/producer/{sending.ticket.stream_id}/{sending.ticket.epoch}")
            work = Work(
                process=host.process,
                book=attempt.book,
                epoch=sending.ticket.epoch,
                content=book.content,
                plan=plan,
                block_size=self.scenario.config.block_size,
                in_place=bool(self.scenario.local_senders) and dice.random() < self.scenario.in_place,
            )
            sending.producer = Producer(stream, work, self._rules, dice)

    # -- ends -----------------------------------------------------------------------------------------------------

    def _consumer_ended(self, request: Request, attempt: Attempt, outcome: StreamStats | TransferError) -> None:
        attempt.is_over = True
        if isinstance(outcome, StreamStats):
            attempt.is_complete = True
            request.outcome = request.outcome or "complete"
            return
        if not explains_receiver(request, attempt, self._outages, outcome, self._timeline.now):
            self._complain_of_failure(request, "receiver", outcome)
        if "deadline" in str(outcome):
            self.fired["deadline"] += 1
            request.outcome = request.outcome or "expired"
        self._timeline.after(self.dice.uniform(0.01, 1), self.start, request)

    def _sender_ended(self, request: Request, attempt: Attempt, sending: Sending, stream: OutgoingStream) -> None:
        try:
            outcome: StreamStats | TransferError = stream.result(0)
        except TransferError as error:
            outcome = error
        had_sender = attempt.has_sender
        self._judge.sender_ended(attempt.book, sending.book, outcome)
        if isinstance(outcome, StreamStats):
            return
        if not explains_sender(request, attempt, sending, self._outages, outcome, self._timeline.now):
            self._complain_of_failure(request, "sender", outcome)
        if sending is attempt.sending and not attempt.is_over and request.outcome is None:
            self._sender_lost(request, attempt, had_sender)

    def _complain_of_failure(self, request: Request, side: str, error: TransferError) -> None:
        self._judge.complain(
            "3: a stream outlives faults shorter than its limits",
            request.plan.number,
            f"its {side} failed without a reason: {type(error).__name__}: {error}",
        )

    def _check_deadline(self, request: Request, is_awake: bool) -> None:
        """`is_awake`: its receiver ran a second ago, too."""
        attempt = request.attempts[0]
        if attempt.is_over:
            return
        runs = attempt.host.is_up and not attempt.host.num_stops
        if runs and is_awake:
            text = "it goes on two seconds after its deadline"
            self._judge.complain("6: a deadline ends a stream", request.plan.number, text)
        self._timeline.after(1.0, self._check_deadline, request, runs)

    # -- losses and take-over -------------------------------------------------------------------------------------

    def receiver_crashed(self, host: ReceiverHost) -> int:
        """Its attempts are lost; they start anew when it is up again. How many there were."""
        hit = 0
        for request in self.requests:
            for attempt in request.attempts:
                if attempt.book.process is host.process:
                    attempt.harms.append("crash_receiver")  # also for a sender that waits for the last word
                    hit += not attempt.is_over
                    attempt.is_over = attempt.book.is_ended = True
            self._timeline.after(self.dice.uniform(0, 2), self.start, request)
        return hit

    def sender_crashed(self, host: SenderHost) -> int:
        """Its attempts lost their sender; sometimes somebody notices before their receivers do."""
        hit = 0
        for request in self.requests:
            attempt = request.attempt
            if attempt is not None and attempt.sending.host is host:
                hit += 1
                attempt.sending.harms.append("crash_sender")
                self._sender_lost(request, attempt, attempt.has_sender)
        return hit

    def segment_lost(self, generation: int) -> int:
        """A lifeline of this segment ended: who was granted slots of it lost its sender. How many are (to be) there."""
        hit, watch = 0, self._judge.segments[generation]
        watch.is_cut = True
        for request in self.requests:
            attempt = request.attempt
            if attempt is None or watch not in (attempt.book.area, attempt.book.invited):
                continue
            hit += 1
            if attempt.book.epoch in attempt.book.slot_epochs:
                attempt.harms.append("lifeline_lost")
                self._sender_lost(request, attempt, attempt.has_sender)
        return hit

    def _sender_lost(self, request: Request, attempt: Attempt, had_sender: bool) -> None:
        if attempt.lost_s is None or had_sender:
            attempt.lost_s = self._timeline.now
        if self.dice.random() < 0.8:
            number = request.num_contents if self.dice.random() < 0.2 else 0
            delay_s = self.dice.choice((0.0, self.dice.uniform(0, 3)))
            self._timeline.after(delay_s, self.replace_sender, request, attempt, number)

    def replace_sender(self, request: Request, attempt: Attempt, content_number: int) -> None:
        """Let another sender go on with an attempt, unless it is over or that is under way."""
        process = attempt.host.process
        if attempt.is_over or attempt.is_replacing or not process.is_alive or request.outcome is not None:
            return
        attempt.is_replacing = True
        request.num_contents = max(request.num_contents, content_number + 1)
        attempt.sending.harms.append("fenced")
        if attempt.lost_s is None or attempt.has_sender:
            attempt.lost_s = self._timeline.now
        process.after(0.0, self._reissue, request, attempt, content_number)

    def _reissue(self, request: Request, attempt: Attempt, content_number: int) -> None:
        if attempt.is_over:
            return
        receiver = attempt.host.receiver
        if self.dice.random() < 0.5 and (request.plan.take_over_s or not attempt.has_sender):
            receiver.sender_lost(attempt.stream_id)
        receiver.reissue(attempt.stream_id, lambda ticket: self._reissued(request, attempt, content_number, ticket))

    def _reissued(self, request: Request, attempt: Attempt, content_number: int, ticket: Ticket | None) -> None:
        if ticket is None or attempt.is_over:
            attempt.is_replacing = False
            return
        self._judge.reissued(attempt.book, ticket.epoch)
        self._timeline.after(0.0, self._send_instead, request, attempt, content_number, ticket)

    def _send_instead(self, request: Request, attempt: Attempt, content_number: int, ticket: Ticket) -> None:
        if attempt.is_over:
            return
        host = self._provisions.free_sender(request)
        if host is None:
            self._timeline.after(0.3, self._send_instead, request, attempt, content_number, ticket)
            return
        attempt.is_replacing = False
        sending = self._provisions.sending(request, ticket, host, content_number)
        attempt.sendings.append(sending)
        attempt.book.senders[ticket.epoch] = sending.book
        host.process.after(self.dice.choice((0.0, 0.01, 1.0)), self._send, request, attempt, sending)


def _other_planes(planes: tuple[PlaneSpec, ...]) -> tuple[PlaneSpec, ...]:
    first = planes[0]
    return (PlaneSpec(name=first.name, dtype=first.dtype, row_shape=(*first.row_shape, 7)), *planes[1:])
