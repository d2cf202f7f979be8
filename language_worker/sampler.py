"""Sampler: a batch of logits rows in, one token per row out.

Each row follows its own SamplingState, and nothing in a row's result depends on the other rows. Order of operations:
the rules of `logit_rules.py` (penalties, bias, what may not be chosen), rows that only pad the vocabulary (-inf),
temperature, top-k, top-p, min-p, draw. Temperature 0 is the argmax; every tie goes to the lowest id. Where a tool
writes the output, its token is taken instead. Input logits are never modified.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy
import torch

from kernels.sampling import argmax_rows
from language_worker.api import TokenLogprob
from language_worker.errors import StepFailed
from language_worker.sampling_params import SamplingParams
from language_worker.sampling_state import SamplingState

LOGPROB_BYTES = 1 << 20  # of log-probabilities that are computed together on a CPU; elsewhere 64 times as many
TOP_K_BLOCKS = 512  # of ids, whose largest logits bound the k-th from below


class Choice(NamedTuple):
    """The chosen token of one row and, when asked for, its log-probabilities. is_forced: it was no choice."""

    token_id: int
    logprob: TokenLogprob | None = None
    is_forced: bool = False


def sample(logits: torch.Tensor, states: Sequence[SamplingState], *, num_token_ids: int | None = None) -> list[Choice]:
    """Choose one token per row. logits [R, V] of any float dtype; `states[r]` rules row r.

    num_token_ids: ids from there on stand for no token (a checkpoint may pad its vocabulary) and are never chosen;
    None: every id stands for one. Log-probabilities are of all V logits as they came.
    """
    if all(state.is_plain_greedy for state in states):
        return [Choice(token_id=token_id) for token_id in best_tokens(logits[:, :num_token_ids])]
    raw = logits.float()
    is_padded = num_token_ids is not None and num_token_ids < raw.shape[-1]
    ruled = [(r, state.rules) for r, state in enumerate(states) if state.rules is not None]
    work = raw.clone() if is_padded or ruled else raw
    for r, rules in ruled:
        rules.apply(work[r], states[r].counts, states[r].num_generated)
    if is_padded:
        work[:, num_token_ids:] = -torch.inf
    drawn = [r for r, state in enumerate(states) if not state.params.is_greedy]
    if len(drawn) == len(states):
        ids = draw_tokens(work, states)
    else:
        ids = _best_ids(work)
        if drawn:
            ids[drawn] = draw_tokens(work[drawn], [states[r] for r in drawn])
    tokens = _read(ids)
    choices = []
    for r, (token, state) in enumerate(zip(tokens, states, strict=True)):
        forced = state.forced_id
        token_id = token if forced is None else forced
        logprob = None if state.num_top is None else token_logprob(raw[r], token_id, state.num_top, num_token_ids)
        choices.append(Choice(token_id=token_id, logprob=logprob, is_forced=forced is not None))
    return choices


def best_tokens(logits: torch.Tensor) -> list[int]:
    """Lowest id among the largest logits of each row [R, V]. Raises StepFailed if a row's largest logit is not
    finite."""
    return _read(_best_ids(logits))


def _best_ids(logits: torch.Tensor) -> torch.Tensor:
    """The same on the logits' device: [R] int64, -1 where the largest is not finite. (NaN counts as larger than any
    number.)"""
    if logits.device.type == "cpu":  # of so few numbers torch's calls take three times as long as numpy's
        rows = logits.float()
        ids = argmax_rows(rows).numpy()
        largest = rows.numpy()[numpy.arange(len(ids)), ids]
        return torch.from_numpy(numpy.where(numpy.isfinite(largest), ids, -1))
    found = argmax_rows(logits)
    return torch.where(logits.gather(1, found[:, None])[:, 0].isfinite(), found, -1)


def _read(ids: torch.Tensor) -> list[int]:
    """Chosen ids [R] on the host, which waits for the device once. Raises StepFailed for -1: where the model's
    arithmetic broke down no token is the right one."""
    found = cast(list[int], ids.tolist())
    if min(found) < 0:
        raise StepFailed(
            "the model's logits are not finite (NaN or infinity), so no token can be chosen; if it happens again, try "
            "another dtype or quantization, or look at the checkpoint's weights"
        )
    return found


def draw_tokens(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """Inverse-CDF draw per row from logits [R, V] float32, after temperature and filters; ids [R] int64, -1 where a
    row's largest logit is not finite."""
    largest = logits.amax(dim=-1, keepdim=True)
    return torch.where(largest[:, 0].isfinite(), _draw(logits, largest, states), -1)


