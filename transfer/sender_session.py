"""SenderSession: one stream's sending end as a pure state machine (the protocol is described in `state`).

Events and messages come in together with the time, actions go out. It counts rows and never sees their bytes;
there is no socket, clock, thread or tensor here.
"""

from __future__ import annotations

from collections.abc import Sequence

from transfer.actions import Dropped, Failed, Finished, ReleaseRows, Send, SendBlock, SenderAction, StreamStats, Timers
from transfer.errors import (
    AlignmentError,
    IncompatibleBlocks,
    LocalProtocolError,
    RemoteProtocolError,
    StreamAborted,
    StreamTimeout,
    TransferError,
    error_code,
    error_from_code,
)
from transfer.messages import Abort, Ack, Announce, Body, Close, Grant, Open, StreamMessage
from transfer.state import SENDER_TABLE, TERMINAL, SenderEvent, SenderState, apply
from transfer.tensors import PlaneSpec
from transfer.ticket import Ticket, prove


class SenderSession:
    """Sends `total_rows` rows in blocks, never more than granted and never more than the credit ahead."""

    def __init__(
        self,
        ticket: Ticket,
        *,
        block_size: int,
        planes: Sequence[PlaneSpec],
        content_key: str,
        timers: Timers,
        now: float,
    ) -> None:
        self.state = SenderState.IDLE
        self.ticket = ticket
        self.block_size = block_size
        self.planes = tuple(planes)
        self.content_key = content_key
        self.total_rows: int | None = None
        self.num_acked = 0  # blocks stored at the receiver
        self.num_sent = 0  # blocks sent at least once
        self.num_resent = 0
        self.num_rounds = 0
        self._items: tuple[Body, ...] = ()
        self._rows_ready = 0
        self._granted: list[int] = []  # block ids in index order
        self._round0_tokens = 0
        self._credit = 0
        self._timers = timers
        self._started = self._heard = now
        self._acked_at = now  # when an Ack was last owed and came, or began to be owed
        self._gap = timers.open_retry_s
        self._next_probe = now + self._gap

    # -- the producer's events ------------------------------------------------------------------------------------

    def start(self, now: float) -> list[SenderAction]:
        """Send the Open."""
        self._apply(SenderEvent.OPEN)
        self._note_progress(now)
        self._gap = self._timers.open_retry_s
        self._next_probe = now + self._gap
        return [Send(self._open())]

    def announce(self, total_rows: int, items: Sequence[Body], now: float) -> list[SenderAction]:
        """The totals are known. LocalProtocolError when given twice, negative, or below the rows already written."""
        if self.total_rows is not None:
            raise LocalProtocolError(f"stream {self.ticket.stream_id} was announced twice")
        if type(total_rows) is not int or total_rows < self._rows_ready:
            raise LocalProtocolError(f"total_rows must be an int of at least {self._rows_ready}, not {total_rows!r}")
        self.total_rows = total_rows
        self._items = tuple(items)
        return self._produced(now)

    def rows_written(self, num_rows: int, now: float) -> list[SenderAction]:
        """`num_rows` more rows are there. LocalProtocolError when they exceed the announced total."""
        if self.total_rows is not None and self._rows_ready + num_rows > self.total_rows:
            raise LocalProtocolError(f"{self._rows_ready + num_rows} rows written, {self.total_rows} announced")
        self._rows_ready += num_rows
        return self._produced(now)

    def fail(self, error: TransferError, *, tell_peer: bool = True) -> list[SenderAction]:
        """End the stream from this side; nothing happens when it is over already."""
        if self.state in TERMINAL:
            return []
        self._apply(SenderEvent.FAIL)
        code, text = error_code(error), error.message if isinstance(error, StreamAborted) else str(error)
        abort = Abort(stream_id=self.ticket.stream_id, epoch=self.ticket.epoch, code=code, message=text)
        return [*([Send(abort)] if tell_peer else []), Failed(error)]

    # -- the peer's messages --------------------------------------------------------------------------------------

    def receive(self, message: StreamMessage, now: float) -> list[SenderAction]:
        """Grant, Ack, Close or Abort of the receiver. What does not fit ends the stream with a typed error."""
        if message.epoch != self.ticket.epoch:
            return [Dropped("stale_epoch")]
        if self.state in TERMINAL:
            return [Dropped("unknown_stream")]
        self._heard = now
        try:
            match message:
                case Grant():
                    return self._on_grant(message, now)
                case Ack():
                    return self._on_ack(message, now)
                case Close():
                    return self._on_close(message, now)
                case Abort():
                    return self.fail(error_from_code(message.code, message.message), tell_peer=False)
        except TransferError as error:
            return self.fail(error)
        return [Dropped("wrong_direction")]

    def _on_grant(self, grant: Grant, now: float) -> list[SenderAction]:
        if grant.round < self.num_rounds:
            return [Dropped("duplicate")]
        if grant.round > self.num_rounds:
            return [Dropped("early")]  # a round before it was lost: the next probe asks for both
        if grant.block_size != self.block_size:
            raise IncompatibleBlocks(
                f"the receiver uses blocks of {grant.block_size} rows, this sender {self.block_size}: "
                "configure both alike"
            )
        if not grant.block_ids or grant.allocated_tokens != len(grant.block_ids) * self.block_size:
            raise AlignmentError(
                f"a grant of {len(grant.block_ids)} blocks of {self.block_size} rows says {grant.allocated_tokens} "
                f"tokens, not {len(grant.block_ids) * self.block_size}"
            )
        if grant.credit < 1:
            raise RemoteProtocolError("a grant with a credit of 0 blocks can never be used")
        self._apply(SenderEvent.GRANT)
        if grant.round == 0:
            self._round0_tokens = grant.allocated_tokens
        self.num_rounds += 1
        self._credit = grant.credit
        self._granted.extend(grant.block_ids)
        self._note_progress(now)
        return self._advance(now)

    def _on_ack(self, ack: Ack, now: float) -> list[SenderAction]:
        if ack.next_index > self.num_sent:
            raise RemoteProtocolError(f"{ack.next_index} blocks acknowledged, {self.num_sent} sent")
        if ack.next_index <= self.num_acked or self.state is not SenderState.SENDING:
            return []  # an old one, or the answer to a probe
        last = ack.next_index == self._num_blocks()
        self._apply(SenderEvent.LAST_ACK if last else SenderEvent.ACK)
        self.num_acked = ack.next_index
        self._acked_at = now
        self._note_progress(now)
        return [ReleaseRows(self._row_after(self.num_acked)), *self._advance(now)]

    def _on_close(self, close: Close, now: float) -> list[SenderAction]:
        if close.total_rows != self.total_rows or self.num_sent != self._num_blocks():
            raise RemoteProtocolError(
                f"the receiver closed after {close.total_rows} rows; announced: {self.total_rows}, "
                f"blocks sent: {self.num_sent}"
            )
        self._apply(SenderEvent.CLOSE)
        self.num_acked = self.num_sent
        row_bytes = sum(plane.row_bytes for plane in self.planes)
        stats = StreamStats(
            blocks=self.num_sent,
            num_bytes=close.total_rows * row_bytes,
            grant_rounds=self.num_rounds,
            resent_blocks=self.num_resent,
            seconds=now - self._started,
        )
        return [ReleaseRows(close.total_rows), Finished(stats)]

    # -- time -----------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[SenderAction]:
        """Check the limits and probe when nothing moved for a while.

        How long the producer may take is for its owner to say (`abort`): only what the peer owes is limited here.
        """
        if self.state in TERMINAL or self.state is SenderState.IDLE:
            return []
        if now - self._heard >= self._timers.idle_timeout_s:
            return self.fail(StreamTimeout(f"the receiver was silent for {self._timers.idle_timeout_s:g} s"))
        limit = self._timers.stream_timeout_s
        if self.num_sent > self.num_acked and now - self._acked_at >= limit:
            return self.fail(StreamTimeout(f"block {self.num_acked} was sent and not acknowledged for {limit:g} s"))
        if now < self._next_probe:
            return []
        self._gap = min(self._gap * 2, self._timers.max_probe_s)
        self._next_probe = now + self._gap
        return self._probe()

    def _probe(self) -> list[SenderAction]:
        if self.state in (SenderState.OPENING, SenderState.GRANTED):
            return [Send(self._open())]
        unacked = range(self.num_acked, self.num_sent)
        self.num_resent += len(unacked)
        return [Send(self._announcement()), *map(self._block, unacked)]

    # -- helpers --------------------------------------------------------------------------------------------------

    def _apply(self, event: SenderEvent) -> None:
        self.state = apply(SENDER_TABLE, self.state, event)

    def _note_progress(self, now: float) -> None:
        self._gap = self._timers.probe_s
        self._next_probe = now + self._gap

    def _produced(self, now: float) -> list[SenderAction]:
        actions = self._advance(now)
        if actions:  # otherwise the peer heard nothing, and probes must go on or it would think us dead
            self._note_progress(now)
        return actions

    def _advance(self, now: float) -> list[SenderAction]:
        actions: list[SenderAction] = []
        if self.state is SenderState.GRANTED and self.total_rows is not None:
            self._apply(SenderEvent.ANNOUNCE)
            actions.append(Send(self._announcement()))
        if self.state is not SenderState.SENDING:
            return actions
        limit = min(len(self._granted), self._num_blocks(), self.num_acked + self._credit)
        while self.num_sent < limit and self._row_after(self.num_sent + 1) <= self._rows_ready:
            self._apply(SenderEvent.SEND)
            if self.num_sent == self.num_acked:
                self._acked_at = now
            actions.append(self._block(self.num_sent))
            self.num_sent += 1
        return actions

    def _num_blocks(self) -> int:
        return -(-(self.total_rows or 0) // self.block_size)

    def _row_after(self, num_blocks: int) -> int:
        return min(num_blocks * self.block_size, self.total_rows or 0)

    def _block(self, index: int) -> SendBlock:
        first = index * self.block_size
        num_rows = self._row_after(index + 1) - first
        return SendBlock(index=index, block_id=self._granted[index], first_row=first, num_rows=num_rows)

    def _open(self) -> Open:
        return Open(
            stream_id=self.ticket.stream_id,
            epoch=self.ticket.epoch,
            proof=prove(self.ticket, self.block_size, self.planes, self.content_key),
            block_size=self.block_size,
            planes=self.planes,
            content_key=self.content_key,
        )

    def _announcement(self) -> Announce:
        return Announce(
            stream_id=self.ticket.stream_id,
            epoch=self.ticket.epoch,
            total_rows=self.total_rows or 0,
            allocated_tokens=self._round0_tokens,
            block_size=self.block_size,
            items=self._items,
        )
