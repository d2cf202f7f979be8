"""Turns: no stream keeps a block from another one for long without filling it (promise 5).

A stream whose sender is there and that holds no block waits, if it is admitted or was never granted one in its epoch.
It may wait long for its turn, behind streams that move; but where one waits, no other may hold blocks and stand still,
whatever keeps its rows away: its producer, its sender, or the link. Time is that of the receiver's program: it counts
only while that runs, and begins anew where its loop does. In a segment, whose streams all have one sender, it counts
only while no slot waits for that sender's word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from transfer.simulation.books import StreamBook
from transfer.simulation.memory import BlockWatch
from transfer.simulation.segments import SlotWatch
from transfer.simulation.timeline import Process

PATIENCE_S = 5.0  # longer than a turn and a tick, also than the longer turn that late blocks are given
ROUND_S = 2.0  # and no stream's turn is longer than this, where none fills a block
STEP_S = 0.5  # a program that did nothing for longer than this did not run

Complain: TypeAlias = Callable[[str, str | None, str], None]


@dataclass(slots=True)
class _Program:
    """One pool or segment of a program: how long that ran, since when streams wait, and hold what they do.

    moved_s: when the last block was filled, by whichever stream.
    """

    last_s: float
    ran_s: float = 0.0
    moved_s: float = 0.0
    state: object = None
    waiting: dict[str, float] = field(default_factory=dict)
    holding: dict[str, tuple[tuple[object, ...], float]] = field(default_factory=dict)

    def begin_anew(self) -> None:
        """Nobody waits, and nobody holds what others need."""
        self.waiting.clear()
        self.holding.clear()
        self.moved_s = self.ran_s


def _waits_for_its_sender(watch: BlockWatch, books: Sequence[StreamBook]) -> bool:
    """Whether slots of a segment can come free only by the word of the one sender that all its streams have."""
    if not isinstance(watch, SlotWatch):
        return False
    return watch.num_fenced > 0 or watch.is_abandoned or any(book.is_revoking for book in books)


class Turns:
    """Looks at every receiving program after each of its steps."""

    def __init__(self, complain: Complain, now: Callable[[], float]) -> None:
        self._complain = complain
        self._now = now
        self._programs: dict[BlockWatch, tuple[Process, _Program]] = {}

    def begin_anew(self, host: str) -> None:
        """The I/O loop on this host runs anew: so do the turns of its streams."""
        for process, program in self._programs.values():
            if process.host == host:
                program.begin_anew()

    def waited_s(self, area: BlockWatch) -> float:
        """How long some stream has waited for blocks of this area: 0 where an admission is said and not yet heard."""
        _, program = self._programs.get(area, (None, None))
        return 0.0 if program is None or not program.waiting else program.ran_s - min(program.waiting.values())

    def ran_s(self, area: BlockWatch) -> float:
        """How long the program of this area ran since its first check."""
        _, program = self._programs.get(area, (None, None))
        return 0.0 if program is None else program.ran_s

    def check(self, process: Process, watch: BlockWatch, books: Sequence[StreamBook], *, num_free: int) -> None:
        """After a step of `process`, whose live streams with blocks of this area are `books`."""
        _, program = self._programs.setdefault(watch, (process, _Program(self._now())))
        program.ran_s += min(STEP_S, self._now() - program.last_s)
        program.last_s = self._now()
        if num_free or _waits_for_its_sender(watch, books):
            program.begin_anew()
            return
        held: dict[str, list[int]] = {}
        for block_id, stream_id in watch.owners.items():
            held.setdefault(stream_id, []).append(block_id)
        waiting = {book.stream_id for book in books if book.stream_id not in held and book.wants_block}
        program.waiting = {key: program.waiting.get(key, program.ran_s) for key in sorted(waiting)}
        holding: dict[str, tuple[tuple[object, ...], float]] = {}
        for book in books:
            if book.stream_id in held:
                state = (book.epoch, book.num_delivered, len(book.stored), book.total_rows, len(book.grants))
                before, since_s = program.holding.get(book.stream_id, (state, program.ran_s))
                holding[book.stream_id] = state, since_s if before == state else program.ran_s
        program.holding = holding
        filled = [(book.stream_id, book.num_delivered, len(book.stored)) for book in books]
        if filled != program.state:
            program.state, program.moved_s = filled, program.ran_s
        if waiting:
            self._judge(program, held)
            self._judge_round(program, len(books))

    def _judge(self, program: _Program, held: dict[str, list[int]]) -> None:
        longest_s = program.ran_s - min(program.waiting.values())
        for stream_id, (_, since_s) in program.holding.items():
            stood_s = min(longest_s, program.ran_s - since_s)
            if stood_s > PATIENCE_S:
                self._complain(
                    "5: who stands still gives its blocks to who waits",
                    stream_id,
                    f"it held {len(held[stream_id])} blocks for {stood_s:.1f} s and filled none; "
                    f"{len(program.waiting)} streams waited for their first",
                )

    def _judge_round(self, program: _Program, num_streams: int) -> None:
        for stream_id, since_s in program.waiting.items():
            waited_s = program.ran_s - max(since_s, program.moved_s)
            if waited_s > PATIENCE_S + ROUND_S * num_streams:
                self._complain(
                    "5: every stream has its turn",
                    stream_id,
                    f"it waited {waited_s:.1f} s for a block, while none of {num_streams} streams filled one",
                )
