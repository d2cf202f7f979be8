"""Which open positions of a diffusion block are committed: accept rules over positions ranked by confidence.

Open positions are ranked by falling confidence, equal ones by rising position; closed positions have no rank and are
never selected. Every rule takes one parameter per row. `count` takes just as many as it is told; the others always
take the first of the ranking, so a block with an open position makes progress.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

from kernels.dispatch import twin

LOWEST = torch.finfo(torch.float32).min
Rule: TypeAlias = Literal["count", "threshold", "factor", "entropy"]


def select_count(confidence: torch.Tensor, is_open: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The `count` [R] int64 best of each row.

    confidence: [R, L] float32, L >= 1; is_open: [R, L] bool. Returns bool [R, L].
    """
    return _select("count", confidence, is_open, count)


def select_threshold(confidence: torch.Tensor, is_open: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """All whose confidence reaches `threshold` [R] float32, and the best. Shapes as in `select_count`."""
    return _select("threshold", confidence, is_open, threshold)


def select_factor(confidence: torch.Tensor, is_open: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The longest ranking prefix in which rank i (from 1) has confidence at least `1 - factor / (i + 1)`, and the
    best. factor: [R] float32, not negative; other shapes as in `select_count`."""
    return _select("factor", confidence, is_open, factor)


def select_entropy(entropy: torch.Tensor, is_open: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """The longest prefix by rising entropy whose entropies add up to at most `bound` [R] float32, and the first.

    entropy: [R, L] float32, not negative; other shapes as in `select_count`.
    """
    return _select("entropy", -entropy, is_open, bound)


def _select(rule: Rule, confidence: torch.Tensor, is_open: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if confidence.dim() != 2 or confidence.shape[1] == 0 or is_open.shape != confidence.shape:
        raise ValueError(
            f"select_{rule}: confidence and is_open must be equal [rows, length] with a length, got "
            f"{tuple(confidence.shape)} and {tuple(is_open.shape)}"
        )
    if parameter.shape != confidence.shape[:1]:
        raise ValueError(f"select_{rule}: needs one parameter per row, {confidence.shape[0]}, got {parameter.shape[0]}")
    confidence, parameter = confidence.float(), parameter.float()
    triton = twin("selection", confidence)
    if triton is not None:
        return triton.select(rule, confidence, is_open, parameter)  # type: ignore[no-any-return]
    # closed ones behind all others, also behind those whose confidence is -inf
    ranked, order = torch.where(is_open, confidence.clamp_min(LOWEST), -torch.inf).sort(
        dim=1, descending=True, stable=True
    )
    rank = torch.arange(confidence.shape[1], device=confidence.device)
    limit = parameter[:, None]
    if rule == "count":
        accepted = rank < limit
    elif rule == "threshold":
        accepted = (ranked >= limit) | (rank == 0)
    elif rule == "factor":
        accepted = (ranked >= 1 - limit / (rank + 2)) | (rank == 0)  # a prefix: confidence falls, the bound rises
    else:
        accepted = (ranked.cumsum(1) >= -limit) | (rank == 0)
    return torch.zeros_like(is_open).scatter_(1, order, accepted) & is_open
