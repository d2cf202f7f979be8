"""StreamRecord: all that a restart of the receiving loop must not lose of one stream. Plain frozen values.

The session lives on these very values: slow events replace `StreamFacts`, blocks move the window only. So a record
costs next to nothing, and is never behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from transfer.errors import TransferError
from transfer.protocol.messages import Accept, Open
from transfer.protocol.negotiate import Terms
from transfer.protocol.receiver_window import WindowRecord
from transfer.protocol.state import ReceiverState
from transfer.protocol.ticket import Ticket


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamFacts:
    """What is known of a stream at its receiver, but for its blocks.

    opened, accept, terms   of the current epoch; None until its sender opens it
    content_key             of the last sender that opened it
    shares_memory           the current epoch's sender writes the blocks itself, where they lie
    is_announced            by the current epoch's sender
    loss, orphaned_at       why and since when it has no sender
    """

    ticket: Ticket
    started: float
    take_over_s: float = 0.0
    deadline: float | None = None
    state: ReceiverState = ReceiverState.REGISTERED
    opened: Open | None = None
    accept: Accept | None = None
    terms: Terms | None = None
    content_key: str = ""
    total_rows: int | None = None
    round0_tokens: int = 0
    shares_memory: bool = False
    is_announced: bool = False
    is_admitted: bool = False
    loss: TransferError | None = None
    orphaned_at: float = 0.0


class StreamRecord(NamedTuple):
    """One stream."""

    facts: StreamFacts
    window: WindowRecord
