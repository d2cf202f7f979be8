"""Onlooker: reads every message as it leaves and as it arrives, tells the story, and has the rules of its end judge it.

What they compare with are the books, so never the word of the end that sent the message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transfer.config import TransferConfig
from transfer.protocol.messages import Block, Message
from transfer.simulation.judge import Judge
from transfer.simulation.receiver_rules import ReceiverRules
from transfer.simulation.sender_rules import SenderRules
from transfer.simulation.story import Story
from transfer.simulation.timeline import Process


class Onlooker:
    """Watches a network (see network.Observer); tells `judge` of every broken promise."""

    def __init__(self, judge: Judge, story: Story, config: TransferConfig, now: Callable[[], float]) -> None:
        self._judge = judge
        self._story = story
        self._now = now
        self._receiver = ReceiverRules(judge, config.block_size)
        self._sender = SenderRules(judge, config.block_size, config.credit_window_blocks)
        self.last_restart_s = 0.0  # when some I/O loop began anew last

    def sent(self, process: Process, message: Message, frames: Sequence[bytes]) -> None:
        """A message leaves `process`."""
        book = self._judge.streams.get(getattr(message, "stream_id", ""))
        self._story.message(self._now(), process, book, "sends", message)
        if book is None:
            return
        if book.process is process:
            self._receiver.sent(book, message)
            return
        sender = book.senders.get(getattr(message, "epoch", 0))
        if sender is not None and sender.process is process:
            self._sender.sent(book, sender, message, frames)

    def arriving(self, process: Process, message: Message, frames: Sequence[bytes]) -> None:
        """A message is about to be handled by `process`."""
        book = self._judge.streams.get(getattr(message, "stream_id", ""))
        self._story.message(self._now(), process, book, "gets", message)
        if isinstance(message, Block):
            self._judge.receiving(process, message, frames)
        if book is None:
            return
        if process is book.process:
            self._receiver.arriving(book, message)
        sender = book.senders.get(getattr(message, "epoch", 0))
        if sender is not None and process is sender.process and sender.outcome is None:
            self._sender.arriving(book, sender, message)

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
