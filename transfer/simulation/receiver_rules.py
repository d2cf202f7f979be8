"""ReceiverRules: what a receiver may say, and what follows for the books. Each check is a promise about a message."""

from __future__ import annotations

from transfer.protocol.messages import (
    WITHDRAWN,
    Abort,
    Accept,
    Ack,
    Attached,
    Close,
    Grant,
    Message,
    Open,
    Resume,
    Revoke,
    Revoked,
)
from transfer.simulation.books import StreamBook
from transfer.simulation.judge import Judge
from transfer.simulation.segments import SlotWatch


class ReceiverRules:
    """Reads the messages of receivers as they leave, and those to receivers as they arrive."""

    def __init__(self, judge: Judge, block_size: int) -> None:
        self._judge = judge
        self._size = block_size

    def sent(self, book: StreamBook, message: Message) -> None:
        """A message leaves the receiver of a stream."""
        match message:
            case Grant():
                self._on_grant_sent(book, message)
            case Ack() | Resume():
                self._on_ack_sent(book, message)
            case Accept():
                self._on_accept_sent(book, message)
            case Revoke() if (message.epoch, message.serial) > book.revocation:
                book.revocation, book.is_revoking = (message.epoch, message.serial), True
                book.acked = min(book.acked, message.first_index)
            case Close():
                self._on_close_sent(book, message)
            case Abort() if message.epoch == book.epoch:
                book.is_orphaned = True

    def arriving(self, book: StreamBook, message: Message) -> None:
        """A message is about to be handled by the receiver of a stream."""
        match message:
            case Open() if message.epoch == book.epoch != book.opened_epoch and not book.is_ended:
                book.opened_epoch, book.is_orphaned = message.epoch, False
            case Revoked() if (message.epoch, message.serial) == book.revocation:
                book.is_revoking = False
            case Attached() if message.epoch == book.epoch and book.is_opened and book.area is None:
                self._on_attached_arriving(book, message)
            case Abort() if message.epoch == book.epoch:
                book.is_orphaned = True

    def _on_grant_sent(self, book: StreamBook, grant: Grant) -> None:
        if (
            grant.allocated_tokens != len(grant.block_ids) * self._size
            or grant.block_size != self._size
            or not grant.block_ids
        ):
            self._complain(
                "1: a grant is whole blocks",
                book,
                f"{len(grant.block_ids)} blocks of {grant.block_size} say {grant.allocated_tokens} tokens",
            )
        known = book.grants.get((grant.epoch, grant.round))
        if known is not None:
            if known.block_ids[: len(grant.block_ids)] != grant.block_ids or known.first_index != grant.first_index:
                self._complain("1: a repeated grant says the same", book, f"{grant} after {known}")
            return
        book.grants[grant.epoch, grant.round] = grant
        if isinstance(book.area, SlotWatch):
            book.slot_epochs.add(grant.epoch)
        owners = {} if book.area is None else book.area.owners
        strange = [block_id for block_id in grant.block_ids if owners.get(block_id) != book.stream_id]
        if strange or len(set(grant.block_ids)) != len(grant.block_ids):
            self._complain("4: a grant names the stream's own blocks", book, f"{grant.block_ids}, of which {strange}")
        if grant.round > 0 and not book.is_admitted:
            self._complain("2: the rest is granted once admitted", book, f"round {grant.round} before admission")
        self._judge.shares.granted(book, grant)

    def _on_ack_sent(self, book: StreamBook, ack: Ack | Resume) -> None:
        if ack.epoch != book.epoch:
            return
        self._judge.settle()
        if ack.next_index > book.next_stored:
            self._complain(
                "3: acknowledged means stored",
                book,
                f"blocks below {ack.next_index} are acknowledged, stored are those below {book.next_stored}",
            )
        if ack.serial == (book.revocation[1] if book.revocation[0] == ack.epoch else 0):
            if ack.next_index < book.acked:
                self._complain("3: what is acknowledged stays", book, f"{ack} after {book.acked}")
            book.acked = max(book.acked, ack.next_index)
        book.kept = max(book.kept, ack.kept_index)

    def _on_accept_sent(self, book: StreamBook, accept: Accept) -> None:
        book.accepted_epoch = accept.epoch
        if accept.epoch == book.epoch:
            self._tell_area(book, accept)
        sender, before = book.senders.get(accept.epoch), book.delivering
        if sender is None or accept.epoch != book.epoch or any(epoch == accept.epoch for epoch, _ in book.grants):
            return  # a repetition
        goes_on = before is not None and book.is_admitted and bool(sender.key) and before.key == sender.key
        expected = book.next_stored if goes_on else 0
        if accept.first_index != expected:
            self._complain(
                "3: another sender goes on at the same offset",
                book,
                f"it is to go on at block {accept.first_index}; stored are those below {expected}",
            )

    def _on_close_sent(self, book: StreamBook, close: Close) -> None:
        if close.epoch != book.epoch or book.is_given_up:
            return
        if close.total_rows != book.total_rows or book.num_delivered != close.total_rows:
            self._complain(
                "3: closed means delivered",
                book,
                f"closed with {close.total_rows} rows; announced {book.total_rows}, delivered {book.num_delivered}",
            )

    def _tell_area(self, book: StreamBook, accept: Accept) -> None:
        """Where the blocks of an epoch are to be: where its first Accept says, or where the sender then can."""
        if accept.segment == WITHDRAWN:
            self._on_withdrawal(book, accept)
            return
        if accept.epoch == book.answered_epoch:
            return
        book.answered_epoch, book.invited = accept.epoch, None
        book.area = self._judge.watches[book.process]
        if accept.segment is not None:
            book.invited = self._judge.segments[accept.segment["generation"]]
            book.area = book.invited if book.invited.is_attached else None

    def _on_withdrawal(self, book: StreamBook, accept: Accept) -> None:
        """A segment is given up: its stream is granted nothing more before its sender said that it heard."""
        if accept.epoch == book.withdrawn_epoch:
            return
        if accept.epoch in book.slot_epochs or book.invited is None or not book.invited.is_abandoned:
            self._complain("4: only what was not granted is withdrawn", book, f"{accept.segment} for {book.invited}")
        book.withdrawn_epoch, book.area, book.invited = accept.epoch, None, None

    def _on_attached_arriving(self, book: StreamBook, attached: Attached) -> None:
        """The answer to an invitation; one for an epoch that is over says nothing, about its segment neither."""
        invited = book.invited
        if attached.generation == 0:
            book.area = self._judge.watches[book.process]
        elif invited is not None and attached.generation == invited.generation and not invited.is_abandoned:
            invited.is_attached = True
            book.area = invited

    def _complain(self, promise: str, book: StreamBook, text: str) -> None:
        self._judge.complain(promise, book.number, text)
