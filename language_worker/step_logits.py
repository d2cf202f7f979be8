"""Which logits a step computes, and where in its result those of each window lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from language_worker.plan import Window


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSlice:
    """Logits rows [first_row, first_row + length) belong to prompt positions window.start + 0..length-1."""

    window: Window
    first_row: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLogits:
    """Logits [R, vocab] of a step: row `sample_rows[i]` for the i-th sampling window, followed by the rows of its
    drafts, and whole prompt slices."""

    logits: torch.Tensor
    sampling: tuple[Window, ...]
    sample_rows: list[int]
    prompt_slices: tuple[PromptSlice, ...]

    def sampled(self) -> torch.Tensor:
        """Rows of the sampling windows, in their order; those of drafts left out."""
        if len(self.sample_rows) == self.logits.shape[0]:
            return self.logits
        return self.logits[self.sample_rows]


def num_logits(window: Window) -> int:
    """How many of a window's positions have their logits computed; they are its last ones."""
    if window.seq.wants_prompt_logits and window.start < window.seq.prompt_len:
        return window.length
    return window.length - window.num_final + 1 if window.samples else 0


def logit_rows(
    windows: tuple[Window, ...],
) -> tuple[list[int] | None, tuple[Window, ...], list[int], tuple[PromptSlice, ...]]:
    """(rows to compute or None for all, sampling windows, their rows in the result, prompt slices in the result)."""
    rows: list[int] = []
    sampling: list[Window] = []
    sample_rows: list[int] = []
    slices: list[PromptSlice] = []
    offset = 0
    for w in windows:
        count = num_logits(w)
        if w.seq.wants_prompt_logits and w.start < w.seq.prompt_len:
            slices.append(PromptSlice(window=w, first_row=len(rows), length=min(w.end, w.seq.prompt_len) - w.start))
        rows.extend(range(offset + w.length - count, offset + w.length))
        offset += w.length
        if w.samples:
            sampling.append(w)
            sample_rows.append(len(rows) - 1 - len(w.drafts))
    return (None if len(rows) == offset else rows), tuple(sampling), sample_rows, tuple(slices)
