"""Drafter: a small model makes the drafts that the large one then checks in one pass.

It goes over every window of a step before the large model does, so that its KV is there wherever the large model's is:
same page ids, own tensors. Shared, copied and cached pages serve both, and it needs no book-keeping of its own. A draft
is drawn with the very number that the large model's token will be drawn with, so that similar distributions give equal
tokens. Media are placeholders to it, positions plain; what it makes of them decides speed, never tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from language_worker.plan import StepPlan, SwapMoves, Window
from language_worker.request import Sequence as TokenSequence
from language_worker.runner import ModelRunner
from language_worker.sampler import sample
from language_worker.sampling_state import SamplingState


class Drafter:
    """runner: the small model over a cache with as many pages as the large model's. vocab_size: the large model's.
    num_token_ids: ids from there on stand for no token."""

    def __init__(self, runner: ModelRunner, *, vocab_size: int, num_token_ids: int) -> None:
        self._runner = runner
        self._vocab_size = vocab_size
        self._num_token_ids = num_token_ids

    def swap_pages(self, moves: SwapMoves) -> None:
        """As the large model's cache does."""
        self._runner.swap_pages(moves)

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """As the large model's cache does."""
        self._runner.copy_pages(copies)

    def fill(self, plan: StepPlan, state_of: Callable[[TokenSequence], SamplingState]) -> StepPlan:
        """The plan with its open drafts made, after computing this model's KV of all its windows.

        state_of: how the sample of a sequence chooses. A plan may be filled again after a failed step.
        """
        windows = list(plan.windows)
        views = [_view(window.seq) for window in windows]
        known = [_known(window, view) for window, view in zip(windows, views, strict=True)]
        logits = self._run(known)
        going = [i for i, window in enumerate(windows) if window.drafts]
        made: dict[int, list[int]] = {i: [] for i in going}
        while going:
            states = [state_of(windows[i].seq).after(made[i]) for i in going]
            logits = logits.nan_to_num()  # a draft may be wrong
            for i, choice in zip(going, sample(logits, states, num_token_ids=self._num_token_ids), strict=True):
                made[i].append(choice.token_id)
            going = [i for i in going if len(made[i]) < len(windows[i].drafts)]
            if going:
                logits = self._run([_behind(views[i], windows[i], made[i]) for i in going])
        for i, drafts in made.items():
            windows[i] = replace(windows[i], drafts=tuple(drafts))
        return replace(plan, windows=tuple(windows))

    def _run(self, windows: list[Window]) -> torch.Tensor:
        """Logits of the windows that sample, one row for each, as wide as the large model's."""
        logits = self._runner.run(StepPlan(windows=tuple(windows))).logits
        lacking = self._vocab_size - logits.shape[-1]
        return F.pad(logits, (0, lacking), value=-torch.inf) if lacking > 0 else logits[:, : self._vocab_size]


def _view(seq: TokenSequence) -> TokenSequence:
    """The sequence as text at plain positions: same tokens and pages, nothing else."""
    view = TokenSequence(key=seq.key, prompt=(), max_len=seq.max_len)
    view.tokens, view.pages, view.first_page = seq.tokens, seq.pages, seq.first_page
    return view


def _known(window: Window, view: TokenSequence) -> Window:
    """The window's known tokens. In the output it begins one earlier: the last of the drafts that were right was never
    an input here, so its KV is lacking."""
    end = window.start + window.num_final
    start = window.start - (window.start > window.seq.prompt_len)
    return Window(seq=view, start=start, length=end - start, num_final=end - start, samples=bool(window.drafts))


def _behind(view: TokenSequence, window: Window, made: list[int]) -> Window:
    """The position of the draft made last, whose logits choose the next."""
    start = window.start + window.num_final + len(made) - 1
    return Window(seq=view, start=start, length=1, num_final=1, samples=True, drafts=(made[-1],))
