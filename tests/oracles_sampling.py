"""Slow, obvious references for sampling: textbook formulas in float64, Philox on Python integers, sorted lists."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

WORD = 0xFFFF_FFFF


def softmax_statistics(row: torch.Tensor) -> tuple[float, int, float, float, float]:
    """(maximum, its lowest index, log-sum-exp, confidence, entropy) of one row."""
    values = [float(x) for x in row.double()]
    maximum = max(values)
    if maximum == -math.inf:
        return -math.inf, 0, -math.inf, 0.0, 0.0
    lse = maximum + math.log(math.fsum(math.exp(x - maximum) for x in values))
    probabilities = [math.exp(x - lse) for x in values]
    entropy = -math.fsum(p * (x - lse) for p, x in zip(probabilities, values, strict=True) if p > 0)
    return maximum, values.index(maximum), lse, math.exp(maximum - lse), entropy


def kept_ids(
    row: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float, slack: float = 0.0
) -> set[int]:
    """Ids kept by top-k, then top-p, then min-p. `slack` moves the last two bounds: a positive one keeps more."""
    values = [float(x) for x in row.double()]
    ranked = sorted((i for i, x in enumerate(values) if x > -math.inf), key=lambda i: (-values[i], i))
    if temperature == 0 or not ranked:
        return set(ranked[:1])
    if top_k > 0:
        ranked = ranked[:top_k]
    weights = [math.exp((values[i] - values[ranked[0]]) / temperature) for i in ranked]
    total, before, kept = math.fsum(weights), 0.0, set()
    for i, weight in zip(ranked, weights, strict=True):
        if not kept or ((top_p >= 1 or before < (top_p + slack) * total) and weight >= min_p * (1 - slack)):
            kept.add(i)
        before += weight
    return kept


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 as its paper writes it: (L, R) pairs, multipliers and Weyl constants, ten rounds."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (high >> 32) ^ c1 ^ k0, high & WORD, (low >> 32) ^ c3 ^ k1, low & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def gumbel(seed: int, position: int, sample: int, token_id: int) -> float:
    """The noise of one token: -log(-log(1 - (bits + 1/2) / 2^32))."""
    key = (seed & WORD, (seed >> 32) & WORD)
    bits = philox(key, (token_id // 4, position & WORD, sample & WORD, 0))[token_id % 4]
    return -math.log(-math.log1p(-(bits + 0.5) / 2**32))


def selected(rule: str, confidence: Sequence[float], is_open: Sequence[bool], parameter: float) -> set[int]:
    """Positions an accept rule takes, by walking down the ranking."""
    ranked = sorted((i for i, free in enumerate(is_open) if free), key=lambda i: (-confidence[i], i))
    if rule == "count":
        return set(ranked[: int(parameter)])
    taken: set[int] = set()
    total = 0.0
    for rank, i in enumerate(ranked, start=1):
        total += -confidence[i]
        bound = {
            "threshold": confidence[i] >= parameter,
            "factor": confidence[i] >= 1 - parameter / (rank + 1),
            "entropy": total <= parameter,
        }[rule]
        if rank > 1 and not bound:
            break
        taken.add(i)
    return taken
