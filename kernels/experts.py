"""Mixture of experts: routing, rows sorted by expert, one grouped matmul over all experts, and the weighted sum back.

Rows of the same expert are neighbours, experts in rising order; `ExpertGroups` says where each expert's rows begin and
where each (token, choice) went. No row is padded, no expert's weights are read that has no row.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch

from kernels.dispatch import twin
from kernels.linear import linear
from kernels.ranking import best_places, closing_others

MANY_TOKENS = 32  # from which on torch's softmax over short rows takes longer than over their columns
SMALL_SUM = 1 << 16  # numbers, up to which they are added up in one call


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExpertGroups:
    """Of T tokens with k choices each: `tokens` [T * k], the token behind each sorted row; `places` [T, k], the sorted
    row of each choice; `offsets` [E + 1], where each expert's rows begin. All int64 on the choices' device."""

    tokens: torch.Tensor
    places: torch.Tensor
    offsets: torch.Tensor


def route(logits: torch.Tensor, top_k: int, *, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(logits) in float32, and of that the `top_k` largest: (weights [T, k] float32, experts [T, k] int64).

    logits: [T, E]. Equal logits are taken by rising expert. normalise: the weights of a token add up to 1.
    Raises ValueError when top_k is not in 1..E.
    """
    num_tokens, num_experts = logits.shape
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"route: {top_k} of {num_experts} experts")
    wide = logits.float()
    experts = best_places(wide, top_k)
    if not normalise:
        return torch.softmax(wide, 1).gather(1, experts), experts
    chosen = wide.gather(1, experts)  # the sum over all experts cancels out
    if num_tokens < MANY_TOKENS:
        return torch.softmax(chosen, 1), experts
    return torch.softmax(chosen.t(), 0).t(), experts


def route_grouped(
    logits: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    *,
    normalise: bool,
    num_groups: int,
    groups_kept: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """sigmoid(logits) in float32 as weights; the experts with the largest weight + bias are taken, from the
    `groups_kept` groups whose two best add up to most: (weights * scale [T, k] float32, experts [T, k] int64).

    logits: [T, E], neighbours in `num_groups` groups of at least two; bias: [E] float32, which counts for the choice
    only. Equal ones are taken by rising expert, equal groups by rising group. normalise: a token's weights add up to
    `scale`. Raises ValueError when the numbers do not fit.
    """
    num_experts = logits.shape[1]
    size = num_experts // max(1, num_groups)
    if size * num_groups != num_experts or size < 2 or not 1 <= groups_kept <= num_groups:
        raise ValueError(f"route_grouped: {groups_kept} of {num_groups} groups of {num_experts} experts")
    if not 1 <= top_k <= groups_kept * size:
        raise ValueError(f"route_grouped: {top_k} experts of {groups_kept} groups of {size}")
    scores = torch.sigmoid(logits.float())
    wanted = scores + bias
    if groups_kept < num_groups:
        by_group = wanted.view(-1, num_groups, size)
        best = by_group.topk(2, dim=2).values.sum(2)
        by_group += closing_others(best, groups_kept).unsqueeze(2)
    experts = best_places(wanted, top_k)
    weights = scores.gather(1, experts)
    if normalise:
        weights = weights / weights.sum(1, keepdim=True)
    return weights if scale == 1 else weights * scale, experts


def group_by_expert(experts: torch.Tensor, num_experts: int) -> ExpertGroups:
    """Sort choices [T, k] int64 (each in 0..num_experts - 1) by expert, the choices of one expert by token."""
    flat = experts.reshape(-1)
    ordered, order = flat.sort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    bounds = torch.arange(num_experts + 1, device=order.device)
    return ExpertGroups(
        tokens=order // max(1, experts.shape[1]),
        places=places.view(experts.shape),
        offsets=torch.searchsorted(ordered, bounds),
    )


def grouped_matmul(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows offsets[e] .. offsets[e + 1] - 1 times expert e's weight: out[r] = x[r] @ weight[e].T, float32 sums.

    x: [R, K], or with `tokens` [R] int64 any [T, K] whose row tokens[r] is taken; weight: [E, N, K] contiguous;
    offsets: [E + 1] int64 from 0 to R. Returns [R, N] of x's dtype. Raises ValueError when shapes do not fit.
    """
    num_experts, width, inputs = weight.shape
    if x.dim() != 2 or x.shape[1] != inputs or offsets.shape != (num_experts + 1,):
        raise ValueError(
            f"grouped_matmul: inputs {tuple(x.shape)}, weight {tuple(weight.shape)} and offsets "
            f"{tuple(offsets.shape)} do not fit"
        )
    triton = twin("experts", x)
    if triton is not None:
        return triton.grouped_matmul(x, weight, offsets, tokens)  # type: ignore[no-any-return]
    rows = x if tokens is None else x.index_select(0, tokens)
    out = torch.empty(rows.shape[0], width, dtype=x.dtype, device=x.device)
    bounds = offsets.tolist()
    for expert, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if begin < end:
            out[begin:end] = linear(rows[begin:end], weight[expert])
    return out


def combine_experts(rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """out[t] = sum over k of weights[t, k] * rows[places[t, k]], in float32: [T, N] of rows' dtype.

    rows: [T * k, N]; places: [T, k] int64; weights: [T, k] float32.
    """
    if places.shape != weights.shape:
        raise ValueError(f"combine_experts: places {tuple(places.shape)}, weights {tuple(weights.shape)}")
    triton = twin("experts", rows)
    if triton is not None:
        return triton.combine_experts(rows, places, weights)  # type: ignore[no-any-return]
    if rows.numel() <= SMALL_SUM:
        return (rows[places].float() * weights.unsqueeze(2)).sum(1).to(rows.dtype)
    total = torch.zeros(places.shape[0], rows.shape[1], dtype=torch.float32, device=rows.device)
    for place, weight in zip(places.T, weights.float().T, strict=True):
        total.addcmul_(rows.index_select(0, place).float(), weight[:, None])
    return total.to(rows.dtype)
