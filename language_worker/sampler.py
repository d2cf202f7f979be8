"""Sampler: a batch of logits rows in, one token per row out.

Each row follows its own SamplingState, and nothing in a row's result depends on the other rows. Order of operations:
the rules of `logit_rules.py` (penalties, bias, what may not be chosen), rows that only pad the vocabulary (-inf),
temperature, top-k, top-p, min-p, draw. Temperature 0 is the argmax; every tie goes to the lowest id. Where a tool
writes the output, its token is taken instead. Input logits are never modified.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from language_worker.api import SamplingParams, TokenLogprob
from language_worker.sampling_state import SamplingState


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
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
        return [Choice(token_id=token_id) for token_id in argmax_rows(logits[:, :num_token_ids])]
    raw = logits.float()
    is_padded = num_token_ids is not None and num_token_ids < raw.shape[-1]
    ruled = [(r, state.rules) for r, state in enumerate(states) if state.rules is not None]
    work = raw.clone() if is_padded or ruled else raw
    for r, rules in ruled:
        rules.apply(work[r], states[r].counts, states[r].num_generated)
    if is_padded:
        work[:, num_token_ids:] = -torch.inf
    tokens = argmax_rows(work)
    drawn = [r for r, state in enumerate(states) if not state.params.is_greedy]
    if drawn:
        ids = draw_tokens(work[drawn], [states[r] for r in drawn])
        for r, token in zip(drawn, ids.tolist(), strict=True):
            tokens[r] = token
    choices = []
    for row, token, state in zip(raw, tokens, states, strict=True):
        forced = state.forced_id
        token_id = token if forced is None else forced
        logprob = None if state.num_top is None else token_logprob(row, token_id, state.num_top, num_token_ids)
        choices.append(Choice(token_id=token_id, logprob=logprob, is_forced=forced is not None))
    return choices


def argmax_rows(logits: torch.Tensor) -> list[int]:
    """Lowest id among the largest logits of each row [R, V].

    On the CPU numpy's argmax finds it (both promise the first of equals; torch's took 5-30 times as long for 32,000
    to 152,000 ids, and longer still in bfloat16).
    """
    if logits.device.type == "cpu":
        ids: list[int] = logits.float().numpy().argmax(axis=-1).tolist()
        return ids
    found: list[int] = logits.argmax(dim=-1).tolist()
    return found


def draw_tokens(logits: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """Inverse-CDF draw per row from logits [R, V] float32, after temperature and filters; ids [R] int64."""
    device = logits.device
    temperature = torch.tensor([s.params.temperature for s in states], dtype=torch.float64, device=device)
    shifted = (logits - logits.amax(dim=-1, keepdim=True)).double()
    weights = torch.exp(shifted / temperature[:, None])
    draws = torch.tensor([state.draw() for state in states], dtype=torch.float64, device=device)
    ids = torch.empty(len(states), dtype=torch.int64, device=device)
    plain = [r for r, s in enumerate(states) if not _filters(s.params)]
    if plain:
        rows = torch.tensor(plain, device=device)
        ids[rows] = _invert(weights[rows], draws[rows])
    filtered = [r for r, s in enumerate(states) if _filters(s.params)]
    if filtered:
        rows = torch.tensor(filtered, device=device)
        kept, order = filter_weights(weights[rows], [states[r].params for r in filtered])
        ids[rows] = order.gather(1, _invert(kept, draws[rows])[:, None])[:, 0]
    return ids


def filter_weights(weights: torch.Tensor, params: Sequence[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply top-k, top-p, min-p to unnormalised weights [R, V] float64.

    Returns (kept, order), both [R, V]: weights by falling size with the rejected ones zeroed, and the ids in that
    order; equal weights keep the order of their ids.
    """
    device, vocab = weights.device, weights.shape[-1]
    ordered, order = torch.sort(weights, dim=-1, descending=True, stable=True)
    top_k = torch.tensor([p.top_k if p.top_k > 0 else vocab for p in params], device=device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    min_p = torch.tensor([p.min_p for p in params], dtype=torch.float64, device=device)
    kept = ordered * (torch.arange(vocab, device=device) < top_k[:, None])
    cumulative = kept.cumsum(dim=-1)
    before = cumulative - kept
    inside = (before < top_p[:, None] * cumulative[:, -1:]) | (top_p[:, None] >= 1.0)
    kept = kept * (inside & (kept >= min_p[:, None] * kept[:, :1]))
    return kept, order


def token_logprob(row: torch.Tensor, token_id: int, num_top: int, num_token_ids: int | None = None) -> TokenLogprob:
    """Log-probability of `token_id` under logits row [V] float32, its rank, and the `num_top` best tokens, the last two
    among the first `num_token_ids` (None: all)."""
    logprobs = torch.log_softmax(row, dim=-1)[:num_token_ids]
    chosen = logprobs[token_id]
    rank = int((logprobs > chosen).sum()) + 1
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        values, ids = torch.topk(logprobs, min(num_top, logprobs.shape[-1]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token_id=token_id, logprob=float(chosen), rank=rank, top=top)


def _filters(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _invert(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Index at which the running sum of weights [R, N] passes draw x total; never an index of weight 0."""
    cumulative = weights.cumsum(dim=-1)
    target = draws * cumulative[:, -1]
    index = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    last = (cumulative < cumulative[:, -1:]).sum(dim=-1)  # first index that reaches the total
    return torch.minimum(index, last)