def _draw(logits: torch.Tensor, largest: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    device = logits.device
    temperature = torch.tensor([s.params.temperature for s in states], dtype=torch.float64, device=device)
    weights = (logits - largest).double().div_(temperature[:, None]).exp_()
    draws = torch.tensor([state.draw() for state in states], dtype=torch.float64, device=device)
    filtered = [r for r, s in enumerate(states) if _filters(s.params)]
    if not filtered:
        return _invert(weights, draws)
    if len(filtered) == len(states):
        return _draw_filtered(weights, states, draws)
    ids = torch.empty(len(states), dtype=torch.int64, device=device)
    rows = torch.tensor(filtered, device=device)
    ids[rows] = _draw_filtered(weights[rows], [states[r] for r in filtered], draws[rows])
    rows = torch.tensor([r for r, s in enumerate(states) if not _filters(s.params)], device=device)
    ids[rows] = _invert(weights[rows], draws[rows])
    return ids


def _draw_filtered(weights: torch.Tensor, states: Sequence[SamplingState], draws: torch.Tensor) -> torch.Tensor:
    kept, order = filter_weights(weights, [state.params for state in states])
    return order.gather(1, _invert(kept, draws)[:, None])[:, 0]


def filter_weights(weights: torch.Tensor, params: Sequence[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply top-k, top-p, min-p to unnormalised weights [R, V] float64.

    Returns (kept, order), both [R, N]: weights by falling size with the rejected ones zeroed, and the ids in that
    order; equal weights keep the order of their ids. On the CPU those that are certain to be rejected are not sorted
    with the others, and may be missing at the end.
    """
    device, vocab = weights.device, weights.shape[-1]
    top_k = torch.tensor([p.top_k if 0 < p.top_k < vocab else vocab for p in params], device=device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    min_p = torch.tensor([p.min_p for p in params], dtype=torch.float64, device=device)
    whole = _row_sums(weights)
    values, ids = weights, torch.arange(vocab, device=device).expand_as(weights)
    if device.type == "cpu":
        values, ids = _at_least(weights, _lowest_kept(weights, whole, top_k, top_p, min_p))
    ordered, places = torch.sort(values, dim=-1, descending=True, stable=True)
    kept = ordered * (torch.arange(ordered.shape[-1], device=device) < top_k[:, None])
    cumulative = kept.cumsum(dim=-1)
    total = torch.where(top_k < vocab, cumulative[:, -1], whole)
    before = cumulative - kept
    inside = (before < (top_p * total)[:, None]) | (top_p[:, None] >= 1.0)
    kept = kept * (inside & (kept >= min_p[:, None] * kept[:, :1]))
    return kept, ids.gather(1, places)


def _lowest_kept(
    weights: torch.Tensor, whole: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """A bound for each row [R] that no weight which a filter keeps lies below; cheap, so not the highest.

    Top-p: weights below `(1 - top_p) * whole / V` add up to less than what it leaves out. Top-k: of the largest of so
    many blocks of ids, the k-th; what top-p makes of the k needs all of them.
    """
    vocab = weights.shape[-1]
    largest = weights.amax(dim=-1)
    floor = torch.where(top_p < 1.0, 0.5 * (1.0 - top_p) * whole / vocab, 0.0)  # a half for what rounding does
    floor = torch.maximum(floor, 0.5 * min_p * largest)
    limited = top_k < vocab
    if not bool(limited.any()):
        return floor
    num_blocks = min(TOP_K_BLOCKS, vocab)
    highest = int(torch.where(limited, top_k, 0).max())
    if highest > num_blocks:
        return torch.where(limited, 0.0, floor)
    size = vocab // num_blocks
    blocks = weights[:, : size * num_blocks].reshape(-1, num_blocks, size).amax(dim=-1)
    ranked = torch.topk(blocks, highest, dim=-1).values
    return torch.where(limited, ranked.gather(1, top_k.clamp_max(highest)[:, None] - 1)[:, 0], floor)


def _at_least(weights: torch.Tensor, floor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, ids) [R, N] of each row's weights from its floor [R] up, by rising id; zeros behind shorter rows."""
    is_in = weights >= floor[:, None]
    counts = is_in.sum(dim=-1)
    width = max(1, int(counts.max()))
    if 2 * width > weights.shape[-1]:
        return weights, torch.arange(weights.shape[-1]).expand_as(weights)
    rows, columns = is_in.nonzero(as_tuple=True)
    places = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    values = weights.new_zeros(len(weights), width)
    ids = torch.zeros(len(weights), width, dtype=torch.int64)
    values[rows, places], ids[rows, places] = weights[rows, columns], columns
    return values, ids


def _row_sums(weights: torch.Tensor) -> torch.Tensor:
    """[R]; of each row alone. (On the CPU torch's sum of one long row is not that of the same row among others.)"""
    if weights.device.type == "cpu":
        return torch.from_numpy(weights.contiguous().numpy().sum(axis=-1))
    return weights.sum(dim=-1)


def token_logprob(row: torch.Tensor, token_id: int, num_top: int, num_token_ids: int | None = None) -> TokenLogprob:
    """Log-probability of `token_id` under logits row [V] float32, its rank, and the `num_top` best tokens, the last two
    among the first `num_token_ids` (None: all)."""
    return token_logprobs(row[None], [token_id], num_top, num_token_ids)[0]


def token_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], num_top: int, num_token_ids: int | None = None
) -> list[TokenLogprob]:
    """The same for each row of logits [R, V] of any float dtype, a few at a time: what that needs beside them stays
    small, and in the processor's cache."""
    found: list[TokenLogprob] = []
    num_bytes = LOGPROB_BYTES if logits.device.type == "cpu" else 64 * LOGPROB_BYTES
    num_rows = max(1, num_bytes // (4 * logits.shape[-1]))
    for first in range(0, len(token_ids), num_rows):
        ids = token_ids[first : first + num_rows]
        logprobs = torch.log_softmax(logits[first : first + len(ids)].float(), dim=-1)[:, :num_token_ids]
        chosen = logprobs.gather(1, torch.tensor(ids, device=logprobs.device)[:, None])
        ranks = (logprobs > chosen).sum(dim=-1).tolist()
        tops: list[tuple[tuple[int, float], ...]] = [()] * len(ids)
        if num_top:
            values, best = torch.topk(logprobs, min(num_top, logprobs.shape[-1]), dim=-1)
            tops = [tuple(zip(*pair, strict=True)) for pair in zip(best.tolist(), values.tolist(), strict=True)]
        found += [
            TokenLogprob(token_id=token_id, logprob=logprob, rank=rank + 1, top=top)
            for token_id, logprob, rank, top in zip(ids, chosen[:, 0].tolist(), ranks, tops, strict=True)
        ]
    return found


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _invert(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Index at which the running sum of weights [R, N] passes draw x total; never an index of weight 0."""
    cumulative = weights.cumsum(dim=-1)
    target = draws * cumulative[:, -1]
    index = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    if weights.device.type != "cpu":  # for all rows: to ask for the few would wait for the device
        return index.clamp_max((cumulative < cumulative[:, -1:]).sum(dim=-1))
    beyond = (index == weights.shape[-1]).nonzero()[:, 0]  # the product was rounded up to the total
    if len(beyond):
        index[beyond] = (cumulative[beyond] < cumulative[beyond, -1:]).sum(dim=-1)  # the first that reaches it
    return index
