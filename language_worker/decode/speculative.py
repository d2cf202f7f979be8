"""Speculative decoding: the window is what is missing plus drafts, of which a prefix turns out right.

Every position of the window gets its logits in one pass. A token is drawn from each in turn, by the same numbers as
without drafts, until one differs from its draft: so the output is, token by token, what it would have been anyway, a
draft is accepted with the probability that the model gives it, and the first token that differs (or follows the last
draft) comes with the same pass. Accepted drafts have final KV; what the others left behind is overwritten.

    window   missing | draft draft draft      drawn   token=draft token=draft token
             final   | accepted  rejected     kv_len moves by missing and the two accepted, three tokens are new
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import cast

from language_worker.decode.autoregressive import Autoregressive
from language_worker.decode.drafts import DraftSource, learn
from language_worker.decode.prompt_lookup import DraftIndex
from language_worker.plan import Window
from language_worker.request import Sequence


class Speculative:
    """At most `max_drafts` drafts a step. new_source: makes what proposes them for one sequence, prompt lookup if not
    said otherwise."""

    alignment = 1
    lookahead = 0
    is_whole = False

    def __init__(self, max_drafts: int, new_source: Callable[[int], DraftSource] = DraftIndex) -> None:
        self.max_drafts = max_drafts
        self._new_source = new_source
        self._plain = Autoregressive()

    def window(self, seq: Sequence, budget: int, max_drafts: int = 0) -> Window | None:
        """As without drafts, and drafts where the output has begun."""
        window = self._plain.window(seq, budget)
        if not max_drafts or window is None or not window.samples or seq.num_generated == 0:
            return window
        drafts = self._source(seq).propose(seq.tokens, max_drafts)
        return Window(
            seq=seq,
            start=window.start,
            length=window.length + len(drafts),
            num_final=window.length,
            samples=True,
            drafts=drafts,
        )

    def advance(self, window: Window, tokens: SequenceOf[int]) -> None:
        """All but the last token are accepted drafts, and have final KV."""
        num_accepted = max(0, len(tokens) - 1)
        window.seq.kv_len += window.num_final + num_accepted
        window.seq.tokens.extend(tokens)
        if window.drafts:
            learn(self._source(window.seq), len(window.drafts), num_accepted, self.max_drafts)

    def _source(self, seq: Sequence) -> DraftSource:
        if seq.draft_source is None:
            seq.draft_source = self._new_source(self.max_drafts)
        return cast(DraftSource, seq.draft_source)
