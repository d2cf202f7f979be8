"""Sequence: the tokens of one sample, how many have final KV, and what state it is in.

Owns the one rule's two numbers (`kv_len` chases `len(tokens)`) and the status table. Knows no tensors, models or
transport; the text side of a sequence (`output`) and its media buffer are opaque here.
"""

from bisect import bisect_left
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from language_worker.canvas import Canvas
from language_worker.errors import IllegalTransition


class Status(Enum):
    NEW = "new"  # known to its request only
    WAITING = "waiting"  # holds no pages
    RUNNING = "running"  # holds pages, takes part in steps
    FINISHED = "finished"  # holds nothing, never comes back


class Event(Enum):
    QUEUED = "queued"
    ADMITTED = "admitted"
    PREEMPTED = "preempted"
    ENDED = "ended"


TRANSITIONS: dict[tuple[Status, Event], Status] = {
    (Status.NEW, Event.QUEUED): Status.WAITING,
    (Status.NEW, Event.ENDED): Status.FINISHED,
    (Status.WAITING, Event.ADMITTED): Status.RUNNING,
    (Status.WAITING, Event.ENDED): Status.FINISHED,
    (Status.RUNNING, Event.PREEMPTED): Status.WAITING,
    (Status.RUNNING, Event.ENDED): Status.FINISHED,
}


class MediaProgress(Protocol):
    """How many rows of a request's media have arrived, in prompt order."""

    @property
    def num_filled(self) -> int: ...


class ImportedKV(Protocol):
    """KV of a prompt's first positions that another engine computed; opaque here but for its length."""

    @property
    def num_tokens(self) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaSpan:
    """Token positions [start, end) of one media item. key: names its content and grid; None when that is not known."""

    start: int
    end: int
    key: bytes | None


class Sequence:
    """One sample of one request.

    key: (request order, sample index). came_at: seconds, moved by its priority: who came first goes first, see `rank`.
    tokens: expanded prompt followed by generated ids. kv_len: leading tokens whose KV is final. media_positions: where
    the prompt's media tokens are, ascending; the n-th takes media row n. media_spans: the same by item, with content
    keys. positions: the model's own description of the prompt's positions (None: 0, 1, 2, ...). wants_prompt_logits:
    someone asked for the logits of every prompt position. has_siblings: other samples continue the same prompt and may
    lend their pages.
    imported: KV of the prompt that was computed elsewhere; kept for as long as the sequence may need it again.
    pause_at: a position where a window has to end, since somebody wants the recurrent state there (0: nobody).
    state_slot: where it keeps recurrent state while it runs (-1: nowhere).
    draft_source: what a speculative strategy knows of it. canvas: its text with masks, where it is decoded by filling
    them in.
    pages: those it holds, the first of them for positions from `first_page` pages on: where every layer of a model
    slides, pages that no query sees any more are given back while it runs. is_exported: every position's KV is for
    another engine, so none may be lacking from the start.
    num_overtaken: positions that younger ones had to compute when they were admitted before it, which could have run.
    num_cached: prompt tokens whose KV the prefix cache had at the first admission. page_names: names of the first full
    pages, for the prefix cache.
    """

    __slots__ = (
        "came_at",
        "canvas",
        "draft_source",
        "first_page",
        "has_siblings",
        "imported",
        "is_exported",
        "key",
        "kv_len",
        "max_len",
        "media",
        "media_positions",
        "media_spans",
        "num_cached",
        "num_overtaken",
        "num_preemptions",
        "page_names",
        "pages",
        "pause_at",
        "positions",
        "prompt_len",
        "state_slot",
        "status",
        "tokens",
        "wants_prompt_logits",
    )

    def __init__(
        self,
        *,
        key: tuple[int, int],
        prompt: SequenceOf[int],
        max_len: int,
        media_positions: SequenceOf[int] = (),
        media_spans: SequenceOf[MediaSpan] = (),
        media: MediaProgress | None = None,
        positions: object = None,
        wants_prompt_logits: bool = False,
        has_siblings: bool = False,
        imported: ImportedKV | None = None,
        is_exported: bool = False,
        canvas: Canvas | None = None,
        came_at: float = 0.0,
    ) -> None:
        self.key = key
        self.came_at = came_at
        self.tokens: list[int] = list(prompt)
        self.prompt_len = len(self.tokens)
        self.max_len = max_len
        self.media_positions = media_positions
        self.media_spans = media_spans
        self.media = media
        self.positions = positions
        self.wants_prompt_logits = wants_prompt_logits
        self.has_siblings = has_siblings
        self.imported = imported
        self.is_exported = is_exported
        self.canvas = canvas
        self.kv_len = 0
        self.status = Status.NEW
        self.pages: list[int] = []
        self.first_page = 0
        self.page_names: list[bytes] = []
        self.num_preemptions = 0
        self.num_cached = 0
        self.num_overtaken = 0
        self.draft_source: object = None
        self.pause_at = 0
        self.state_slot = -1

    def __repr__(self) -> str:
        progress = f"kv {self.kv_len}/{len(self.tokens)}, {len(self.pages)} pages"
        return f"Sequence({self.key}, {self.status.value}, {progress})"

    @property
    def rank(self) -> tuple[float, int, int]:
        """Sorting by it is sorting by age, the oldest first."""
        return (self.came_at, *self.key)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def missing(self) -> int:
        """Known tokens that have no final KV yet."""
        return len(self.tokens) - self.kv_len

    @property
    def ready_len(self) -> int:
        """Leading tokens whose inputs are known: up to the first media token that needs its row and has it not."""
        positions = self.media_positions
        if self.media is None or self.media.num_filled >= len(positions):
            return len(self.tokens)
        awaited = max(self.media.num_filled, bisect_left(positions, self.kv_len))  # rows below kv_len are not needed
        return len(self.tokens) if awaited >= len(positions) else positions[awaited]

    @property
    def is_ready(self) -> bool:
        """Every input that is still needed has arrived."""
        return self.ready_len == len(self.tokens)

    def pages_of_copy(self, copy: int, page_size: int) -> list[int]:
        """Pages of one version of its canvas, which begins on a page of its own."""
        own = -(-self.max_len // page_size)
        return self.pages[copy * own : (copy + 1) * own]

    def media_rows(self, start: int, end: int) -> tuple[int, int]:
        """Range of media rows that belong to token positions [start, end)."""
        return bisect_left(self.media_positions, start), bisect_left(self.media_positions, end)

    def rename(self, media_spans: SequenceOf[MediaSpan]) -> None:
        """Its media have other content keys from now on: pages are named anew."""
        self.media_spans = media_spans
        self.page_names = []

    def apply(self, event: Event) -> None:
        """Move by the table; IllegalTransition leaves everything as it was."""
        target = TRANSITIONS.get((self.status, event))
        if target is None:
            raise IllegalTransition(f"sequence {self.key} is {self.status.value} and cannot be {event.value}")
        self.status = target
        if target is not Status.RUNNING:
            self.kv_len = 0
            self.pages = []
            self.first_page = 0
        if event is Event.PREEMPTED:
            self.num_preemptions += 1
