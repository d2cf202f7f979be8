"""Block diffusion: the window is what a canvas computes next; its logits replace some of the open block's masks.

Attention looks both ways, so no KV is ever final and a window is whole or not at all. What the logits choose is made
by the `Denoiser` and comes back on the window; tokens leave when their block is complete.
"""

from collections.abc import Sequence as SequenceOf

from language_worker.plan import Window
from language_worker.request import Sequence


class BlockDiffusion:
    """`kv_len` stays 0. Pages for the whole canvas are taken on admission, so nobody who has begun is preempted; who
    waits for rows of media may be, and has nothing to lose."""

    alignment = 1
    lookahead = 1 << 40  # everything up to `max_len`
    max_drafts = 0
    is_whole = True

    def window(self, seq: Sequence, budget: int, max_drafts: int = 0) -> Window | None:
        """The canvas' next query positions; None when they exceed the budget, or a row of the prompt's media lacks."""
        canvas = seq.canvas
        assert canvas is not None
        start, end = canvas.query_range()
        if not seq.is_ready or (end - start) * canvas.num_copies > budget:
            return None
        return Window(
            seq=seq,
            start=start,
            length=end - start,
            num_final=0,
            samples=canvas.fills_next,
            num_copies=canvas.num_copies,
        )

    def advance(self, window: Window, tokens: SequenceOf[int]) -> None:
        """The window's fills enter the canvas, and the tokens that leave it the output."""
        canvas = window.seq.canvas
        assert canvas is not None
        canvas.advance(window.fills, window.num_tokens)
        window.seq.tokens.extend(tokens)
