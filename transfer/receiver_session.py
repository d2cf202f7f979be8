"""ReceiverSession: one stream's receiving end as a pure state machine (the protocol is described in `state`).

Events and messages come in together with the time, actions go out. It decides what is accepted, stored, handed on,
freed and acknowledged; which blocks it gets is decided outside, from `wanted_blocks`. Payload frames are looked at
only to check their sizes and their tag; there is no socket, clock, thread or tensor here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from transfer.actions import (
    Announced,
    Deliver,
    Dropped,
    Failed,
    Finished,
    FreeBlocks,
    Place,
    ReceiverAction,
    Send,
    StreamStats,
    Timers,
)
from transfer.errors import (
    AlignmentError,
    IncompatibleBlocks,
    RemoteProtocolError,
    StreamAborted,
    StreamTimeout,
    TransferError,
    error_code,
    error_from_code,
)
from transfer.integrity import block_tag, tag_seed
from transfer.messages import Abort, Ack, Announce, Block, Close, Grant, Open
from transfer.state import RECEIVER_TABLE, TERMINAL, ReceiverEvent, ReceiverState, apply
from transfer.tensors import PlaneSpec
from transfer.ticket import Ticket, verify

FLOWING = (ReceiverState.HELD, ReceiverState.ADMITTED)


class ReceiverSession:
    """Receives one stream into granted blocks and hands its rows on in order, each exactly once."""

    def __init__(
        self,
        ticket: Ticket,
        *,
        block_size: int,
        planes: Sequence[PlaneSpec],
        default_blocks: int,
        credit: int,
        timers: Timers,
        now: float,
    ) -> None:
        self.state = ReceiverState.REGISTERED
        self.ticket = ticket
        self.block_size = block_size
        self.planes = tuple(planes)
        self.total_rows: int | None = None
        self.num_rounds = 0
        self.num_repeated = 0
        self._default_blocks = default_blocks
        self._credit = credit
        self._timers = timers
        self._seed = tag_seed(ticket)
        self._row_bytes = tuple(plane.row_bytes for plane in self.planes)
        self._held: dict[int, int] = {}  # index -> block id, for every block granted and not freed
        self._num_granted = 0  # indexes below this were granted
        self._stored: set[int] = set()  # indexes at or above _next_index whose block is verified
        self._next_index = 0  # every index below is verified
        self._delivered = 0  # every index below was handed on
        self._acked = 0
        self._round0_tokens = 0
        self._open_grants: deque[tuple[int, Grant]] = deque()  # (index after its last block, grant)
        self._started = self._heard = self._progressed = now

    # -- what the shell asks --------------------------------------------------------------------------------------

    @property
    def admitted(self) -> bool:
        """Whether the consumer reserved its buffer."""
        return self.state is ReceiverState.ADMITTED

    @property
    def num_held(self) -> int:
        """Blocks granted and not freed."""
        return len(self._held)

    @property
    def may_need_blocks(self) -> bool:
        """Whether any grant may still follow."""
        if self.state in TERMINAL:
            return False
        return self.total_rows is None or self._num_granted < self._num_blocks()

    @property
    def wanted_blocks(self) -> int:
        """Blocks that a grant could carry now: the default once opened, the remainder once admitted."""
        if self.state is ReceiverState.OPENED:
            return self._default_blocks
        if self.state is not ReceiverState.ADMITTED:
            return 0
        if self._num_granted - self._next_index > self._credit // 2:
            return 0  # enough to go on with: fewer and larger grants
        return self._num_blocks() - self._num_granted

    # -- events ---------------------------------------------------------------------------------------------------

    def open(self, message: Open, now: float) -> list[ReceiverAction]:
        """An Open. The first valid one opens; a repeated one asks for what may have been lost.

        One that proves nothing is refused without harm to the stream: whoever sent it need not be its sender.
        """
        if not self._proven(message):
            if self.state is not ReceiverState.REGISTERED and message.epoch == self.ticket.epoch:
                return [Dropped("bad_proof")]  # on the proven sender's connection: a refusal would end its stream
            return [Dropped("bad_proof"), Send(_refusal_of(message))]
        self._heard = now
        if self.state is not ReceiverState.REGISTERED:
            return self._answer_probe()
        if message.block_size != self.block_size:
            return self.fail(
                IncompatibleBlocks(
                    f"the sender uses blocks of {message.block_size} rows, this receiver {self.block_size}: "
                    "configure both alike"
                )
            )
        if message.planes != self.planes:
            return self.fail(IncompatibleBlocks(f"the sender offers planes {message.planes}, expected {self.planes}"))
        self._apply(ReceiverEvent.OPEN)
        self._progressed = now
        return []

    def grant(self, block_ids: Sequence[int], now: float) -> list[ReceiverAction]:
        """The pool gave these blocks to this stream: tell the sender."""
        self._apply(ReceiverEvent.GRANT)
        tokens = len(block_ids) * self.block_size
        if self.num_rounds == 0:
            self._round0_tokens = tokens
        for block_id in block_ids:
            self._held[self._num_granted] = block_id
            self._num_granted += 1
        grant = Grant(
            stream_id=self.ticket.stream_id,
            epoch=self.ticket.epoch,
            round=self.num_rounds,
            block_ids=tuple(block_ids),
            allocated_tokens=tokens,
            block_size=self.block_size,
            credit=self._credit,
        )
        self.num_rounds += 1
        self._open_grants.append((self._num_granted, grant))
        self._progressed = now
        return [Send(grant)]

    def announce(self, message: Announce, now: float) -> list[ReceiverAction]:
        """The totals; repeated, it is a probe. A mismatch ends the stream with a typed error."""
        if message.epoch != self.ticket.epoch:
            return [Dropped("stale_epoch")]
        if self.state in (ReceiverState.REGISTERED, ReceiverState.OPENED):
            return [Dropped("early")]
        self._heard = now
        if message.block_size != self.block_size or message.allocated_tokens != self._round0_tokens:
            return self.fail(
                AlignmentError(
                    f"the sender announces an allocation of {message.allocated_tokens} tokens in blocks of "
                    f"{message.block_size}; granted were {self._round0_tokens} in blocks of {self.block_size}"
                )
            )
        if self.total_rows is not None:
            if message.total_rows != self.total_rows:
                return self.fail(RemoteProtocolError(f"total {message.total_rows} announced after {self.total_rows}"))
            return self._answer_probe()
        self._apply(ReceiverEvent.ANNOUNCE)
        self.total_rows = message.total_rows
        self._progressed = now
        surplus = [self._held.pop(index) for index in range(self._num_blocks(), self._num_granted)]
        self._num_granted -= len(surplus)
        actions: list[ReceiverAction] = [FreeBlocks(tuple(surplus))] if surplus else []
        actions += [Announced(message.total_rows, message.items), Send(self._ack())]
        return actions + self._maybe_finish(now)

    def block(self, message: Block, frames: Sequence[memoryview], now: float) -> list[ReceiverAction]:
        """One block: dropped and counted, or verified, placed, acknowledged and (once admitted) handed on."""
        reason = self._refusal(message, frames)
        if reason is not None:
            self.num_repeated += reason == "duplicate"
            return [Dropped(reason), Send(self._ack())] if reason == "duplicate" else [Dropped(reason)]
        self._apply(ReceiverEvent.BLOCK)
        self._heard = self._progressed = now
        actions: list[ReceiverAction] = [Place(message.block_id, frames)]
        self._stored.add(message.index)
        while self._next_index in self._stored:
            self._stored.remove(self._next_index)
            self._next_index += 1
        while self._open_grants and self._open_grants[0][0] <= self._next_index:
            self._open_grants.popleft()
        if self._next_index - self._acked >= max(1, self._credit // 4) or self._next_index >= self._num_granted:
            actions.append(Send(self._ack()))
        if self.state is ReceiverState.ADMITTED:
            actions += self._deliver()
        return actions + self._maybe_finish(now)

    def admit(self, now: float) -> list[ReceiverAction]:
        """The consumer has room for every row. LocalProtocolError before the announcement or when repeated."""
        self._apply(ReceiverEvent.ADMIT)
        self._progressed = self._heard = now
        return self._deliver() + self._maybe_finish(now)

    def fail(self, error: TransferError, *, tell_peer: bool = True) -> list[ReceiverAction]:
        """End the stream from this side; nothing happens when it is over already."""
        if self.state in TERMINAL:
            return []
        self._apply(ReceiverEvent.FAIL)
        blocks = tuple(self._held.values())
        self._held.clear()
        actions: list[ReceiverAction] = [FreeBlocks(blocks)] if blocks else []
        if tell_peer:
            actions.append(Send(self.abort_message(error)))
        return [*actions, Failed(error)]

    def aborted(self, message: Abort) -> list[ReceiverAction]:
        """The sender ended the stream."""
        if message.epoch != self.ticket.epoch:
            return [Dropped("stale_epoch")]
        return self.fail(error_from_code(message.code, message.message), tell_peer=False)

    def tick(self, now: float) -> list[ReceiverAction]:
        """Check the limits; send an acknowledgement that waited for company.

        A sender that probes is alive, however long its producer takes: the producer's owner limits that.
        """
        if self.state in TERMINAL:
            return []
        timers = self._timers
        if self.state is ReceiverState.REGISTERED:
            if now - self._progressed >= timers.stream_timeout_s:
                return self.fail(StreamTimeout(f"no sender opened the stream for {timers.stream_timeout_s:g} s"))
            return []
        if now - self._heard >= timers.idle_timeout_s:
            return self.fail(StreamTimeout(f"the sender was silent for {timers.idle_timeout_s:g} s"))
        if not self._sender_owes() and now - self._progressed >= timers.admit_timeout_s:
            waited = f"the stream was neither granted blocks nor admitted for {timers.admit_timeout_s:g} s"
            return self.fail(StreamTimeout(f"{waited} (state {self.state.value})"))
        return [Send(self._ack())] if self._acked < self._next_index else []

    def abort_message(self, error: TransferError) -> Abort:
        """The Abort that tells the sender of `error`."""
        text = error.message if isinstance(error, StreamAborted) else str(error)
        return Abort(stream_id=self.ticket.stream_id, epoch=self.ticket.epoch, code=error_code(error), message=text)

    # -- helpers --------------------------------------------------------------------------------------------------

    def _apply(self, event: ReceiverEvent) -> None:
        self.state = apply(RECEIVER_TABLE, self.state, event)

    def _proven(self, message: Open) -> bool:
        if message.epoch != self.ticket.epoch:
            return False
        return verify(self.ticket, message.proof, message.block_size, message.planes, message.content_key)

    def _refusal(self, message: Block, frames: Sequence[memoryview]) -> str | None:
        index = message.index
        if message.epoch != self.ticket.epoch:
            return "stale_epoch"
        if self.state not in FLOWING:
            return "early"
        if index < self._next_index or index in self._stored:
            return "duplicate"
        if self._held.get(index) != message.block_id:
            return "not_granted"
        first_row = index * self.block_size
        num_rows = min(self.block_size, (self.total_rows or 0) - first_row)
        if message.first_row != first_row or message.num_rows != num_rows:
            return "misaligned"
        if [len(frame) for frame in frames] != [size * num_rows for size in self._row_bytes]:
            return "wrong_size"
        tag = block_tag(
            self._seed, message.stream_id, message.epoch, index, message.block_id, first_row, num_rows, frames
        )
        return None if tag == message.tag else "bad_tag"

    def _deliver(self) -> list[ReceiverAction]:
        actions: list[ReceiverAction] = []
        for index in range(self._delivered, self._next_index):
            block_id = self._held.pop(index)
            first_row = index * self.block_size
            num_rows = min(self.block_size, (self.total_rows or 0) - first_row)
            actions += [Deliver(block_id, first_row, num_rows), FreeBlocks((block_id,))]
        self._delivered = self._next_index
        return actions

    def _maybe_finish(self, now: float) -> list[ReceiverAction]:
        if self._delivered < self._num_blocks():
            return []
        self._apply(ReceiverEvent.FINISH)
        total = self.total_rows or 0
        close = Close(stream_id=self.ticket.stream_id, epoch=self.ticket.epoch, total_rows=total)
        stats = StreamStats(
            blocks=self._delivered,
            num_bytes=total * sum(self._row_bytes),
            grant_rounds=self.num_rounds,
            resent_blocks=self.num_repeated,
            seconds=now - self._started,
        )
        return [Send(close), Finished(stats)]

    def _answer_probe(self) -> list[ReceiverAction]:
        return [Send(self._ack()), *(Send(grant) for _, grant in self._open_grants)]

    def _sender_owes(self) -> bool:
        if self.state is ReceiverState.GRANTED:
            return True
        return self.state in FLOWING and self._next_index < self._num_granted

    def _num_blocks(self) -> int:
        return -(-(self.total_rows or 0) // self.block_size)

    def _ack(self) -> Ack:
        self._acked = self._next_index
        return Ack(stream_id=self.ticket.stream_id, epoch=self.ticket.epoch, next_index=self._next_index)


def _refusal_of(message: Open) -> Abort:
    text = f"stream {message.stream_id}: this ticket is not valid here (wrong proof or epoch)"
    return Abort(stream_id=message.stream_id, epoch=message.epoch, code="TicketRejected", message=text)
