"""What a session asks its shell to do, and what a finished stream reports. Plain values, executed in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from transfer.config import TransferConfig
from transfer.errors import TransferError
from transfer.protocol.messages import Body, StreamMessage
from transfer.protocol.negotiate import Terms


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamStats:
    """One finished stream: whole blocks, payload bytes, grants used, blocks sent (or received) again, seconds."""

    blocks: int
    num_bytes: int
    grant_rounds: int
    resent_blocks: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Timers:
    """Seconds: first and longest gap between probes, silence limit, progress limit, limit of waiting for ourselves."""

    open_retry_s: float = 0.1
    probe_s: float = 1.0
    max_probe_s: float = 2.0
    idle_timeout_s: float = 30.0
    stream_timeout_s: float = 120.0
    admit_timeout_s: float = 600.0

    @classmethod
    def of(cls, config: TransferConfig) -> Timers:
        """The timers that a configuration asks for."""
        return cls(
            max_probe_s=min(config.ping_interval_s, config.idle_timeout_s / 4),
            idle_timeout_s=config.idle_timeout_s,
            stream_timeout_s=config.stream_timeout_s,
            admit_timeout_s=config.admit_timeout_s,
        )


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message without payload."""

    message: StreamMessage


@dataclass(frozen=True, slots=True)
class SendBlock:
    """Send rows first_row .. first_row + num_rows - 1 as block `index` for the peer's `block_id`."""

    index: int
    block_id: int
    first_row: int
    num_rows: int
    serial: int


@dataclass(frozen=True, slots=True)
class SendFilled:
    """Write rows first_row ... into the peer's slots, one block each from `first_index` on, and say so.

    Slots that hold their rows already (sent before, or computed in place) are not written again.
    """

    first_index: int
    block_ids: tuple[int, ...]
    first_row: int
    num_rows: int
    serial: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """The receiver proved itself: what was agreed, and where the stream goes on."""

    terms: Terms
    first_row: int
    segment: Body | None
    data_address: str | None


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The receiver gave up the segment that it had offered: nothing of it was granted, and nothing will be."""


@dataclass(frozen=True, slots=True)
class ReleaseRows:
    """Rows below `before_row` are stored at the peer: forget them."""

    before_row: int


@dataclass(frozen=True, slots=True)
class Place:
    """A verified block: copy its frames (one per plane) into the granted one; none where they are in place already."""

    block_id: int
    frames: Sequence[memoryview]


@dataclass(frozen=True, slots=True)
class Placed:
    """The sender wrote this many verified blocks where they are."""

    num_blocks: int


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand rows to the consumer, and return their blocks to the pool.

    They are those of `num_blocks` blocks up to `index`, which lie side by side from `block_id` on.
    """

    index: int
    block_id: int
    first_row: int
    num_rows: int
    num_blocks: int = 1


@dataclass(frozen=True, slots=True)
class FreeBlocks:
    """Return blocks to the pool. `fenced`: an old sender may still hold them, where senders write blocks themselves."""

    block_ids: tuple[int, ...]
    fenced: bool = False


@dataclass(frozen=True, slots=True)
class Announced:
    """Tell the consumer the totals."""

    total_rows: int
    items: tuple[Body, ...]


@dataclass(frozen=True, slots=True)
class Restarted:
    """Tell the consumer to forget the totals and every row: another sender starts from row 0."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A message was dropped; count it under `reason`."""

    reason: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The stream is over and complete."""

    stats: StreamStats


@dataclass(frozen=True, slots=True)
class Failed:
    """The stream is over without its rows."""

    error: TransferError


SenderAction: TypeAlias = (
    Send | SendBlock | SendFilled | Accepted | Withdrawn | ReleaseRows | Dropped | Finished | Failed
)
ReceiverAction: TypeAlias = (
    Send | Place | Placed | Deliver | FreeBlocks | Announced | Restarted | Dropped | Finished | Failed
)
