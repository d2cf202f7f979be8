"""The program behind a stream: consumers, and the admission of their host, which takes its time."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from transfer.errors import TransferError
from transfer.memory.buffers import Tensor
from transfer.protocol.actions import StreamStats
from transfer.protocol.messages import Body
from transfer.simulation.books import StreamBook
from transfer.simulation.hosts import ReceiverHost
from transfer.simulation.judge import Judge


class Consumer:
    """One stream's listener: tells the judge what it hears, and its host's admission when it knows the totals."""

    def __init__(
        self,
        book: StreamBook,
        judge: Judge,
        admission: Admission,
        on_end: Callable[[StreamStats | TransferError], None],
    ) -> None:
        self.book = book
        self.age = book.number
        self.num_restarts = 0
        self._judge = judge
        self._admission = admission
        self._on_end = on_end

    def on_announce(self, total_rows: int, items: Sequence[Body]) -> None:
        """See StreamListener."""
        self._judge.announced(self.book, total_rows, items)
        if total_rows:
            self._admission.ask(self, total_rows)

    def on_rows(self, first_row: int, planes: Mapping[str, Tensor]) -> None:
        """See StreamListener."""
        self._judge.delivered(self.book, first_row, planes)

    def on_restart(self) -> None:
        """See StreamListener."""
        self.num_restarts += 1
        self.leave()
        self._judge.restarted(self.book)

    def on_complete(self, stats: StreamStats) -> None:
        """See StreamListener."""
        self._judge.completed(self.book, stats)
        self.leave()
        self._on_end(stats)

    def on_failed(self, error: TransferError) -> None:
        """See StreamListener."""
        self._judge.failed(self.book, error)
        self.leave()
        self._on_end(error)

    def leave(self) -> None:
        """Give back what was reserved."""
        self._admission.leave(self)


class Admission:
    """Which announced streams of one host get room in its input buffer, and when."""

    def __init__(self, host: ReceiverHost, policy: str, budget_rows: int, dice: random.Random) -> None:
        self._host = host
        self._process = host.process
        self._policy = policy
        self._free_rows = budget_rows
        self._dice = dice
        self._waiting: dict[Consumer, int] = {}  # rows asked for
        self._reserved: dict[Consumer, int] = {}

    def ask(self, consumer: Consumer, num_rows: int) -> None:
        """A stream of so many rows wants to be admitted."""
        self._waiting[consumer] = num_rows
        delay_s = self._dice.uniform(0, 3) if self._policy == "late" else 0.0
        self._process.after(delay_s, self._admit)

    def leave(self, consumer: Consumer) -> None:
        """A stream is over: its room is free a moment later."""
        self._waiting.pop(consumer, None)
        num_rows = self._reserved.pop(consumer, 0)
        if num_rows:
            self._process.after(self._dice.uniform(0, 0.3), self._release, num_rows)

    def _release(self, num_rows: int) -> None:
        self._free_rows += num_rows
        self._admit()

    def _admit(self) -> None:
        order = sorted(self._waiting, key=lambda consumer: consumer.age)
        if self._policy == "any_order":
            self._dice.shuffle(order)
        for consumer in order:
            num_rows = self._waiting[consumer]
            if num_rows > self._free_rows:
                return  # no younger one overtakes it
            del self._waiting[consumer]
            self._reserved[consumer] = num_rows
            self._free_rows -= num_rows
            consumer.book.is_admitted = True
            self._host.receiver.admit(consumer.book.stream_id, num_rows, num_restarts=consumer.num_restarts)
