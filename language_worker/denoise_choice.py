"""For every mask of a step: the token that would replace it, and how sure that is.

Order: ids that may not be chosen (the mask itself, padding of the vocabulary, what the model never writes, the
request's own rules) to -inf; the draw (temperature 0: the best, ties to the lowest id; else Gumbel noise, exact for
softmax(logits / temperature)); confidence is the token's probability without temperature, entropy that of the same
distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.philox import philox
from kernels.sampling import SoftmaxStatistics, filter_cut, gumbel_max, softmax_statistics, token_logprobs
from language_worker.canvas import Canvas
from language_worker.errors import StepFailed
from language_worker.sampling_state import SamplingState

STEP_SHIFT = 8  # a draw's sample word holds the sample in its low bits and the step above them


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """One token per mask, canvas after canvas: its id, confidence and entropy, lists of equal length; and the logits
    [R, V] it was chosen from."""

    token_ids: list[int]
    confidence: list[float]
    entropy: list[float]
    logits: torch.Tensor


def choose_tokens(
    logits: torch.Tensor,
    canvases: Sequence[Canvas],
    states: Sequence[SamplingState],
    *,
    eos_ids: Sequence[int],
    num_token_ids: int,
    never_ids: Sequence[int] = (),
) -> Candidates:
    """logits [R, V], consumed: a row for every open position of every canvas, in order."""
    ranges = _row_ranges(canvases)
    if any(state.rules is not None for state in states):
        logits = logits.float()
    logits[:, num_token_ids:] = -torch.inf
    logits[:, list(never_ids)] = -torch.inf
    for canvas, state, rows in zip(canvases, states, ranges, strict=True):
        logits[rows, canvas.mask_id] = -torch.inf
        if canvas.params.suppress_eos:
            logits[rows, list(eos_ids)] = -torch.inf
        if state.rules is not None:
            for row, position in zip(range(rows.start, rows.stop), canvas.open_positions(), strict=True):
                state.rules.apply(logits[row], {}, position - canvas.prompt_len)
    statistics = softmax_statistics(logits)
    ids, confidence, entropy = statistics.argmax, statistics.confidence, statistics.entropy
    if not all(state.params.is_greedy for state in states):
        drawn = _draw(logits, canvases, states)
        ids = torch.where(statistics.log_sum_exp.isfinite(), drawn, 0)  # an id, whatever NaN led to
        confidence = _probabilities(logits, ids, statistics)
    confidence, entropy = confidence.clone(), entropy.clone()
    for canvas, state, rows in zip(canvases, states, ranges, strict=True):
        if canvas.params.defer_eos:
            _defer(logits[rows], ids[rows], eos_ids, confidence[rows], entropy[rows])
        if canvas.params.remasking == "random":
            confidence[rows] = _chances(canvas, state, ids.device)
    # one wait for the device; ids are well within what float64 holds
    read = torch.stack([column.double() for column in (statistics.log_sum_exp, ids, confidence, entropy)]).tolist()
    if not all(map(math.isfinite, read[0])):
        raise StepFailed("the model's logits are not finite (NaN or infinity), so no token can be chosen")
    return Candidates(token_ids=[int(i) for i in read[1]], confidence=read[2], entropy=read[3], logits=logits)


def _probabilities(logits: torch.Tensor, ids: torch.Tensor, statistics: SoftmaxStatistics) -> torch.Tensor:
    """Of one id per row [R], by its gap to the best. Not exp(logit - log-sum-exp), which near 1 has lost the digits by
    which masks are ranked; and the best id's has the bits of `statistics.confidence`: a greedy row's is that of the row
    alone, whoever draws beside it.
    """
    gaps = token_logprobs(logits, ids, statistics.maximum)
    return torch.where(statistics.maximum > -torch.inf, gaps.exp() * statistics.confidence, 0.0)


def _row_ranges(canvases: Sequence[Canvas]) -> list[slice]:
    ranges, first = [], 0
    for canvas in canvases:
        end = first + len(canvas.open_positions())
        ranges.append(slice(first, end))
        first = end
    return ranges


def _draw(logits: torch.Tensor, canvases: Sequence[Canvas], states: Sequence[SamplingState]) -> torch.Tensor:
    """One id per row, by its request's temperature and filters."""
    rows = [(canvas, state, p) for canvas, state in zip(canvases, states, strict=True) for p in canvas.open_positions()]
    device = logits.device
    temperature = torch.tensor([state.params.temperature for _, state, _ in rows], device=device)
    seeds = torch.tensor([_signed(state.seed) for _, state, _ in rows], device=device)
    samples = torch.tensor([_sample_word(canvas, state) for canvas, state, _ in rows], device=device)
    positions = torch.tensor([position - canvas.prompt_len for canvas, _, position in rows], device=device)
    cut = None
    if any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in (state.params for state in states)):
        top_k = torch.tensor([state.params.top_k for _, state, _ in rows], device=device)
        top_p, min_p = (
            torch.tensor([getattr(state.params, name) for _, state, _ in rows], dtype=torch.float32, device=device)
            for name in ("top_p", "min_p")
        )
        cut = filter_cut(logits, temperature, top_k, top_p, min_p)
    return gumbel_max(logits, temperature, seeds, samples, positions, cut)


def _defer(
    logits: torch.Tensor, ids: torch.Tensor, eos_ids: Sequence[int], confidence: torch.Tensor, entropy: torch.Tensor
) -> None:
    """Judge as if the end of text did not exist, and put rows that chose it last; changes the last two in place."""
    without = logits.clone()
    without[:, list(eos_ids)] = -torch.inf
    statistics: SoftmaxStatistics = softmax_statistics(without)
    confidence.copy_(_probabilities(without, ids, statistics))
    is_end = torch.isin(ids, torch.tensor(list(eos_ids), device=ids.device))
    entropy.copy_(torch.where(is_end, torch.inf, statistics.entropy))


def _chances(canvas: Canvas, state: SamplingState, device: torch.device) -> torch.Tensor:
    """A uniform number for every open position; the generator's fourth word keeps them apart from token draws."""
    positions = torch.tensor(canvas.open_positions(), device=device) - canvas.prompt_len
    sample = torch.full_like(positions, _sample_word(canvas, state))
    seed = torch.full_like(positions, _signed(state.seed))
    bits = philox(seed, (positions, sample, torch.zeros_like(positions), torch.ones_like(positions)))[0]
    return (bits.double() * 2.0**-32).float()


def _sample_word(canvas: Canvas, state: SamplingState) -> int:
    return state.index | (canvas.step + 1) << STEP_SHIFT


def _signed(seed: int) -> int:
    """The same 64 bits as int64 holds them."""
    return (seed + 2**63) % 2**64 - 2**63
