"""Which of a block's masks a step replaces, by the schedule of each canvas.

Masks are ranked by falling confidence, equal ones by rising position; every rule takes the first at least, so a block
is done after as many steps as it has masks. The rules over ranks are `kernels.selection`'s; `hierarchical` also looks
at runs of neighbouring masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch

from kernels.selection import select_count, select_entropy, select_factor, select_threshold
from language_worker.canvas import Canvas
from language_worker.diffusion_params import DiffusionParams

Select = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
RULES: dict[str, tuple[Select, Callable[[Canvas], float]]] = {
    "static": (select_count, lambda canvas: canvas.quota()),
    "threshold": (select_threshold, lambda canvas: canvas.params.threshold),
    "factor": (select_factor, lambda canvas: canvas.params.factor),
    "entropy": (select_entropy, lambda canvas: canvas.params.entropy_bound),
}


def choose_positions(
    canvases: Sequence[Canvas], confidence: Sequence[float], entropy: Sequence[float]
) -> list[list[int]]:
    """For each canvas: indices into its open positions, ascending. confidence, entropy: one per open position, canvas
    after canvas."""
    scores, first = [], 0
    for canvas in canvases:
        end = first + len(canvas.open_positions())
        scores.append(list((entropy if canvas.params.schedule == "entropy" else confidence)[first:end]))
        first = end
    chosen: list[list[int]] = [[] for _ in canvases]
    for schedule in {canvas.params.schedule for canvas in canvases}:
        members = [i for i, canvas in enumerate(canvases) if canvas.params.schedule == schedule]
        if schedule == "hierarchical":
            for i in members:
                chosen[i] = select_hierarchical(scores[i], canvases[i].open_positions(), canvases[i].params)
        else:
            rule, parameter = RULES[schedule]
            picked = _select(rule, [scores[i] for i in members], [parameter(canvases[i]) for i in members])
            for i, indices in zip(members, picked, strict=True):
                chosen[i] = indices
    return chosen


def _select(rule: Select, scores: list[list[float]], parameters: list[float]) -> list[list[int]]:
    width = max(map(len, scores))
    is_open = torch.tensor([[True] * len(own) + [False] * (width - len(own)) for own in scores])
    padded = torch.tensor([own + [0.0] * (width - len(own)) for own in scores])
    selected = rule(padded, is_open, torch.tensor(parameters))
    return [row.nonzero()[:, 0].tolist() for row in selected]


def select_hierarchical(confidence: Sequence[float], positions: Sequence[int], params: DiffusionParams) -> list[int]:
    """All that reach `threshold`, the best of every run of neighbouring masks if it reaches `low_threshold`, and the
    best of all."""
    best = max(range(len(positions)), key=lambda i: (confidence[i], -i))
    chosen = {best, *(i for i, value in enumerate(confidence) if value >= params.threshold)}
    for _, run in groupby(range(len(positions)), key=lambda i: positions[i] - i):
        leader = max(run, key=lambda i: (confidence[i], -i))
        if confidence[leader] >= params.low_threshold:
            chosen.add(leader)
    return sorted(chosen)
