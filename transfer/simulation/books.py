"""Books: what an onlooker knows of each stream, written down from what crosses the wire and what consumers see.

Plain records. `onlooker` and `promises` fill them, never from the counters of the code they judge.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transfer.errors import TransferError
from transfer.protocol.actions import StreamStats
from transfer.protocol.messages import Grant
from transfer.simulation.content import Content
from transfer.simulation.memory import BlockWatch
from transfer.simulation.segments import SlotWatch
from transfer.simulation.timeline import Process


@dataclass(frozen=True, kw_only=True, slots=True)
class Breach:
    """A promise that was broken. `number`: the request it happened to, if it was one's."""

    promise: str
    text: str
    number: int | None
    time_s: float

    def __str__(self) -> str:
        of = "" if self.number is None else f" (stream {self.number})"
        return f"promise {self.promise!r} broken at {self.time_s:.3f} s{of}: {self.text}"


@dataclass(slots=True)
class SenderBook:
    """One epoch of a stream at its sender."""

    process: Process
    content: Content
    key: str  # the content key it opens with
    is_accepted: bool = False
    grants: dict[int, int] = field(default_factory=dict)  # index -> block id, of grants that arrived
    granted_end: int = 0  # indexes below were granted, by grants that arrived
    num_rounds: int = 0
    revocation: int = 0  # serial of the last one that arrived
    acked: int = 0
    sent: dict[int, int] = field(default_factory=dict)  # index -> block id it was sent for last
    last_serial: int = 0
    num_resent: int = 0
    num_disturbed: int = 0
    sealed: dict[int, tuple[int, int]] = field(default_factory=dict)  # index -> slot and serial it was sealed with
    placed: set[int] = field(default_factory=set)  # indexes that its producer computed in their slots
    has_released: bool = False  # it said that it let go of its slots
    outcome: StreamStats | TransferError | None = None


@dataclass(slots=True)
class StreamBook:
    """One stream at one life of its receiver."""

    stream_id: str
    number: int
    process: Process
    epoch: int
    area: BlockWatch | None  # whose blocks it is granted; None while its sender is asked whether it can use `invited`
    invited: SlotWatch | None = None  # the segment that its sender was asked to map
    answered_epoch: int = 0  # of the last Accept that told where its blocks are to be
    withdrawn_epoch: int = 0  # of the last Accept that withdrew a segment
    slot_epochs: set[int] = field(default_factory=set)  # those under which it was granted slots
    senders: dict[int, SenderBook] = field(default_factory=dict)
    is_registered: bool = False
    is_ended: bool = False
    is_given_up: bool = False  # by its consumer, which hears nothing more from then on
    is_admitted: bool = False
    opened_epoch: int = 0  # of the last Open that came
    accepted_epoch: int = 0  # of the last Accept that left
    is_orphaned: bool = False  # its sender was given up, whether or not a later epoch is known yet
    delivering: SenderBook | None = None  # whose rows the consumer expects
    total_rows: int | None = None
    num_delivered: int = 0  # rows
    index_of: dict[int, int] = field(default_factory=dict)  # block id -> index, for stored blocks
    stored: set[int] = field(default_factory=set)
    next_stored: int = 0  # every index below is stored, or was and is delivered
    grants: dict[tuple[int, int], Grant] = field(default_factory=dict)  # (epoch, round)
    revocation: tuple[int, int] = (0, 0)  # epoch and serial of the last Revoke
    is_revoking: bool = False  # its sender has not said that it heard the last Revoke
    acked: int = 0  # the highest next_index said under them
    kept: int = 0  # the highest kept_index said in this epoch

    @property
    def is_live(self) -> bool:
        """Known to its receiver, and not over."""
        return self.is_registered and not self.is_ended

    @property
    def is_opened(self) -> bool:
        """Whether a sender of the current epoch is there."""
        return self.is_live and self.accepted_epoch == self.epoch and not self.is_orphaned

    @property
    def needs_more(self) -> bool:
        """Whether rows are still to be delivered."""
        return self.total_rows is None or self.num_delivered < self.total_rows

    @property
    def wants_block(self) -> bool:
        """Whether it can use a block now: one that is not admitted needs its epoch's first grant, and no other."""
        if not self.is_opened or not self.needs_more or self.is_revoking or self.area is None:
            return False
        return self.is_admitted or not any(epoch == self.epoch for epoch, _ in self.grants)

    def start_over(self) -> None:
        """Another content begins at row 0."""
        self.delivering = self.total_rows = None
        self.is_admitted = False
        self.num_delivered = self.next_stored = self.acked = self.kept = 0
        self.stored.clear()
        self.index_of.clear()
