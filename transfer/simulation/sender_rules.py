"""SenderRules: what a sender may say, and what follows for the books. Each check is a promise about a message."""

from __future__ import annotations

from collections.abc import Sequence

from transfer.protocol.messages import Accept, Ack, Announce, Block, Filled, Grant, Message, Released, Resume, Revoke
from transfer.simulation.books import SenderBook, StreamBook
from transfer.simulation.judge import Judge


class SenderRules:
    """Reads the messages of senders as they leave, and those to senders as they arrive."""

    def __init__(self, judge: Judge, block_size: int, credit: int) -> None:
        self._judge = judge
        self._size = block_size
        self._credit = credit

    def sent(self, book: StreamBook, sender: SenderBook, message: Message, frames: Sequence[bytes]) -> None:
        """A message leaves the sender of an epoch."""
        match message:
            case Block():
                self._on_block_sent(book, sender, message, frames)
            case Filled():
                self._on_filled_sent(book, sender, message)
            case Released():
                sender.has_released = True
            case Announce() if message.total_rows != sender.content.num_rows:
                text = f"{message} for {sender.content.num_rows} rows"
                self._complain("2: the totals are the producer's", book, text)

    def arriving(self, book: StreamBook, sender: SenderBook, message: Message) -> None:
        """A message is about to be handled by the sender of an epoch."""
        match message:
            case Grant() if sender.is_accepted:
                self._on_grant_arriving(book, sender, message)
            case Revoke() if message.serial > sender.revocation and sender.num_rounds:
                self._on_revoke_arriving(sender, message)
            case Ack() | Resume() if message.serial == sender.revocation:
                sender.acked = max(sender.acked, message.next_index)
            case Accept() if not sender.is_accepted:
                sender.is_accepted, sender.acked = True, message.first_index
                sender.granted_end = message.first_index

    def _on_block_sent(self, book: StreamBook, sender: SenderBook, block: Block, frames: Sequence[bytes]) -> None:
        self._check_granted(book, sender, block, block.index, block.block_id)
        rows = sender.content.frames(block.first_row, block.num_rows)
        if block.tag and list(frames) != rows:
            self._complain("3: a block holds the producer's rows", book, f"{block} has other bytes")
        if not block.tag and any(row in frame for row, frame in zip(rows, frames, strict=True) if len(row) > 4):
            self._complain("8: what is sealed cannot be read", book, f"{block} has its rows in the open")
        if block.serial <= sender.last_serial:
            self._complain("4: a serial is used once", book, f"{block} after serial {sender.last_serial}")
        sender.last_serial = block.serial
        if sender.sent.get(block.index) == block.block_id:
            sender.num_resent += 1
            if sender.num_resent > self._credit * sender.num_disturbed:
                self._complain(
                    "3: a fault costs at most one credit window",
                    book,
                    f"{sender.num_resent} blocks sent again after {sender.num_disturbed} faults; a window is "
                    f"{self._credit}",
                )
        sender.sent[block.index] = block.block_id

    def _on_filled_sent(self, book: StreamBook, sender: SenderBook, filled: Filled) -> None:
        for index, slot in enumerate(filled.block_ids, filled.first_index):
            self._check_granted(book, sender, filled, index, slot)
            if sender.sealed.get(index) != (slot, filled.serial):
                self._complain("4: what is said to be filled is sealed", book, f"{filled}: slot {slot} is not")

    def _check_granted(self, book: StreamBook, sender: SenderBook, message: Message, index: int, block_id: int) -> None:
        granted = sender.grants.get(index)
        if granted != block_id:
            self._complain("2: only granted blocks are sent", book, f"{message}; granted for {index} is {granted}")
        if index >= sender.acked + self._credit and index not in sender.placed:
            text = f"{message} with {sender.acked} acknowledged"
            self._complain("6: the credit bounds what is under way", book, text)

    def _on_grant_arriving(self, book: StreamBook, sender: SenderBook, grant: Grant) -> None:
        is_next = grant.round == sender.num_rounds
        if not is_next and not (grant.round > sender.num_rounds and grant.first_index <= sender.acked):
            return
        if grant.allocated_tokens != len(grant.block_ids) * grant.block_size:
            self._judge.falsified.append((book, sender))
            return
        sender.num_rounds = grant.round + 1
        for offset, block_id in enumerate(grant.block_ids):
            sender.grants[grant.first_index + offset] = block_id
        sender.granted_end = grant.first_index + len(grant.block_ids)

    def _on_revoke_arriving(self, sender: SenderBook, revoke: Revoke) -> None:
        if revoke.first_index > max(sender.granted_end, sender.acked):
            return  # a grant before it was lost: this comes again, after that
        sender.revocation, sender.num_rounds, sender.granted_end = revoke.serial, revoke.round, revoke.first_index
        sender.acked = min(sender.acked, revoke.first_index)
        for index in [index for index in sender.grants if index >= revoke.first_index]:
            del sender.grants[index]
            sender.sent.pop(index, None)  # sent again under another grant, it is not sent again
        sender.placed = {index for index in sender.placed if index < revoke.first_index}

    def _complain(self, promise: str, book: StreamBook, text: str) -> None:
        self._judge.complain(promise, book.number, text)
