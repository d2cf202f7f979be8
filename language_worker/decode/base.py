"""DecodeStrategy: how a sequence's next window is cut and what its result does to the sequence.

The scheduler sees only token counts and pages through it. A strategy keeps no state of its own per sequence beyond
what `Sequence` holds, so that preemption (`kv_len = 0`) needs no help from it.
"""

from collections.abc import Sequence as SequenceOf
from typing import Protocol

from language_worker.plan import Window
from language_worker.request import Sequence


class DecodeStrategy(Protocol):
    """alignment: prefill chunks end on a multiple of it (the last chunk excepted).
    lookahead: provisional positions past the known tokens that need pages. max_drafts: positions past the known tokens
    that it can use where budget and pages are left. is_whole: windows cannot be cut into chunks, nor grow by one token
    at a time."""

    alignment: int
    lookahead: int
    max_drafts: int
    is_whole: bool

    def window(self, seq: Sequence, budget: int, max_drafts: int = 0) -> Window | None:
        """Next query window of at most `budget` known positions and `max_drafts` behind them, for which there are
        pages; None when nothing can be computed now."""
        ...

    def advance(self, window: Window, tokens: SequenceOf[int]) -> None:
        """Record that the window ran: `kv_len` moves by its final positions, then `tokens` are appended; all but the
        last of them are drafts that were right."""
        ...
