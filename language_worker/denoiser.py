"""Denoiser: canvases through the model, and which of their masks the logits replace.

Every window of a step is one span of queries (two with guidance: the second sees masks for the prompt) among all keys
of its canvas. Logits are computed for masks of the open blocks alone. For each mask one token is chosen and judged; the
schedule then takes the best. Nothing of a row depends on the other rows, and random numbers are functions of seed,
sample, position and step, so an output does not depend on who shares its steps. Changes no state: what it chose
comes back on the windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from kernels.paged_attention import AttentionBatch
from language_worker.api import TokenLogprob
from language_worker.canvas import Canvas, Fill
from language_worker.decode.transfer_rules import choose_positions
from language_worker.denoise_choice import Candidates, choose_tokens
from language_worker.models.base import StepInputs
from language_worker.plan import StepPlan, Window
from language_worker.request import Sequence as TokenSequence
from language_worker.runner import ModelRunner
from language_worker.sampler import Choice, token_logprob
from language_worker.sampling_state import SamplingState
from language_worker.step_graphs import Asking
from language_worker.step_logits import PromptSlice, StepLogits

StateOf = Callable[[TokenSequence], SamplingState]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    """Queries [start, start + len(token_ids)) of one copy of a canvas, and which of its rows need logits. window: whose
    media are seen; None in the copy without the prompt."""

    window: Window | None
    token_ids: list[int]
    start: int
    num_keys: int
    pages: list[int]
    logit_rows: range | list[int]


class Denoiser:
    """runner: the model and its cache. eos_ids: what `suppress_eos` and `defer_eos` mean. num_token_ids: ids from there
    on stand for no token. never_ids: what the model never writes."""

    def __init__(
        self, runner: ModelRunner, *, eos_ids: Sequence[int], num_token_ids: int, never_ids: Sequence[int] = ()
    ) -> None:
        self._runner = runner
        self._eos_ids = tuple(eos_ids)
        self._never_ids = tuple(never_ids)
        self._num_token_ids = min(num_token_ids, runner.model.spec.vocab_size)

    def run(self, plan: StepPlan, state_of: StateOf) -> tuple[StepPlan, StepLogits, list[list[list[Choice]]]]:
        """The plan with its fills; the windows whose block is complete with them, as those that sample; and the tokens
        that leave with each."""
        spans = [list(self._spans(window)) for window in plan.windows]
        logits = self._logits([span for own in spans for span in own])
        windows: list[Window] = []
        parts, slices, first = [], [], 0
        for window, own in zip(plan.windows, spans, strict=True):
            num_rows = len(own[0].logit_rows)
            rows, first = logits[first : first + num_rows * len(own)], first + num_rows * len(own)
            if window.samples:
                parts.append(_guided(rows, num_rows, _canvas(window).params.cfg_scale))
            elif num_rows:
                slices.append(PromptSlice(window=window, first_row=first - num_rows * len(own), length=num_rows))
        if all(len(own) == 1 and window.samples for window, own in zip(plan.windows, spans, strict=True)):
            parts = [logits]  # as they lie: a large vocabulary is not copied
        filled = iter(self._fills([w for w in plan.windows if w.samples], parts, state_of))
        sampling, choices = [], []
        for window in plan.windows:
            if window.samples:
                window = replace(window, fills=next(filled))
                released = _canvas(window).released_by(window.fills)
                if released:
                    sampling.append(window)
                    choices.append([[Choice(token_id=fill.token_id, logprob=fill.logprob) for fill in released]])
            windows.append(window)
        step = StepLogits(logits=logits, sampling=tuple(sampling), sample_rows=[], prompt_slices=tuple(slices))
        return replace(plan, windows=tuple(windows)), step, choices

    def _spans(self, window: Window) -> Iterator[_Span]:
        """The canvas as it is, and with guidance once more with its prompt hidden."""
        canvas = _canvas(window)
        rows: range | list[int] = range(window.length if canvas.needs_prompt_pass else 0)  # of the prompt, all or none
        if window.samples:
            rows = [position - window.start for position in canvas.open_positions()]
        for copy in range(window.num_copies):
            ids = canvas.tokens[window.start : window.end]
            if copy:
                num_hidden = max(0, min(window.end, canvas.prompt_len) - window.start)
                ids[:num_hidden] = [canvas.mask_id] * num_hidden
            yield _Span(
                window=None if copy else window,
                token_ids=ids,
                start=window.start,
                num_keys=canvas.visible_end,
                pages=window.seq.pages_of_copy(copy, self._runner.cache.page_size),
                logit_rows=rows,
            )

    def _logits(self, spans: Sequence[_Span]) -> torch.Tensor:
        """Rows asked for, span after span."""
        recorded = self._recorded_logits(spans)
        if recorded is not None:
            return recorded
        size, device = self._runner.cache.page_size, self._runner.device
        rows: list[int] = []
        positions, slots, total = [], [], 0
        attention = _attention([(span, len(span.token_ids)) for span in spans], size)
        for span in spans:
            own = torch.arange(span.start, span.start + len(span.token_ids))
            positions.append(own)
            slots.append(torch.tensor(span.pages)[own // size] * size + own % size)
            rows.extend(total + row for row in span.logit_rows)
            total += len(own)
        asking = [(span, len(span.logit_rows)) for span in spans if span.logit_rows]
        inputs = StepInputs(
            token_ids=torch.tensor([token_id for span in spans for token_id in span.token_ids]).to(device),
            positions=torch.cat(positions).to(device),
            slots=torch.cat(slots).to(device),
            attention=attention,
            media=self._runner.media_spans(
                [(span.window, first) for span, first in zip(spans, attention.query_start, strict=True) if span.window]
            ),
            logit_rows=None if len(rows) == total else torch.tensor(rows, dtype=torch.int64).to(device),
            last_attention=_attention(asking, size) if asking else None,
        )
        return self._runner.forward(inputs)

    def _recorded_logits(self, spans: Sequence[_Span]) -> torch.Tensor | None:
        """The same from a recorded step; None where there is none: spans reach into prompts or differ in length."""
        graphs, length = self._runner.graphs, len(spans[0].token_ids)
        if graphs is None or any(span.window is None or span.start < span.window.seq.prompt_len for span in spans):
            return None
        logits = graphs.run(
            [
                Asking(token_ids=span.token_ids, position=span.start, num_keys=span.num_keys, pages=span.pages)
                for span in spans
            ]
        )
        rows = [i * length + row for i, span in enumerate(spans) for row in span.logit_rows]
        if logits is None or len(rows) == len(logits):
            return logits
        return logits.index_select(0, torch.tensor(rows).to(logits.device))

    def _fills(self, windows: list[Window], parts: list[torch.Tensor], state_of: StateOf) -> list[tuple[Fill, ...]]:
        if not windows:
            return []
        canvases = [_canvas(window) for window in windows]
        states = [state_of(window.seq) for window in windows]
        logits = parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts])
        candidates = choose_tokens(
            logits,
            canvases,
            states,
            eos_ids=self._eos_ids,
            num_token_ids=self._num_token_ids,
            never_ids=self._never_ids,
        )
        chosen = choose_positions(canvases, candidates.confidence, candidates.entropy)
        fills, first = [], 0
        for canvas, state, taken in zip(canvases, states, chosen, strict=True):
            positions = canvas.open_positions()
            fills.append(
                tuple(
                    Fill(
                        position=positions[i],
                        token_id=candidates.token_ids[first + i],
                        logprob=self._logprob(candidates, first + i, state),
                    )
                    for i in taken
                )
            )
            first += len(positions)
        return fills

    def _logprob(self, candidates: Candidates, row: int, state: SamplingState) -> TokenLogprob | None:
        if state.num_top is None:
            return None
        logits = candidates.logits[row].float()
        return token_logprob(logits, candidates.token_ids[row], state.num_top, self._num_token_ids)


def _attention(asking: Sequence[tuple[_Span, int]], page_size: int) -> AttentionBatch:
    """So many queries of each span, whichever they are: every key of a canvas is seen by all."""
    tables = [span.pages[: -(-span.num_keys // page_size)] for span, _ in asking]
    width, query_lens = max(map(len, tables)), [count for _, count in asking]
    return AttentionBatch(
        page_table=torch.tensor([table + [0] * (width - len(table)) for table in tables]),
        query_lens=query_lens,
        kv_lens=[span.num_keys for span, _ in asking],
        query_start=[0, *accumulate(query_lens)][:-1],
    )


def _canvas(window: Window) -> Canvas:
    assert window.seq.canvas is not None
    return window.seq.canvas


def _guided(rows: torch.Tensor, num_rows: int, scale: float) -> torch.Tensor:
    """Logits [num_rows, V]: those with the prompt, driven away from those without by `scale`."""
    if not scale:
        return rows
    seeing, blind = rows[:num_rows].float(), rows[num_rows:].float()
    return blind + (scale + 1) * (seeing - blind)
