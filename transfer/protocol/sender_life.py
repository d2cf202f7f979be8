"""SenderLife: the state of one stream at its sender, its end and its limits in time. Pure.

`sender_session` adds what the producer and the receiver do; the protocol is described in `state`.
"""

from __future__ import annotations

from typing import Any

from transfer.errors import StreamAborted, StreamTimeout, TransferError, error_code
from transfer.protocol.actions import Failed, Send, SenderAction, Timers
from transfer.protocol.messages import Abort, Announce, Attached, Body, Open, Probe
from transfer.protocol.negotiate import Offer, Terms
from transfer.protocol.probes import Probes
from transfer.protocol.sender_grants import SenderGrants
from transfer.protocol.state import SENDER_TABLE, TERMINAL, SenderEvent, SenderState, apply
from transfer.protocol.ticket import Ticket, proven_open


class SenderLife:
    """The part of a SenderSession that does not depend on what is said.

    `nonce`: 16 random bytes, new for every session. `deadline`: in the clock of `now`, None for no limit.
    """

    def __init__(
        self,
        ticket: Ticket,
        *,
        offer: Offer,
        nonce: bytes,
        content_key: str,
        timers: Timers,
        now: float,
        deadline: float | None = None,
    ) -> None:
        self.state = SenderState.IDLE
        self.ticket = ticket
        self.offer = offer
        self.nonce = nonce
        self.block_size = offer.block_size
        self.content_key = content_key
        self.deadline = deadline
        self.terms: Terms | None = None
        self.first_index = 0  # where this sender goes on
        self.total_rows: int | None = None
        self.num_acked = 0  # blocks stored at the receiver
        self.num_sent = 0  # blocks sent at least once (and not revoked since)
        self.num_resent = 0
        self._sent_end = 0  # blocks below were sent once, under whatever grant
        self._ids: dict[str, Any] = {"stream_id": ticket.stream_id, "epoch": ticket.epoch}
        self._grants = SenderGrants(offer.block_size, 0)
        self._num_kept = 0  # blocks stored for good
        self._items: tuple[Body, ...] = ()
        self._rows_ready = 0  # every row below is there, or not needed
        self._credit = 0
        self._serial = 0
        self._is_heard = False  # the announcement was acknowledged
        self._waits_for_ack = False  # blocks take another path than the announcement
        self._generation: int | None = None  # of the segment, once asked for: 0 where it cannot be used
        self._num_placed = 0  # blocks below are in their slots already, and so need no credit
        self._probes = Probes()
        self._timers = timers
        self._started = self._heard = now
        self._acked_at = now  # when an Ack was last owed and came, or began to be owed
        self._gap = timers.open_retry_s
        self._next_probe = now + self._gap

    @property
    def num_rounds(self) -> int:
        """Grants taken and not revoked whole."""
        return self._grants.num_rounds

    def attached(self, generation: int) -> list[SenderAction]:
        """The receiver's segment was mapped (0: it cannot be, or was withdrawn). Its grants are for slots from now on.

        What was withdrawn stays so: who was still getting it comes too late.
        """
        if self._generation == 0:
            return []
        self._generation = generation
        return [self._attachment(generation)]

    def fail(self, error: TransferError, *, tell_peer: bool = True) -> list[SenderAction]:
        """End the stream from this side; nothing happens when it is over already."""
        if self.state in TERMINAL:
            return []
        self._apply(SenderEvent.FAIL)
        code, text = error_code(error), error.message if isinstance(error, StreamAborted) else str(error)
        abort = Abort(**self._ids, code=code, message=text)
        return [*([Send(abort)] if tell_peer else []), Failed(error)]

    # -- time -----------------------------------------------------------------------------------------------------

    def due(self) -> float:
        """When `tick` next has something to do, if nothing happens before."""
        due = min(self._next_probe, self._heard + self._timers.idle_timeout_s)
        if self.num_sent > self.num_acked:
            due = min(due, self._acked_at + self._timers.stream_timeout_s)
        return due if self.deadline is None else min(due, self.deadline)

    def tick(self, now: float) -> list[SenderAction]:
        """Check the limits and probe when nothing moved for a while.

        How long the producer may take is for its owner to say (`deadline`, `abort`); what the peer owes is limited.
        """
        if self.state in TERMINAL or self.state is SenderState.IDLE:
            return []
        if self.deadline is not None and now >= self.deadline:
            return self.fail(StreamTimeout("the stream's deadline passed"))
        if now - self._heard >= self._timers.idle_timeout_s:
            return self.fail(StreamTimeout(f"the receiver was silent for {self._timers.idle_timeout_s:g} s"))
        limit = self._timers.stream_timeout_s
        if self.num_sent > self.num_acked and now - self._acked_at >= limit:
            return self.fail(StreamTimeout(f"block {self.num_acked} was sent and not acknowledged for {limit:g} s"))
        if now < self._next_probe:
            return []
        self._gap = min(self._gap * 2, self._timers.max_probe_s)
        self._next_probe = now + self._gap
        return self._probe(now)

    def _probe(self, now: float) -> list[SenderAction]:
        if self.state is SenderState.OPENING:
            return [Send(self._open(now))]
        probe = Send(Probe(**self._ids, nonce=self._probes.ask(self.num_sent)))
        if self._generation is not None and not self.num_rounds:  # it may wait for that
            return [self._attachment(self._generation), probe]
        if self.state is SenderState.SENDING and not self._is_heard:
            return [Send(self._announcement()), probe]
        return [probe]

    # -- helpers --------------------------------------------------------------------------------------------------

    def _apply(self, event: SenderEvent) -> None:
        self.state = apply(SENDER_TABLE, self.state, event)

    def _note_progress(self, now: float) -> None:
        self._gap = self._timers.probe_s
        self._next_probe = now + self._gap

    def _note_news(self, now: float) -> None:
        """Grants come and go: no answer to what waits for its Ack, a block or the announcement: that is asked for."""
        is_unheard = self.state is SenderState.SENDING and not self._is_heard
        if self.num_sent <= self.num_acked and not is_unheard:
            self._note_progress(now)

    def _num_blocks(self) -> int:
        return -(-(self.total_rows or 0) // self.block_size)

    def _row_after(self, num_blocks: int) -> int:
        return min(num_blocks * self.block_size, self.total_rows or 0)

    def _open(self, now: float) -> Open:
        left_ms = None if self.deadline is None else max(0, int((self.deadline - now) * 1000))
        return proven_open(self.ticket, self.nonce, self.offer, self.content_key, left_ms)

    def _attachment(self, generation: int) -> Send:
        return Send(Attached(**self._ids, generation=generation))

    def _announcement(self) -> Announce:
        return Announce(
            **self._ids,
            total_rows=self.total_rows or 0,
            allocated_tokens=0 if self.first_index else self._grants.round0_tokens,
            block_size=self.block_size,
            items=self._items,
        )
