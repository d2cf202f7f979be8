"""What a new epoch means for a stream at its receiver: which sender may go on, where, and what is forgotten. Pure.

A stream that was admitted goes on where its stored blocks end. One that was not admitted may be asked for its blocks at
any time, so it is no ground to go on from: the new sender starts at index 0, under the announcement that stands.
"""

from __future__ import annotations

from dataclasses import replace

from transfer.errors import TransferError
from transfer.protocol.actions import FreeBlocks, ReceiverAction, Restarted
from transfer.protocol.messages import Accept, Body, Open
from transfer.protocol.negotiate import SEALED, Offer, agree
from transfer.protocol.receiver_window import ReceiverWindow
from transfer.protocol.state import ReceiverEvent, ReceiverState
from transfer.protocol.stream_record import StreamFacts
from transfer.protocol.ticket import Ticket, proven_accept


def orphaned_by(
    facts: StreamFacts, window: ReceiverWindow, error: TransferError, ticket: Ticket, now: float
) -> tuple[StreamFacts, list[ReceiverAction]]:
    """The sender is lost: its epoch ends, what it was granted and did not fill returns to the pool."""
    freed = window.begin_epoch()
    facts = replace(
        facts,
        ticket=ticket,
        opened=None,
        accept=None,
        terms=None,
        shares_memory=False,
        is_announced=False,
        loss=error,
        orphaned_at=facts.orphaned_at if facts.state is ReceiverState.ORPHANED else now,
    )
    return facts, [FreeBlocks(freed, fenced=True)] if freed else []


def opened_by(
    facts: StreamFacts, window: ReceiverWindow, offer: Offer, message: Open, now: float
) -> tuple[ReceiverEvent, StreamFacts, list[ReceiverAction]]:
    """A proven Open of the current epoch: what happens, the facts then, and what to do. Raises Incompatible."""
    terms = agree(offer, message.offer)
    same = bool(message.content_key) and message.content_key == facts.content_key
    deadlines = [facts.deadline] if facts.deadline is not None else []
    if message.deadline_ms is not None:
        deadlines.append(now + message.deadline_ms / 1000)
    facts = replace(
        facts, opened=message, terms=terms, content_key=message.content_key, deadline=min(deadlines, default=None)
    )
    if facts.total_rows is None:
        return ReceiverEvent.OPEN, facts, []
    if same and facts.is_admitted:
        return ReceiverEvent.RESUME_ADMITTED, facts, []
    freed = window.restart()
    actions: list[ReceiverAction] = [FreeBlocks(freed)] if freed else []
    if same:
        return ReceiverEvent.RESUME_HELD, facts, actions
    facts = replace(facts, total_rows=None, is_admitted=False)
    return ReceiverEvent.RESTART, facts, [Restarted(), *actions]


def accept_of(
    facts: StreamFacts, offer: Offer, first_index: int, segment: Body | None, data_address: str | None
) -> Accept:
    """The answer to the Open in `facts`; `data_address` only where payloads are sealed."""
    assert facts.opened is not None and facts.terms is not None
    message = Accept(
        stream_id=facts.ticket.stream_id,
        epoch=facts.ticket.epoch,
        proof=b"",
        offer=offer,
        first_index=first_index,
        segment=segment,
        data_address=data_address if facts.terms.integrity == SEALED else None,
    )
    return proven_accept(facts.ticket, message, facts.opened)
