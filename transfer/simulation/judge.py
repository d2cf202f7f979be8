"""Judge: decides after every step of a run whether each promise still holds, by bookkeeping of its own.

It never asks the code under test what it holds, sent or counted. The first breach ends the run; its text names what
was promised, what happened instead, and to which stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from transfer.config import TransferConfig
from transfer.errors import AlignmentError, TransferError
from transfer.memory.buffers import Tensor
from transfer.protocol.actions import StreamStats
from transfer.protocol.messages import Block, Body
from transfer.simulation.books import Breach, SenderBook, StreamBook
from transfer.simulation.content import Content
from transfer.simulation.memory import BlockWatch
from transfer.simulation.segments import SlotWatch, VirtualSegment
from transfer.simulation.shares import Shares
from transfer.simulation.story import Story
from transfer.simulation.timeline import Process
from transfer.simulation.turns import Turns


class Judge:
    """The books of a run, and `breach`: the first promise found broken."""

    def __init__(self, config: TransferConfig, story: Story, now: Callable[[], float]) -> None:
        self.breach: Breach | None = None
        self.streams: dict[str, StreamBook] = {}  # the latest life of each stream id
        self.watches: dict[Process, BlockWatch] = {}  # of every pool
        self.segments: dict[int, SlotWatch] = {}  # by generation
        self.contents: list[Content] = []
        self.incoming: tuple[Block, Sequence[bytes]] | None = None  # the Block being handled
        self.turns = Turns(self._complain_of, now)
        self.shares = Shares(self.complain, self.turns, config.block_size)
        self.story = story
        self._size = config.block_size
        self._num_blocks = config.num_pool_blocks
        self._now = now
        self._areas: dict[Process, list[BlockWatch]] = {}
        self.falsified: list[tuple[StreamBook, SenderBook]] = []  # got a misaligned grant in the step that runs

    def complain(self, promise: str, number: int | None, text: str) -> None:
        """A promise is broken. Only the first counts."""
        if self.breach is None:
            self.breach = Breach(promise=promise, text=text, number=number, time_s=self._now())
            self.story.tell(self._now(), "judge", number, str(self.breach))

    def _complain_of(self, promise: str, stream_id: str | None, text: str) -> None:
        book = self.streams.get(stream_id or "")
        self.complain(promise, None if book is None else book.number, text)

    def watch(self, process: Process) -> BlockWatch:
        """The account of the pool of a receiving process."""
        watch = BlockWatch(self._num_blocks, self._complain_of, self._placed, self._gave)
        self.watches[process], self._areas[process] = watch, [watch]
        return watch

    def watch_segment(self, process: Process, segment: VirtualSegment) -> SlotWatch:
        """The account of a segment that a receiving process made."""

        def epoch_of(stream_id: str) -> int:
            return self.streams[stream_id].epoch

        watch = SlotWatch(segment, self._complain_of, self._placed, self._gave, epoch_of)
        watch.touch = process.touch
        self.segments[watch.generation] = watch
        self._areas[process].append(watch)
        return watch

    def segments_of(self, process: Process) -> list[SlotWatch]:
        """Those that it has not closed."""
        return [area for area in self._areas[process] if isinstance(area, SlotWatch) and not area.is_closed]

    # -- after every step -----------------------------------------------------------------------------------------

    def stepped(self, process: Process) -> None:
        """See timeline.Watcher."""
        self.settle()
        self.incoming = None
        if self.falsified:
            self._check_falsified()
        areas = self._areas.get(process)
        if areas is not None:
            self.watches[process].writing = None
            if len(areas) > 1:
                areas[1:] = self.segments_of(process)
            self.shares.check(process, areas, lambda: self._live_at(process))

    def escaped(self, process: Process, error: Exception) -> None:
        """See timeline.Watcher."""
        self.complain("6: no error escapes a handler", None, f"{process}: {type(error).__name__}: {error}")

    def receiving(self, process: Process, block: Block, frames: Sequence[bytes]) -> None:
        """A Block came, and is handled next."""
        self.incoming = (block, frames)
        if process in self.watches:
            self.watches[process].writing = (block.stream_id, block.block_id)

    def _check_falsified(self) -> None:
        falsified, self.falsified = self.falsified, []
        for book, sender in falsified:
            if not isinstance(sender.outcome, AlignmentError):
                self.complain(
                    "1: a misaligned grant is a typed error", book.number, f"its outcome is {sender.outcome!r}"
                )

    def _live_at(self, process: Process) -> list[StreamBook]:
        return [book for book in self.streams.values() if book.process is process and book.is_live]

    # -- memory ---------------------------------------------------------------------------------------------------

    def _placed(self, stream_id: str, block_id: int) -> None:
        book = self.streams[stream_id]
        if self.incoming is None:
            return self.complain("4: only Blocks are stored", book.number, f"block {block_id} was written out of turn")
        block, frames = self.incoming
        if block.epoch != book.epoch:
            self.complain("4: an old epoch is fenced", book.number, f"{block} was stored; the epoch is {book.epoch}")
        sender = book.senders.get(block.epoch)
        first_row = block.index * self._size
        if sender is None or list(frames) != sender.content.frames(first_row, block.num_rows):
            self.complain(
                "4: damaged or foreign bytes are dropped", book.number, f"{block} was stored, with other bytes"
            )
        if block.index in book.stored:
            self.complain("4: a duplicate is dropped", book.number, f"{block} was stored again")
        self._keep(book, block.index, block.block_id)

    def settle(self) -> None:
        """A sealed Block is opened into its place: it counts as stored once the right rows lie there."""
        if self.incoming is None:
            return
        block, _ = self.incoming
        book = self.streams.get(block.stream_id)
        if block.tag or book is None or block.epoch != book.epoch or block.index in book.stored:
            return
        watch, sender = self.watches[book.process], book.senders.get(block.epoch)
        if sender is None or watch.buffers is None or watch.owners.get(block.block_id) != book.stream_id:
            return
        expected = sender.content.frames(block.index * self._size, block.num_rows)
        if watch.buffers.content(block.block_id, block.num_rows) == expected:
            self._keep(book, block.index, block.block_id)

    def store(self, book: StreamBook, index: int, slot: int) -> None:
        """A receiver takes a slot for a block of its stream."""
        if index in book.stored:
            self.complain("4: a duplicate is dropped", book.number, f"block {index} was stored again")
        self._keep(book, index, slot)

    def _keep(self, book: StreamBook, index: int, block_id: int) -> None:
        book.stored.add(index)
        book.index_of[block_id] = index
        while book.next_stored in book.stored:
            book.next_stored += 1

    def _gave(self, stream_id: str, block_id: int) -> None:
        book = self.streams.get(stream_id)
        index = None if book is None else book.index_of.pop(block_id, None)
        if book is None or index is None or index * self._size < book.num_delivered or book.is_ended:
            return
        book.stored.discard(index)
        book.next_stored = min(book.next_stored, index)
        if index < book.kept and book.opened_epoch == book.epoch:
            self.complain(
                "3: kept means kept", book.number, f"block {index} was dropped, kept are those below {book.kept}"
            )

    # -- consumers and producers ----------------------------------------------------------------------------------

    def reissued(self, book: StreamBook, epoch: int) -> None:
        """The receiver gave a ticket of a later epoch: the one before it is over."""
        book.epoch, book.kept, book.acked, book.revocation = epoch, 0, 0, (epoch, 0)
        book.is_revoking = False

    def announced(self, book: StreamBook, total_rows: int, items: Sequence[Body]) -> None:
        """A consumer learns the totals."""
        sender = book.senders[book.opened_epoch]
        if book.is_ended:
            self.complain("3: a stream ends once", book.number, "its totals were announced after its end")
        if book.total_rows is not None:
            self.complain("3: totals are said once per start", book.number, f"{total_rows} after {book.total_rows}")
        if total_rows != sender.content.num_rows or list(items) != [{"key": sender.content.key}]:
            self.complain("2: the totals are the producer's", book.number, f"{total_rows} rows, items {items}")
        book.total_rows, book.delivering = total_rows, sender
        self.shares.announced(book)

    def restarted(self, book: StreamBook) -> None:
        """A consumer is told to forget everything."""
        before, sender = book.delivering, book.senders[book.opened_epoch]
        if before is not None and sender.key and before.key == sender.key:
            self.complain(
                "3: the same content goes on", book.number, f"it starts over with the same key {sender.key!r}"
            )
        if book.is_ended:
            self.complain("3: a stream ends once", book.number, "it starts over after its end")
        book.start_over()

    def delivered(self, book: StreamBook, first_row: int, planes: Mapping[str, Tensor]) -> None:
        """A consumer gets rows."""
        self.settle()
        num_rows = len(next(iter(planes.values())))
        if book.delivering is None or not book.is_admitted:
            return self.complain("2: rows come after admission", book.number, f"row {first_row} came before")
        if book.is_ended or first_row != book.num_delivered:
            self.complain(
                "3: rows come in order, each once",
                book.number,
                f"rows {first_row} to {first_row + num_rows - 1} after {book.num_delivered}, ended: {book.is_ended}",
            )
        content = book.delivering.content
        difference = content.difference(first_row, planes)
        if difference is not None:
            others = [c.key for c in self.contents if c is not content and c.num_rows and c.holds(planes)]
            self.complain("4: never another request's bytes", book.number, f"{difference}; such rows have {others}")
        book.num_delivered += num_rows

    def completed(self, book: StreamBook, stats: StreamStats) -> None:
        """A consumer hears that it has everything."""
        if book.is_ended or book.num_delivered != book.total_rows:
            self.complain("3: complete means every row", book.number, f"{book.num_delivered} of {book.total_rows} rows")
        book.is_ended = True

    def failed(self, book: StreamBook, error: TransferError) -> None:
        """A consumer hears of a failure."""
        if book.is_ended:
            self.complain("3: a stream ends once", book.number, f"after its end it failed with {error}")
        book.is_ended = True

    def sender_ended(self, book: StreamBook, sender: SenderBook, outcome: StreamStats | TransferError) -> None:
        """A producer hears the end."""
        if sender.outcome is not None:
            self.complain("3: a stream ends once", book.number, f"{outcome} after {sender.outcome}")
        sender.outcome = outcome
        if isinstance(outcome, StreamStats) and not (book.is_ended and book.num_delivered == book.total_rows):
            self.complain(
                "3: done means delivered", book.number, f"its sender is done, {book.num_delivered} rows arrived"
            )
