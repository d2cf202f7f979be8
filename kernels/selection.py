"""Which open positions of a diffusion block are committed: accept rules over positions ranked by confidence.

Open positions are ranked by falling confidence, equal ones by rising position; closed positions have no rank and are
never selected. Every rule takes one parameter per row. `count` takes just as many as it is told; the others always
take the first of the ranking, so a block with an open position makes progress.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kernels.dispatch import twin
from kernels.ranking import LOWEST, Floats, flat_places, rising_places

Bools: TypeAlias = npt.NDArray[np.bool_]
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
    return _select("entropy", entropy, is_open, bound)


def _select(rule: Rule, score: torch.Tensor, is_open: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if score.dim() != 2 or score.shape[1] == 0 or is_open.shape != score.shape:
        raise ValueError(
            f"select_{rule}: confidence and is_open must be equal [rows, length] with a length, got "
            f"{tuple(score.shape)} and {tuple(is_open.shape)}"
        )
    if parameter.shape != score.shape[:1]:
        raise ValueError(f"select_{rule}: needs one parameter per row, {score.shape[0]}, got {parameter.shape[0]}")
    score, parameter = score.float(), parameter.float()
    triton = twin("selection", score)
    if triton is not None:
        confidence = -score if rule == "entropy" else score
        return triton.select(rule, confidence, is_open, parameter)  # type: ignore[no-any-return]
    selected = torch.from_numpy(_selected(rule, *(x.numpy(force=True) for x in (score, is_open, parameter))))
    return selected if is_open.is_cpu else selected.to(is_open.device)


def _selected(rule: Rule, score: Floats, is_open: Bools, parameter: Floats) -> Bools:
    """On the host wherever the numbers are: they are few, and numpy's calls take a third of torch's."""
    cost = np.minimum(score if rule == "entropy" else -score, -LOWEST)
    cost[~is_open] = np.inf  # behind all others, also behind those whose confidence is -inf
    limit = parameter[:, None]
    length = score.shape[1]
    if rule == "threshold":
        selected = cost <= -limit
        selected[np.arange(len(cost)), cost.argmin(1)] = True
        return selected & is_open
    places = flat_places(rising_places(cost, length), length)
    if rule == "count":
        accepted = np.arange(length) < limit
    elif rule == "factor":  # a prefix: confidence falls, the bound rises
        accepted = cost.take(places) <= limit / np.arange(2, length + 2, dtype=np.float32) - 1
    else:
        spent = cost.take(places).astype(np.float64).cumsum(1)
        accepted = np.minimum(spent, -LOWEST).astype(np.float32) <= limit  # two unbounded ones are no overflow
    if rule != "count":
        accepted[:, 0] = True
    selected = np.empty(is_open.shape, np.bool_)
    selected.reshape(-1)[places] = accepted
    return selected & is_open
