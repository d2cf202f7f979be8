"""SenderSession: one stream's sending end as a pure state machine (the protocol is described in `state`).

Events and messages come in together with the time, actions go out. It counts rows and never sees their bytes;
there is no socket, clock, thread or tensor here. Which blocks may be filled is kept in `sender_grants`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from transfer.errors import LocalProtocolError, RemoteProtocolError, ResumeRejected, TransferError, error_from_code
from transfer.protocol.actions import (
    Accepted,
    Dropped,
    Finished,
    ReleaseRows,
    Send,
    SendBlock,
    SenderAction,
    SendFilled,
    StreamStats,
    Withdrawn,
)
from transfer.protocol.messages import (
    WITHDRAWN,
    Abort,
    Accept,
    Ack,
    Body,
    Close,
    Grant,
    Resume,
    Revoke,
    Revoked,
    StreamMessage,
)
from transfer.protocol.negotiate import agree
from transfer.protocol.sender_grants import SenderGrants
from transfer.protocol.sender_life import SenderLife
from transfer.protocol.state import TERMINAL, SenderEvent, SenderState
from transfer.protocol.ticket import accept_is_proven

MESSAGES = (Accept, Grant, Revoke, Ack, Resume, Close, Abort)  # those that a sender gets
MAX_FILL_BLOCKS = 8  # copied into slots before the receiver hears of them


class SenderSession(SenderLife):
    """Sends `total_rows` rows in blocks, never more than granted and never more than the credit ahead."""

    # -- the producer's events ------------------------------------------------------------------------------------

    def start(self, now: float) -> list[SenderAction]:
        """Send the Open."""
        self._apply(SenderEvent.OPEN)
        self._gap = self._timers.open_retry_s
        self._next_probe = now + self._gap
        return [Send(self._open(now))]

    def announce(self, total_rows: int, items: Sequence[Body], now: float) -> list[SenderAction]:
        """The totals are known. LocalProtocolError when given twice, negative, or below the rows already written."""
        if self.total_rows is not None:
            raise LocalProtocolError(f"stream {self.ticket.stream_id} was announced twice")
        if type(total_rows) is not int or total_rows < self._rows_ready:
            raise LocalProtocolError(f"total_rows must be an int of at least {self._rows_ready}, not {total_rows!r}")
        self.total_rows = total_rows
        self._items = tuple(items)
        self._check_first_index()
        return self._produced(now)

    def rows_written(self, end_row: int, now: float) -> list[SenderAction]:
        """Every row below `end_row` is there, or stored already. LocalProtocolError beyond the announced total."""
        if self.total_rows is not None and end_row > self.total_rows:
            raise LocalProtocolError(f"{end_row} rows written, {self.total_rows} announced")
        self._rows_ready = max(self._rows_ready, end_row)
        return self._produced(now)

    def blocks_placed(self, end: int) -> None:
        """The producer computed the blocks below `end`, as far as they were not sent, in their slots."""
        self._num_placed = end

    # -- the peer's messages --------------------------------------------------------------------------------------

    def receive(self, message: StreamMessage, now: float) -> list[SenderAction]:
        """A message of the receiver. What does not fit ends the stream with a typed error."""
        if message.epoch != self.ticket.epoch:
            return [Dropped("stale_epoch")]
        if self.state in TERMINAL:
            return [Dropped("unknown_stream")]
        try:
            if self.state in (SenderState.IDLE, SenderState.OPENING) and not isinstance(message, (Accept, Abort)):
                return [Dropped("early")]  # the Accept was lost: the next Open asks for it
            if isinstance(message, Accept):
                return self._on_accept(message, now)
            self._heard = now
            match message:
                case Ack():
                    return self._on_ack(message, now)
                case Grant():
                    return self._on_grant(message, now)
                case Resume():
                    return self._on_resume(message, now)
                case Revoke():
                    return self._on_revoke(message, now)
                case Close():
                    return self._on_close(message, now)
                case Abort():
                    return self.fail(error_from_code(message.code, message.message), tell_peer=False)
        except TransferError as error:
            return self.fail(error)
        return [Dropped("wrong_direction")]

    def _on_accept(self, accept: Accept, now: float) -> list[SenderAction]:
        is_withdrawal = accept.segment == WITHDRAWN and self._generation != 0 and not self.num_rounds
        if self.state is not SenderState.OPENING and not is_withdrawal:
            return [Dropped("duplicate")]
        if not accept_is_proven(self.ticket, accept, self._open(now)):
            return [Dropped("bad_proof")]
        if self.state is not SenderState.OPENING:
            self._heard = now
            return [Withdrawn(), *self.attached(0)]
        self._heard = now
        terms = self.terms = agree(self.offer, accept.offer)
        self._apply(SenderEvent.ACCEPT)
        first = self.first_index = self.num_acked = self.num_sent = self._num_kept = accept.first_index
        self._sent_end = first
        self._grants = SenderGrants(self.block_size, first)
        self._credit = terms.credit
        self._waits_for_ack = accept.data_address is not None
        self._check_first_index()
        self._note_progress(now)
        accepted = Accepted(terms, first * self.block_size, accept.segment, accept.data_address)
        return [accepted, *self._advance(now)]

    def _on_grant(self, grant: Grant, now: float) -> list[SenderAction]:
        num_blocks = None if self.total_rows is None else self._num_blocks()
        reason = self._grants.refusal(grant, num_stored=self.num_acked, num_blocks=num_blocks)
        if reason is not None:
            return [Dropped(reason)]
        self._apply(SenderEvent.GRANT)
        self._grants.grant(grant)
        assert self.terms is not None
        self._credit = min(grant.credit, self.terms.credit)
        self._note_news(now)
        return self._advance(now)

    def _on_revoke(self, revoke: Revoke, now: float) -> list[SenderAction]:
        reason = self._grants.refusal(revoke, num_stored=self.num_acked)
        if reason == "early":
            return [Dropped(reason)]
        answer = Revoked(**self._ids, serial=revoke.serial, first_index=revoke.first_index)
        if reason is not None:  # the answer to it was lost
            return [Dropped(reason), *([Send(answer)] if revoke.serial == self._grants.serial else [])]
        if revoke.first_index < self._num_kept:
            raise RemoteProtocolError(f"index {revoke.first_index} revoked, {self._num_kept} blocks stored for good")
        self._apply(SenderEvent.REVOKE)
        self._grants.revoke(revoke)
        self.num_sent = min(self.num_sent, revoke.first_index)
        self.num_acked = min(self.num_acked, revoke.first_index)
        self._num_placed = min(self._num_placed, revoke.first_index)
        self._probes.clear()
        self._note_news(now)
        return [Send(answer)]

    def _on_ack(self, ack: Ack, now: float) -> list[SenderAction]:
        if ack.serial != self._grants.serial:
            return [Dropped("stale_ack")]
        self._is_heard = True
        return [*self._note_stored(ack.next_index, ack.kept_index, now), *self._advance(now)]

    def _on_resume(self, resume: Resume, now: float) -> list[SenderAction]:
        sent_before = self._probes.answered(resume.nonce)
        if resume.serial != self._grants.serial:
            return [Dropped("stale_resume")]
        actions = self._note_stored(resume.next_index, resume.kept_index, now)
        if sent_before is None:  # what is stored it says all the same, but not what is lost
            return [Dropped("stale_resume"), *actions, *self._advance(now)]
        lost = range(max(resume.next_index, self.num_acked), min(sent_before, self.num_sent))
        if lost and self._is_heard:
            self._probes.clear()  # their answers may speak of the same loss
            self.num_resent += len(lost)
            self._note_progress(now)
            actions += self._blocks(lost.start, lost.stop)
        return [*actions, *self._advance(now)]

    def _on_close(self, close: Close, now: float) -> list[SenderAction]:
        if close.total_rows != self.total_rows or self._sent_end != self._num_blocks():
            raise RemoteProtocolError(
                f"the receiver closed after {close.total_rows} rows; announced: {self.total_rows}, "
                f"blocks sent: {self._sent_end}"
            )
        self._apply(SenderEvent.CLOSE)
        self.num_acked = self.num_sent = self._sent_end
        row_bytes = sum(plane.row_bytes for plane in self.offer.planes)
        stats = StreamStats(
            blocks=self.num_sent - self.first_index,
            num_bytes=(close.total_rows - self._row_after(self.first_index)) * row_bytes,
            grant_rounds=self._grants.num_rounds,
            resent_blocks=self.num_resent,
            seconds=now - self._started,
        )
        return [ReleaseRows(close.total_rows), Finished(stats)]

    # -- helpers --------------------------------------------------------------------------------------------------

    def _note_stored(self, next_index: int, kept_index: int, now: float) -> list[SenderAction]:
        if next_index > self._sent_end or kept_index > next_index:
            raise RemoteProtocolError(f"{next_index} blocks acknowledged ({kept_index} kept), {self._sent_end} sent")
        self.num_sent = max(self.num_sent, next_index)  # sent under a grant that was withdrawn, and stored by the next
        if next_index > self.num_acked and self.state is SenderState.SENDING:
            last = next_index == self._num_blocks()
            self._apply(SenderEvent.LAST_ACK if last else SenderEvent.ACK)
            self.num_acked = next_index
            self._acked_at = now
            self._note_progress(now)
        if kept_index <= self._num_kept:
            return []
        self._num_kept = kept_index
        return [ReleaseRows(self._row_after(kept_index))]

    def _check_first_index(self) -> None:
        if self.total_rows is not None and self.first_index > self._num_blocks():
            raise ResumeRejected(
                f"the receiver has {self.first_index} blocks of the stream already, this sender's {self.total_rows} "
                f"rows make {self._num_blocks()}: it is not the same content"
            )

    def _produced(self, now: float) -> list[SenderAction]:
        actions = self._advance(now)
        if actions:  # otherwise the peer heard nothing, and probes must go on or it would think us dead
            self._note_progress(now)
        return actions

    def _advance(self, now: float) -> list[SenderAction]:
        actions: list[SenderAction] = []
        if self.total_rows is not None and (
            self.state is SenderState.GRANTED or (self.state is SenderState.ACCEPTED and self.first_index)
        ):
            self._apply(SenderEvent.ANNOUNCE)
            actions.append(Send(self._announcement()))
        if self.state is not SenderState.SENDING or (self._waits_for_ack and not self._is_heard):
            return actions
        whole = self._num_blocks() if self._rows_ready == self.total_rows else self._rows_ready // self.block_size
        end = min(self._grants.end, whole, max(self.num_acked + self._credit, self._num_placed))
        if self.num_sent < end:
            self._apply(SenderEvent.SEND)
            if self.num_sent == self.num_acked:
                self._acked_at = now
            actions += self._blocks(self.num_sent, end)
            self.num_sent = end
            self._sent_end = max(self._sent_end, end)
        return actions

    def _blocks(self, index: int, end: int) -> Sequence[SenderAction]:
        if not self._generation:
            return [self._block(i) for i in range(index, end)]
        placed_end = min(end, self._num_placed)
        bounds = [*([index] if index < placed_end else []), *range(max(index, placed_end), end, MAX_FILL_BLOCKS), end]
        return [self._fill(first, after - first) for first, after in pairwise(bounds)]

    def _fill(self, index: int, count: int) -> SendFilled:
        first = index * self.block_size
        num_rows = self._row_after(index + count) - first
        self._serial += 1
        return SendFilled(index, self._grants.block_ids(index, count), first, num_rows, self._serial)

    def _block(self, index: int) -> SendBlock:
        first = index * self.block_size
        num_rows = self._row_after(index + 1) - first
        self._serial += 1
        return SendBlock(index, self._grants.block_id(index), first, num_rows, self._serial)
