"""Autoregressive decoding: the window is whatever is missing; its last position chooses one token."""

from collections.abc import Sequence as SequenceOf

from language_worker.plan import Window
from language_worker.request import Sequence


class Autoregressive:
    """One token per finished catch-up; every position of a window is final."""

    alignment = 1
    lookahead = 0
    max_drafts = 0
    is_whole = False

    def window(self, seq: Sequence, budget: int, max_drafts: int = 0) -> Window | None:
        """Up to `budget` of the missing tokens whose inputs have arrived; None when there are none."""
        start = seq.kv_len
        length = min(seq.ready_len - start, budget)
        if length <= 0:
            return None
        if start < seq.pause_at:
            length = min(length, seq.pause_at - start)
        return Window(seq=seq, start=start, length=length, num_final=length, samples=start + length == len(seq.tokens))

    def advance(self, window: Window, tokens: SequenceOf[int]) -> None:
        """All of the window is final; a sampling window appends its token."""
        window.seq.kv_len += window.num_final
        window.seq.tokens.extend(tokens)
