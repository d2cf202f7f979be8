"""ReceiverSession: one stream's receiving end as a pure state machine (the protocol is described in `state`).

Events and messages come in together with the time, actions go out. It decides what is accepted, stored, handed on,
freed and acknowledged; which blocks it gets or gives back is decided outside, from its window. Payload frames are
looked at only to check their sizes and their tag; there is no socket, clock, thread or tensor here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from transfer.block_pool import runs
from transfer.errors import (
    LOSS_CODES,
    AlignmentError,
    LocalProtocolError,
    RemoteProtocolError,
    ResumeRejected,
    TransferError,
    error_from_code,
)
from transfer.protocol.actions import (
    Announced,
    Deliver,
    Dropped,
    Finished,
    FreeBlocks,
    Place,
    Placed,
    ReceiverAction,
    Send,
    StreamStats,
)
from transfer.protocol.messages import (
    Abort,
    Announce,
    Block,
    Body,
    Close,
    Filled,
    Grant,
    Open,
    Probe,
    Resume,
    Revoke,
    Revoked,
)
from transfer.protocol.receiver_life import ReceiverLife
from transfer.protocol.refusals import refusal_of
from transfer.protocol.state import TERMINAL, ReceiverEvent, ReceiverState
from transfer.protocol.stream_record import StreamRecord
from transfer.protocol.take_over import accept_of, opened_by
from transfer.protocol.ticket import open_is_proven

IsFilled: TypeAlias = Callable[[Filled, int, int, int], bool]
"""Whether the slots of a message, from its n-th on and so many of them, are sealed for it with so many rows."""


class ReceiverSession(ReceiverLife):
    """Receives one stream into granted blocks and hands its rows on in order, each exactly once."""

    # -- events ---------------------------------------------------------------------------------------------------

    def open(
        self, message: Open, now: float, *, segment: Body | None = None, data_address: str | None = None
    ) -> list[ReceiverAction]:
        """An Open. The first valid one of an epoch opens; a repeated one asks for what may have been lost.

        One that proves nothing is refused without harm to the stream: whoever sent it need not be its sender.
        """
        opened = self.facts.opened
        if not open_is_proven(self.ticket, message):
            if opened is not None and message.epoch == self.ticket.epoch:
                return [Dropped("bad_proof")]  # on the proven sender's connection: a refusal would end its stream
            return [Dropped("bad_proof"), Send(refusal_of(message))]
        if opened is not None and opened.nonce != message.nonce:
            return [Dropped("bad_proof"), Send(refusal_of(message))]  # another holder: the ticket is in use
        self._heard = now
        if opened is not None:
            return self._said()
        try:
            event, facts, actions = opened_by(self.facts, self.window, self.offer, message, now)
        except TransferError as error:
            return self.fail(error)
        accept = accept_of(facts, self.offer, self.window.next_index, segment, data_address)
        self.facts = replace(facts, accept=accept)
        self._apply(event)
        assert facts.terms is not None
        self._payload = self._payload_of(self.facts)
        self._acked = self.window.next_index
        self._late_serial = 0
        self._move(now)
        return [*actions, Send(accept)]

    def grant(self, block_ids: Sequence[int], now: float) -> list[ReceiverAction]:
        """The pool gave these blocks to this stream: tell the sender."""
        self._apply(ReceiverEvent.GRANT)
        window, tokens = self.window, len(block_ids) * self.block_size
        if window.num_rounds == 0:
            self.facts = replace(self.facts, round0_tokens=tokens)
        grant = Grant(
            **self._ids(),
            round=window.num_rounds,
            first_index=window.num_granted,
            block_ids=tuple(block_ids),
            allocated_tokens=tokens,
            block_size=self.block_size,
            credit=self.credit,
        )
        window.grant(grant)
        self._move(now)
        return [Send(grant)]

    def revoke(self, count: int, now: float) -> list[ReceiverAction]:
        """Somebody else needs `count` blocks of this stream; the last ones go, as far as it can spare them by now.

        Of an admitted stream nothing goes that is stored in a row, and not all while it moves. So at most what is on
        its way is sent again.
        """
        window, state, admitted = self.window, self.state, self.facts.is_admitted
        if admitted:
            count = min(count, self.num_withdrawable - (not self.is_stalled))
        if count <= 0:
            return []  # it was filled meanwhile
        self._apply(ReceiverEvent.REVOKE)
        first_index = max(0, window.num_granted - count)
        if state is ReceiverState.ORPHANED:  # nobody to tell
            return [FreeBlocks(window.cut(first_index))]
        if admitted and first_index == window.next_index:
            self.has_yielded = True
            self._move(now)
        revoke = Revoke(**self._ids(), serial=window.serial + 1, round=window.num_rounds, first_index=first_index)
        freed = window.revoke(revoke, withhold=self.facts.shares_memory)
        self._acked = min(self._acked, window.next_index)
        return [*([FreeBlocks(freed)] if freed else []), Send(revoke)]

    def revoked(self, message: Revoked, now: float) -> list[ReceiverAction]:
        """The sender will not fill what was withdrawn."""
        if reason := self._not_from_sender(message.epoch):
            return [Dropped(reason)]
        self._heard = now
        withheld = self.window.revoked(message.serial)
        if withheld is None:
            return [Dropped("duplicate")]
        return [FreeBlocks(withheld)] if withheld else []

    def announce(self, message: Announce, now: float) -> list[ReceiverAction]:
        """The totals; repeated, their Ack was lost. A mismatch ends the stream with a typed error."""
        facts, window = self.facts, self.window
        if reason := self._not_from_sender(message.epoch):
            return [Dropped(reason)]
        if self.state is ReceiverState.OPENED:
            return [Dropped("early")]
        self._heard = now
        assert facts.accept is not None
        echo = 0 if facts.accept.first_index else facts.round0_tokens
        if message.block_size != self.block_size or message.allocated_tokens != echo:
            return self.fail(
                AlignmentError(
                    f"the sender announces an allocation of {message.allocated_tokens} tokens in blocks of "
                    f"{message.block_size}; granted were {echo} in blocks of {self.block_size}"
                )
            )
        if facts.total_rows is None:
            self.facts = replace(facts, total_rows=message.total_rows, is_announced=True)
            self._apply(ReceiverEvent.ANNOUNCE)
            self._move(now)
            surplus = window.num_granted - self.num_blocks
            actions: list[ReceiverAction] = [Announced(message.total_rows, message.items), Send(self._ack())]
            if surplus > 0 and facts.shares_memory:
                actions += self.revoke(surplus, now)  # its producer may be computing there
            elif surplus > 0:
                actions.append(FreeBlocks(window.cut(self.num_blocks)))
            return actions + self._maybe_finish(now)
        if message.total_rows != facts.total_rows:
            text = f"total {message.total_rows} announced after {facts.total_rows}"
            return self.fail(RemoteProtocolError(text) if facts.is_announced else ResumeRejected(text))
        if not facts.is_announced:
            self.facts = replace(facts, is_announced=True)
            self._move(now)
        return [Send(self._ack())]

    def probe(self, message: Probe, now: float) -> list[ReceiverAction]:
        """How far are we: everything the sender sent before is here, or lost."""
        if reason := self._not_from_sender(message.epoch):
            return [Dropped(reason)]
        if self._payload is None or not self._payload.knows(message):
            return [Dropped("bad_tag")]
        self._heard = now
        ack = self._ack()
        resume = Resume(
            **self._ids(),
            nonce=message.nonce,
            serial=ack.serial,
            next_index=ack.next_index,
            kept_index=ack.kept_index,
        )
        return [Send(resume), *self._open_questions()]

    def block(self, message: Block, frames: Sequence[memoryview], now: float) -> list[ReceiverAction]:
        """One block: dropped and counted, or verified, placed, acknowledged and (once admitted) handed on."""
        reason = self._refusal(message, frames)
        if reason is not None:
            if reason != "duplicate":
                if reason == "not_granted":
                    self._came_late()
                return [Dropped(reason)]
            self.num_repeated += 1
            return [Dropped(reason), Send(self._ack())]
        self._apply(ReceiverEvent.BLOCK)
        self._filled_some(now)
        window, payload = self.window, self._payload
        is_placed = payload is not None and payload.is_placed
        actions: list[ReceiverAction] = [Place(message.block_id, () if is_placed else frames)]
        window.store(message.index)
        if self._owes_ack():
            actions.append(Send(self._ack()))
        if self.facts.state is not ReceiverState.ADMITTED:
            return actions + self._maybe_finish(now)
        actions += self._deliver()
        return actions if window.next_index < window.num_granted else actions + self._maybe_finish(now)

    def filled(self, message: Filled, is_filled: IsFilled, now: float) -> list[ReceiverAction]:
        """Blocks that lie in their slots: as `block` does, for all of them at once."""
        facts, window = self.facts, self.window
        if message.epoch != facts.ticket.epoch:
            return [Dropped("stale_epoch")]
        if not facts.is_announced:
            return [Dropped("early")]
        ids, first = message.block_ids, message.first_index
        wanted: Sequence[int] = range(first, first + len(ids))
        if first < window.next_index or window.stored:
            wanted = [i for i in wanted if i >= window.next_index and i not in window.stored]
        self.num_repeated += len(ids) - len(wanted)
        if not wanted:
            return [Dropped("duplicate"), Send(self._ack())]
        granted = wanted
        if tuple(map(window.held.get, wanted)) != ids:
            granted = [index for index in wanted if window.held.get(index) == ids[index - first]]
        filled: list[tuple[int, int]] = []
        for index, count in runs(granted):
            num_rows = min(count * self.block_size, (facts.total_rows or 0) - index * self.block_size)
            if is_filled(message, index - first, count, num_rows):
                filled.append((index, count))
        num_filled = sum(count for _, count in filled)
        dropped = [Dropped("not_granted")] * (len(granted) < len(wanted))
        dropped += [Dropped("bad_seal")] * (num_filled < len(granted))
        if len(granted) < len(wanted):
            self._came_late()
        if not filled:
            return [*dropped]
        self._apply(ReceiverEvent.BLOCK)
        self._filled_some(now)
        for index, count in filled:
            window.store(index, count)
        actions: list[ReceiverAction] = [Placed(num_filled), *dropped]
        if self._owes_ack():
            actions.append(Send(self._ack()))
        if self.state is ReceiverState.ADMITTED:
            actions += self._deliver(join=True)
        return actions + self._maybe_finish(now)

    def admit(self, now: float) -> list[ReceiverAction]:
        """The consumer has room for every row. LocalProtocolError before the announcement or when repeated."""
        if self.facts.is_admitted or self.facts.total_rows is None:
            raise LocalProtocolError(f"a receiver in state {self.state.value!r} does not allow 'admit'")
        self._apply(ReceiverEvent.ADMIT)
        self.facts = replace(self.facts, is_admitted=True)
        self._heard = now
        self._move(now)
        actions = self._deliver() + self._maybe_finish(now)
        if self.state is ReceiverState.ADMITTED and self.window.next_index:
            actions.append(Send(self._ack()))  # stored for good now
        return actions

    def aborted(self, message: Abort, now: float) -> list[ReceiverAction]:
        """The sender ended the stream."""
        if reason := self._not_from_sender(message.epoch):
            return [Dropped(reason)]
        error = error_from_code(message.code, message.message)
        if message.code in LOSS_CODES:
            return self.lost(error, now, tell_peer=False)
        return self.fail(error, tell_peer=False)

    def restore(self, record: StreamRecord, delivered: int, now: float) -> list[ReceiverAction]:
        """Be what `record` says, of a stream whose blocks below `delivered` were handed on; go on from there.

        What was recorded need not have been said: what the sender has to know comes again, and it drops what it heard.
        """
        self._restore(record, delivered, now)
        actions: list[ReceiverAction] = []
        if self.state is ReceiverState.ADMITTED:
            actions = self._deliver() + self._maybe_finish(now)
        return actions if self.state in TERMINAL else [*actions, *self._said()]

    # -- helpers --------------------------------------------------------------------------------------------------

    def _not_from_sender(self, epoch: int) -> str | None:
        if epoch != self.facts.ticket.epoch:
            return "stale_epoch"
        return "early" if self.facts.opened is None else None

    def _refusal(self, message: Block, frames: Sequence[memoryview]) -> str | None:
        index, facts, window = message.index, self.facts, self.window
        if message.epoch != facts.ticket.epoch:
            return "stale_epoch"
        if not facts.is_announced:
            return "early"
        if index < window.next_index or index in window.stored:
            return "duplicate"
        if window.held.get(index) != message.block_id:
            return "not_granted"
        first_row = index * self.block_size
        num_rows = min(self.block_size, (facts.total_rows or 0) - first_row)
        if message.first_row != first_row or message.num_rows != num_rows:
            return "misaligned"
        assert self._payload is not None
        if not self._payload.fits(frames, num_rows):
            return "wrong_size"
        return None if self._payload.check(message, frames) else "bad_tag"

    def _deliver(self, *, join: bool = False) -> list[ReceiverAction]:
        """Hand on what is stored; `join`: blocks that are neighbours in memory go together."""
        actions: list[ReceiverAction] = []
        index, block_ids = self.window.hand_on()
        for block_id, count in runs(block_ids) if join else [(block_id, 1) for block_id in block_ids]:
            first_row = index * self.block_size
            num_rows = min(count * self.block_size, (self.facts.total_rows or 0) - first_row)
            index += count
            actions.append(Deliver(index - 1, block_id, first_row, num_rows, count))
        return actions

    def _maybe_finish(self, now: float) -> list[ReceiverAction]:
        if self.window.delivered < self.num_blocks:
            return []
        self._apply(ReceiverEvent.FINISH)
        total = self.facts.total_rows or 0
        stats = StreamStats(
            blocks=self.window.delivered,
            num_bytes=total * sum(plane.row_bytes for plane in self.offer.planes),
            grant_rounds=self.window.num_rounds,
            resent_blocks=self.num_repeated,
            seconds=now - self.facts.started,
        )
        return [Send(Close(**self._ids(), total_rows=total)), Finished(stats)]
