"""ReceiverLife: the state of one stream at its receiver, its losses, its ends and its limits in time. Pure.

`receiver_session` adds what the messages of the sender do; the protocol is described in `state`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transfer.errors import StreamAborted, StreamTimeout, TicketRejected, TransferError, error_code
from transfer.protocol.actions import Failed, FreeBlocks, ReceiverAction, Send, Timers
from transfer.protocol.messages import WITHDRAWN, Abort, Ack
from transfer.protocol.negotiate import Offer
from transfer.protocol.payload import IncomingPayload, TaggedPayload
from transfer.protocol.receiver_window import ReceiverWindow
from transfer.protocol.state import RECEIVER_TABLE, TERMINAL, ReceiverEvent, ReceiverState, apply
from transfer.protocol.stream_record import StreamFacts, StreamRecord
from transfer.protocol.take_over import orphaned_by
from transfer.protocol.ticket import Ticket, proven_accept

FLOWING = (ReceiverState.HELD, ReceiverState.ADMITTED)
MAY_STALL = (ReceiverState.GRANTED, *FLOWING)
WAITING = (ReceiverState.GRANTED, ReceiverState.HELD, ReceiverState.ORPHANED)
TURN_S = 0.5  # with blocks and without filling one: then others may have them


class ReceiverLife:
    """The part of a ReceiverSession that does not depend on what its sender says.

    `deadline`: in the clock of `now`. `next_ticket` issues the tickets of later epochs, `payload` says how
    the blocks of an epoch arrive.
    """

    def __init__(
        self,
        ticket: Ticket,
        *,
        offer: Offer,
        default_blocks: int,
        timers: Timers,
        now: float,
        deadline: float | None = None,
        take_over_s: float = 0.0,
        next_ticket: Callable[[Ticket], Ticket] = Ticket.next_epoch,
        payload: Callable[[StreamFacts], IncomingPayload] = TaggedPayload,
    ) -> None:
        self.offer = offer
        self.block_size = offer.block_size
        self.facts = StreamFacts(ticket=ticket, started=now, take_over_s=take_over_s, deadline=deadline)
        self.window = ReceiverWindow()
        self.num_repeated = 0
        self.timers = timers
        self.default_blocks = default_blocks
        self._next_ticket = next_ticket
        self._payload_of = payload
        self._payload: IncomingPayload | None = None
        self._acked = 0
        self._heard = self._progressed = now
        self.is_stalled = False  # it held blocks for a turn and filled none
        self.has_yielded = False  # admitted, it gave its last block to another stream, and filled none since
        self._turn_s = TURN_S
        self._late_serial = 0  # of the last revocation that a block on its way did not survive

    def record(self) -> StreamRecord:
        """All that a restart must not lose."""
        return StreamRecord(self.facts, self.window.record())

    def _restore(self, record: StreamRecord, delivered: int, now: float) -> None:
        self.facts = record.facts
        if self.state is ReceiverState.COMPLETE:  # but not yet told to anyone
            self.facts = replace(self.facts, state=ReceiverState.ADMITTED)
        self.window = ReceiverWindow.restore(record.window, delivered)
        if record.facts.terms is not None:
            self._payload = self._payload_of(record.facts)
        self._acked = 0
        self._heard = now
        self._move(now)

    def place_in(self, *, shared_memory: bool) -> None:
        """Where the blocks of this epoch are to be, once that is known: in memory that its sender writes, or not."""
        self.facts = replace(self.facts, shares_memory=shared_memory)

    @property
    def can_withdraw_segment(self) -> bool:
        """Whether a sender is there that was granted nothing under this epoch, and so wrote nothing."""
        return self.facts.accept is not None and self.window.num_rounds == 0

    def withdraw_segment(self) -> list[ReceiverAction]:
        """The segment that the Accept names is given up; may be repeated until its sender says that it heard."""
        facts = self.facts
        assert facts.accept is not None and facts.opened is not None and self.can_withdraw_segment
        accept = proven_accept(facts.ticket, replace(facts.accept, segment=WITHDRAWN), facts.opened)
        self.facts = replace(facts, accept=accept, shares_memory=False)
        return [Send(accept)]

    # -- what the shell asks --------------------------------------------------------------------------------------

    @property
    def ticket(self) -> Ticket:
        """The current epoch's."""
        return self.facts.ticket

    @property
    def state(self) -> ReceiverState:
        """Where the stream is."""
        return self.facts.state

    @property
    def total_rows(self) -> int | None:
        """Once announced."""
        return self.facts.total_rows

    @property
    def num_blocks(self) -> int:
        """Blocks of the announced total."""
        return -(-(self.facts.total_rows or 0) // self.block_size)

    @property
    def credit(self) -> int:
        """Blocks the sender may have unacknowledged."""
        return self.facts.terms.credit if self.facts.terms is not None else self.offer.credit

    @property
    def wants_nothing(self) -> bool:
        """Whether every block it needs was granted, for good: its demand stays what it is while only blocks come."""
        facts = self.facts
        if self.is_stalled or self.has_yielded:
            return False
        return facts.state is ReceiverState.ADMITTED and self.window.num_granted >= self.num_blocks

    @property
    def num_withdrawable(self) -> int:
        """Blocks that others may get, but for the last one, which it keeps while it moves.

        A stream that is admitted gives what is not filled yet, any other one whatever it holds.
        """
        window, state = self.window, self.facts.state
        if self.facts.is_admitted:
            return window.num_granted - window.next_index if state is ReceiverState.ADMITTED else 0
        return len(window.held) if state in WAITING else 0

    @property
    def needs_sender(self) -> bool:
        """Whether anything is still to come."""
        return self.facts.total_rows is None or self.window.next_index < self.num_blocks

    # -- ends and losses ------------------------------------------------------------------------------------------

    def fail(self, error: TransferError, *, tell_peer: bool = True) -> list[ReceiverAction]:
        """End the stream from this side; nothing happens when it is over already."""
        if self.state in TERMINAL:
            return []
        window = self.window
        blocks = (*window.held.values(), *(window.pending.withheld if window.pending is not None else ()))
        window.held.clear()
        self._apply(ReceiverEvent.FAIL)
        actions: list[ReceiverAction] = [Send(self.abort_message(error))] if tell_peer else []
        if blocks:
            actions.append(FreeBlocks(blocks, fenced=True))
        return [*actions, Failed(error)]

    def lost(self, error: TransferError, now: float, *, tell_peer: bool = True) -> list[ReceiverAction]:
        """The sender is gone: wait for another one where that is allowed, else end the stream."""
        if self.state in TERMINAL or self.state is ReceiverState.ORPHANED or not self.needs_sender:
            return []
        if self.facts.take_over_s <= 0:
            return self.fail(error, tell_peer=tell_peer)
        return self._orphan(error, now, tell_peer=tell_peer)

    def reissue(self, now: float) -> list[ReceiverAction]:
        """End the current epoch; `ticket` is for the next sender then. For a stream that `needs_sender` only."""
        return self._orphan(StreamTimeout("no other sender took the stream over in time"), now, tell_peer=True)

    def _orphan(self, error: TransferError, now: float, *, tell_peer: bool) -> list[ReceiverAction]:
        stale = TicketRejected(f"epoch {self.ticket.epoch} of stream {self.ticket.stream_id} is over")
        abort = self.abort_message(stale)
        told: list[ReceiverAction] = [Send(abort)] if tell_peer and self.facts.opened is not None else []
        facts, actions = orphaned_by(self.facts, self.window, error, self._next_ticket(self.ticket), now)
        self.facts = facts
        self._apply(ReceiverEvent.ORPHAN)
        return [*told, *actions]  # said first, as in `fail`

    def abort_message(self, error: TransferError) -> Abort:
        """The Abort that tells the sender of `error`."""
        text = error.message if isinstance(error, StreamAborted) else str(error)
        return Abort(**self._ids(), code=error_code(error), message=text)

    # -- time -----------------------------------------------------------------------------------------------------

    def due(self) -> float:
        """When `tick` next has something to do, if nothing happens before."""
        timers, facts, state = self.timers, self.facts, self.facts.state
        if self._has_news():
            return 0.0
        if state is ReceiverState.REGISTERED:
            due = self._progressed + timers.stream_timeout_s
        elif state is ReceiverState.ORPHANED:
            due = facts.orphaned_at + self._orphan_limit_s()
        else:
            due = self._heard + timers.idle_timeout_s if self.needs_sender else math.inf
            if not self._sender_owes():
                due = min(due, self._progressed + timers.admit_timeout_s)
        if self._may_stall():
            due = min(due, self._progressed + self._turn_s)
        return due if facts.deadline is None else min(due, facts.deadline)

    def tick(self, now: float) -> list[ReceiverAction]:
        """Check the limits; send an acknowledgement that waited for company.

        A sender that probes is alive, however long its producer takes: the producer's owner limits that.
        """
        timers, facts, state = self.timers, self.facts, self.facts.state
        if state in TERMINAL:
            return []
        if facts.deadline is not None and now >= facts.deadline:
            return self.fail(StreamTimeout("the stream's deadline passed"))
        if now - self._progressed >= self._turn_s and self._may_stall():
            self.is_stalled = True
        if state is ReceiverState.REGISTERED:
            if now - self._progressed >= timers.stream_timeout_s:
                return self.fail(StreamTimeout(f"no sender opened the stream for {timers.stream_timeout_s:g} s"))
            return []
        if state is ReceiverState.ORPHANED:
            assert facts.loss is not None
            return self.fail(facts.loss) if now - facts.orphaned_at >= self._orphan_limit_s() else []
        if self.needs_sender and now - self._heard >= timers.idle_timeout_s:
            return self.lost(StreamTimeout(f"the sender was silent for {timers.idle_timeout_s:g} s"), now)
        if not self._sender_owes() and now - self._progressed >= timers.admit_timeout_s:
            waited = f"the stream was neither granted blocks nor admitted for {timers.admit_timeout_s:g} s"
            return self.fail(StreamTimeout(f"{waited} (state {state.value})"))
        return [Send(self._ack())] if self._has_news() else []

    # -- helpers --------------------------------------------------------------------------------------------------

    def _apply(self, event: ReceiverEvent) -> None:
        following = apply(RECEIVER_TABLE, self.facts.state, event)
        if following is not self.facts.state:
            self.facts = replace(self.facts, state=following)

    def _ids(self) -> dict[str, Any]:
        ticket = self.facts.ticket
        return {"stream_id": ticket.stream_id, "epoch": ticket.epoch}

    def _move(self, now: float) -> None:
        """Something went on: a turn begins anew."""
        self._progressed = now
        self.is_stalled = False

    def _may_stall(self) -> bool:
        return not self.is_stalled and self.facts.state in MAY_STALL and bool(self.window.held)

    def _filled_some(self, now: float) -> None:
        """Its sender has rows: it moves again."""
        self._heard = now
        self._move(now)
        self.has_yielded = False
        self._turn_s = max(TURN_S, self._turn_s / 2)

    def _came_late(self) -> None:
        """A block was on its way when the last one was withdrawn: the next turn is to be long enough for it."""
        serial = self.window.serial
        if self.has_yielded and self._late_serial != serial:
            self._late_serial = serial
            self._turn_s = min(2 * self._turn_s, self.timers.idle_timeout_s)

    def _has_news(self) -> bool:
        """Whether more is stored than the sender was told.

        Not before this epoch's announcement came: its sender takes the first Ack for the answer to that.
        """
        return self.facts.is_announced and self._acked < self.window.next_index

    def _sender_owes(self) -> bool:
        if self.state is ReceiverState.GRANTED:
            return True
        return self.state in FLOWING and self.window.next_index < self.window.num_granted

    def _orphan_limit_s(self) -> float:
        return self.facts.take_over_s if self.facts.take_over_s > 0 else self.timers.stream_timeout_s

    def _owes_ack(self) -> bool:
        """Whether the sender is to hear now what is stored: soon enough that it need not stop, and seldom.

        Of the last blocks of an admitted stream the Close says the same.
        """
        window = self.window
        if not self._has_news():
            return False
        if window.next_index >= self.num_blocks and self.facts.state is ReceiverState.ADMITTED:
            return False
        return window.next_index >= window.num_granted or 2 * (window.next_index - self._acked) >= self.credit

    def _ack(self) -> Ack:
        window = self.window
        self._acked = window.next_index
        kept = window.next_index if self.facts.is_admitted else 0
        return Ack(**self._ids(), serial=window.serial, next_index=window.next_index, kept_index=kept)

    def _said(self) -> list[ReceiverAction]:
        """The Accept of this epoch, and what is open since; nothing while no sender is there."""
        accept = self.facts.accept
        return [] if accept is None else [Send(accept), *self._open_questions()]

    def _open_questions(self) -> list[ReceiverAction]:
        pending = self.window.pending
        actions: list[ReceiverAction] = [Send(grant) for grant in self.window.open_grants]
        return actions if pending is None else [*actions, Send(pending.revoke)]
