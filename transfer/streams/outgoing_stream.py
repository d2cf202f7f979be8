"""OutgoingStream: one stream being sent, as its producer sees it.

Rows are kept by reference until they are stored for good at the receiver. All methods may be called from any thread;
none blocks but those that say so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from transfer.connection import Connection
from transfer.errors import EndpointClosed, LocalProtocolError, StreamAborted, StreamTimeout, TransferError
from transfer.memory.buffers import RowQueue, Tensor
from transfer.memory.slot_writer import SlotWriter
from transfer.protocol.actions import Accepted, SenderAction, StreamStats
from transfer.protocol.messages import Body, Revoked
from transfer.protocol.payload import OutgoingPayload
from transfer.protocol.sender_session import SenderSession

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """The sender that a stream belongs to."""

    def run_soon(
        self, stream: OutgoingStream, event: Callable[[float], list[SenderAction]]
    ) -> EndpointClosed | None: ...


class OutgoingStream:
    """Announce its totals, write its rows in order, wait for its end."""

    def __init__(self, sender: Runner, session: SenderSession, connection: Connection) -> None:
        self.stream_id = session.ticket.stream_id
        self.session = session
        self.connection = connection
        self.rows = RowQueue(session.offer.planes)
        self.payload: OutgoingPayload | None = None  # how rows travel, once that was agreed on
        self.sealed_path: Connection | None = None  # where Blocks and Probes go, if not over the connection
        self.accepted: Accepted | None = None  # what the receiver said, once it did
        self.slots: SlotWriter | None = None  # where the payload goes through a segment
        self.held: Revoked | None = None  # the answer to a revocation that waits for the producer
        self._sender = sender
        self._lock = threading.Lock()
        self._num_written = 0  # rows below were written, or are not needed
        self._total_rows: int | None = None
        self._outcome: StreamStats | TransferError | None = None
        self._ended = threading.Event()
        self._known = threading.Event()  # accepted, or over
        self._on_accepted: list[Callable[[OutgoingStream], None]] = []
        self._on_done: list[Callable[[OutgoingStream], None]] = []

    @property
    def first_row(self) -> int | None:
        """Rows below are stored at the receiver already (0 but for a take-over); None while that is not known."""
        return None if self.accepted is None else self.accepted.first_row

    def wait_accepted(self, timeout_s: float) -> int:
        """Wait for `first_row`. Raises what ended the stream, or StreamTimeout when it goes on after `timeout_s`."""
        if not self._known.wait(timeout_s):
            raise StreamTimeout(
                f"stream {self.stream_id} was not accepted within {timeout_s:g} s: wait on, or abort it"
            )
        if self.accepted is not None:
            return self.accepted.first_row
        assert isinstance(self._outcome, TransferError)
        raise self._outcome

    def on_accepted(self, callback: Callable[[OutgoingStream], None]) -> None:
        """Run `callback(stream)` once when `first_row` is known; at once if it is. Never for one that fails before."""
        with self._lock:
            if self.accepted is None:
                self._on_accepted.append(callback)
                return
        callback(self)

    def announce(self, total_rows: int, items: Sequence[Body] = ()) -> None:
        """The totals are known; blocks leave from now on. LocalProtocolError when repeated or out of range."""
        with self._lock:
            if self._total_rows is not None or type(total_rows) is not int or total_rows < self._num_written:
                raise LocalProtocolError(
                    f"stream {self.stream_id}: total_rows {total_rows!r} after {self._num_written} rows written "
                    f"and {self._total_rows} announced; announce once, an int not below what is written"
                )
            self._total_rows = total_rows
        self._soon(lambda now: self.session.announce(total_rows, items, now))

    def write(self, first_row: int, planes: Mapping[str, Tensor]) -> None:
        """Rows first_row ... of every plane: contiguous CPU tensors [n, *row_shape], kept by reference.

        They must not change until the stream ends. Rows come in order; rows below `self.first_row` may be left out, and
        are dropped where they come. Raises LocalProtocolError for rows out of order, beyond the announced total, other
        than the opened planes, or other than those of `slot_rows` as long as these are reserved.
        """
        num_rows, chunk = self.rows.check(planes)
        end, slots, in_place = first_row + num_rows, self.slots, False

        def add(now: float) -> list[SenderAction]:
            if self.rows.num_rows < first_row:  # what is left out here is stored already
                self.rows.clear()
                self.rows.num_rows = first_row
            self.rows.append(num_rows, chunk)
            self.rows.release(self.first_row or 0)
            if in_place and slots is not None:
                slots.placed(first_row, end)
                self.session.blocks_placed(slots.placed_until(self.session.num_sent))
            return self.session.rows_written(end, now)

        with self._lock:
            if not self._is_next(first_row) or (self._total_rows is not None and end > self._total_rows):
                raise LocalProtocolError(
                    f"stream {self.stream_id}: {num_rows} rows written at {first_row}; {self._num_written} are there "
                    f"and {self._total_rows} announced"
                )
            in_place = slots is not None and slots.commit(first_row, planes)
            self._num_written = end
            closed = self._sender.run_soon(self, add)  # under the lock: rows stay in order whoever writes them
        if closed is not None:
            self.finish(closed)
        elif in_place and slots is not None:
            slots.settle()

    def slot_rows(self, first_row: int, num_rows: int) -> dict[str, Tensor] | None:
        """Where to compute the next rows so that they need no copy: views [n, *row_shape] of the receiver's memory.

        n is at most num_rows, and within the announced total: what lies side by side. None where there is nothing of
        that kind (now): compute them anywhere. Hand them to `write(first_row, rows)` exactly as they are, or give them
        up with `drop_slots`; nobody may touch them afterwards, and until then nothing else can be reserved or written.
        LocalProtocolError unless `first_row` is the next to be written.
        """
        slots = self.slots
        with self._lock:
            if not self._is_next(first_row):
                raise LocalProtocolError(
                    f"stream {self.stream_id}: slots wanted for row {first_row}, the next one is {self._num_written}"
                )
            if self._total_rows is not None:
                num_rows = min(num_rows, self._total_rows - first_row)
            return None if slots is None else slots.reserve(first_row, num_rows)

    def drop_slots(self) -> None:
        """The rows of `slot_rows` are not wanted after all; nobody writes them any more."""
        slots = self.slots  # the I/O thread takes it away when the stream ends
        if slots is not None and slots.drop():
            slots.settle()

    def abort(self, code: str, message: str) -> None:
        """End the stream; both ends get the error. Nothing happens when it is over."""
        self._soon(lambda now: self.session.fail(StreamAborted(code, message)))

    def result(self, timeout_s: float) -> StreamStats:
        """Wait for the end. Raises what ended it, or StreamTimeout when it goes on after `timeout_s`."""
        if not self._ended.wait(timeout_s):
            raise StreamTimeout(f"stream {self.stream_id} is not over after {timeout_s:g} s: wait on, or abort it")
        if isinstance(self._outcome, StreamStats):
            return self._outcome
        assert self._outcome is not None
        raise self._outcome

    def on_done(self, callback: Callable[[OutgoingStream], None]) -> None:
        """Run `callback(stream)` once when the stream is over (result(0) then tells how); at once if it is."""
        with self._lock:
            if not self._ended.is_set():
                self._on_done.append(callback)
                return
        callback(self)

    # -- for the sender -------------------------------------------------------------------------------------------

    def accept(self, accepted: Accepted) -> None:
        """The receiver answered."""
        with self._lock:
            self.accepted = accepted
            self._known.set()
            callbacks, self._on_accepted = self._on_accepted, []
        self.rows.release(accepted.first_row)
        self._run(callbacks)

    def finish(self, outcome: StreamStats | TransferError) -> None:
        """The stream is over."""
        with self._lock:
            if self._ended.is_set():
                return
            self._outcome = outcome
            self._ended.set()
            self._known.set()
            callbacks, self._on_done = self._on_done, []
            self._on_accepted.clear()
        self._run(callbacks)

    def _is_next(self, first_row: int) -> bool:
        """Under the lock: whether rows may be written from there on."""
        return first_row == self._num_written or self._num_written < first_row <= (self.first_row or 0)

    def _run(self, callbacks: Sequence[Callable[[OutgoingStream], None]]) -> None:
        for callback in callbacks:
            try:
                callback(self)
            except Exception:
                logger.exception("a callback of stream %s failed", self.stream_id)

    def _soon(self, event: Callable[[float], list[SenderAction]]) -> None:
        closed = self._sender.run_soon(self, event)
        if closed is not None:
            self.finish(closed)
