"""Shares: who may hold how many blocks of a pool, or slots of a segment, while others need some (promise 5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from transfer.protocol.messages import Grant
from transfer.simulation.books import StreamBook
from transfer.simulation.memory import BlockWatch
from transfer.simulation.segments import SlotWatch
from transfer.simulation.timeline import Process
from transfer.simulation.turns import PATIENCE_S, Turns

Complain: TypeAlias = Callable[[str, int | None, str], None]


class Shares:
    """Looks at every pool and segment of a receiving program after each of its steps."""

    def __init__(self, complain: Complain, turns: Turns, block_size: int) -> None:
        self.num_exhausted = 0
        self._complain = complain
        self._turns = turns
        self._size = block_size
        self._granted: list[tuple[StreamBook, Grant]] = []  # in the step that runs, to streams not admitted
        self._announced: list[StreamBook] = []  # in the step that runs
        self._fenced: dict[SlotWatch, dict[tuple[str, int], float]] = {}  # since when, of epochs that go on
        self._starving: dict[BlockWatch, set[str]] = {}  # streams that wait for a block while there is none

    def granted(self, book: StreamBook, grant: Grant) -> None:
        """Blocks were granted for the first time."""
        if not book.is_admitted:
            self._granted.append((book, grant))

    def announced(self, book: StreamBook) -> None:
        """A consumer learned the totals."""
        self._announced.append(book)

    def check(self, process: Process, areas: Sequence[BlockWatch], books: Callable[[], list[StreamBook]]) -> None:
        """After a step of `process`; `books()`: its live streams."""
        granted, self._granted = self._granted, []
        announced, self._announced = self._announced, []
        for area in areas:
            self._check_surplus(area, [book for book in announced if book.area is area])
            fresh = [(book, grant) for book, grant in granted if book.area is area]
            num_free = area.num_free
            if not num_free or fresh:
                self._check_area(process, area, fresh, [book for book in books() if book.area is area])
            else:
                self._starving.pop(area, None)
            if isinstance(area, SlotWatch) and area.num_fenced:
                self._check_fences(area, books())
            self._turns.check(
                process, area, () if num_free else [b for b in books() if b.area is area], num_free=num_free
            )

    def _check_fences(self, area: SlotWatch, books: Sequence[StreamBook]) -> None:
        """Who is to say that it let go of slots must know of the end of its epoch."""
        going_on = {(book.stream_id, book.epoch): book for book in books if book.is_opened}
        fenced, ran_s = [writer for writer in area.fenced_writers() if writer in going_on], self._turns.ran_s(area)
        before = self._fenced.get(area, {})
        self._fenced[area] = {writer: before.get(writer, ran_s) for writer in fenced}
        for writer, since_s in self._fenced[area].items():
            if ran_s - since_s > PATIENCE_S:
                text = f"slots of epoch {writer[1]} wait for the word of a sender that goes on"
                self._complain("7: nothing leaks", going_on[writer].number, text)

    def _check_surplus(self, area: BlockWatch, announced: Sequence[StreamBook]) -> None:
        held = area.num_held()
        for book in announced:
            most = -(-(book.total_rows or 0) // self._size)
            is_asked = isinstance(area, SlotWatch) and book.is_revoking  # a producer may be computing there
            if held[book.stream_id] > most and not book.is_ended and not is_asked:
                self._complain("5: the surplus comes back", book.number, f"{held[book.stream_id]} blocks for {most}")

    def _check_area(
        self,
        process: Process,
        area: BlockWatch,
        granted: Sequence[tuple[StreamBook, Grant]],
        books: Sequence[StreamBook],
    ) -> None:
        """Who is not admitted holds one block, and more only while nobody else wants it."""
        held, num_free = area.num_held(), area.num_free
        empty = [book for book in books if book.stream_id not in held and book.needs_more]
        for book, grant in granted:
            if len(grant.block_ids) > 1 and num_free < len(empty):
                self._complain(
                    "5: a block is kept for every other stream",
                    book.number,
                    f"it was granted {len(grant.block_ids)} blocks; {num_free} are left for {len(empty)} who hold none",
                )
        waiting = {book.stream_id for book in empty if book.wants_block}
        if waiting and not num_free:
            self.num_exhausted += len(waiting - self._starving.get(area, set()))
            for book in books if self._turns.waited_s(area) > 0 else ():
                is_asked = isinstance(area, SlotWatch) and book.is_revoking
                if not book.is_admitted and held.get(book.stream_id, 0) > 1 and not is_asked:
                    self._complain(
                        "5: who is not admitted holds one block when others want it",
                        book.number,
                        f"it holds {held[book.stream_id]} while {len(waiting)} streams wait for their first",
                    )
        self._starving[area] = waiting
