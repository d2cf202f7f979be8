"""Onlooker: reads every stream message as it leaves and as it arrives, keeps the books, and checks what it says.

Each check is one promise about one kind of message. What is compared with are the books, so never the word of the end
that sent the message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transfer.config import TransferConfig
from transfer.protocol.messages import (
    Abort,
    Accept,
    Ack,
    Announce,
    Block,
    Close,
    Grant,
    Message,
    Open,
    Resume,
    Revoke,
    Revoked,
)
from transfer.simulation.books import SenderBook, StreamBook
from transfer.simulation.judge import Judge
from transfer.simulation.story import Story
from transfer.simulation.timeline import Process


class Onlooker:
    """Watches a network (see network.Observer); tells `judge` of every broken promise."""

    def __init__(self, judge: Judge, story: Story, config: TransferConfig, now: Callable[[], float]) -> None:
        self._judge = judge
        self._story = story
        self._now = now
        self._size = config.block_size
        self._credit = config.credit_window_blocks
        self.last_restart_s = 0.0  # when some I/O loop began anew last

    def sent(self, process: Process, message: Message, frames: Sequence[bytes]) -> None:
        """A message leaves `process`."""
        book = self._judge.streams.get(getattr(message, "stream_id", ""))
        self._story.message(self._now(), process, book, "sends", message)
        if book is None:
            return
        if book.process is process:
            self._sent_by_receiver(book, message)
            return
        sender = book.senders.get(getattr(message, "epoch", 0))
        if sender is None or sender.process is not process:
            return
        if isinstance(message, Block):
            self._on_block_sent(book, sender, message, frames)
        elif isinstance(message, Announce) and message.total_rows != sender.content.num_rows:
            self._complain("2: the totals are the producer's", book, f"{message} for {sender.content.num_rows} rows")

    def arriving(self, process: Process, message: Message, frames: Sequence[bytes]) -> None:
        """A message is about to be handled by `process`."""
        book = self._judge.streams.get(getattr(message, "stream_id", ""))
        self._story.message(self._now(), process, book, "gets", message)
        if isinstance(message, Block):
            self._judge.receiving(process, message, frames)
        if book is None:
            return
        if isinstance(message, Open):
            if process is book.process and message.epoch == book.epoch != book.opened_epoch and not book.is_ended:
                book.opened_epoch, book.is_orphaned = message.epoch, False
            return
        if isinstance(message, Revoked) and (message.epoch, message.serial) == book.revocation:
            book.is_revoking = False
        if isinstance(message, Abort) and process is book.process and message.epoch == book.epoch:
            book.is_orphaned = True
        sender = book.senders.get(getattr(message, "epoch", 0))
        if sender is not None and process is sender.process and sender.outcome is None:
            self._arriving_at_sender(book, sender, message)

    def disturbed(self, message: Message, kind: str) -> None:
        """A fault met a message."""
        book = self._judge.streams.get(getattr(message, "stream_id", ""))
        if book is not None:
            self._story.tell(self._now(), "network", book.number, f"{kind} meets {type(message).__name__}")
            sender = book.senders.get(getattr(message, "epoch", 0))
            if sender is not None:
                sender.num_disturbed += 1

    def loop_restarted(self, process: Process) -> None:
        """What was on its way into a program's I/O loop is lost."""
        self.last_restart_s = self._now()
        self._story.tell(self._now(), process, None, "its I/O loop died and runs again")
        self._judge.turns.begin_anew(process.host)
        self.link_disturbed(None, process.host)

    def link_disturbed(self, sender: str | None, receiver: str | None) -> None:
        """Something met every stream between these hosts (None: any)."""
        for book in self._judge.streams.values():
            if receiver in (None, book.process.host):
                for epoch in book.senders.values():
                    epoch.num_disturbed += sender in (None, epoch.process.host)

    def _sent_by_receiver(self, book: StreamBook, message: Message) -> None:
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

    def _arriving_at_sender(self, book: StreamBook, sender: SenderBook, message: Message) -> None:
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

    # -- the receiver's messages ----------------------------------------------------------------------------------

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
        owners = self._judge.watches[book.process].owners
        strange = [block_id for block_id in grant.block_ids if owners.get(block_id) != book.stream_id]
        if strange or len(set(grant.block_ids)) != len(grant.block_ids):
            self._complain("4: a grant names the stream's own blocks", book, f"{grant.block_ids}, of which {strange}")
        if grant.round > 0 and not book.is_admitted:
            self._complain("2: the rest is granted once admitted", book, f"round {grant.round} before admission")
        self._judge.granted(book, grant)

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

    # -- the sender's side ----------------------------------------------------------------------------------------

    def _on_block_sent(self, book: StreamBook, sender: SenderBook, block: Block, frames: Sequence[bytes]) -> None:
        granted = sender.grants.get(block.index)
        if granted != block.block_id:
            self._complain("2: only granted blocks are sent", book, f"{block}; granted for it is {granted}")
        if block.index >= sender.acked + self._credit:
            self._complain("6: the credit bounds what is under way", book, f"{block} with {sender.acked} acknowledged")
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

    def _complain(self, promise: str, book: StreamBook, text: str) -> None:
        self._judge.complain(promise, book.number, text)
