"""Loss masks: which positions of a conversation carry loss, and the mean over them.

A label stands over the token that predicts it, so labels are the ids one place to the left, and IGNORED wherever
nothing is to be learned. The mean's denominator is handed in: it is the number of labels of a whole step, of which the
logits at hand may be one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100


def answer_spans(ids: Sequence[int], opening: Sequence[int], ending: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[start, stop) of what follows each `opening`, with the `ending` that closes it.

    An answer that is cut off, as by a limit of length, reaches to the end of the ids.
    """
    place = 0
    while (found := _find(ids, opening, place)) is not None:
        start = found + len(opening)
        end = _find(ids, ending, start)
        place = len(ids) if end is None else end + len(ending)
        yield start, place


def next_token_labels(ids: Sequence[int], spans: Iterable[tuple[int, int]]) -> list[int]:
    """For each position the next id if that lies in a span, else IGNORED. Nothing predicts the first id."""
    labels = [IGNORED] * len(ids)
    for start, stop in spans:
        first = max(start, 1)
        labels[first - 1 : stop - 1] = ids[first:stop]
    return labels


def count_labels(labels: Tensor) -> int:
    """How many positions carry loss."""
    return int((labels != IGNORED).sum())


def masked_mean(logits: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """The cross entropy of [..., V] logits at all labels [...] that count, over `num_labels`.

    Zero, with zero gradients, where nothing counts.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    return functional.cross_entropy(wide, labels.flatten(), ignore_index=IGNORED, reduction="sum") / max(num_labels, 1)


def _find(ids: Sequence[int], wanted: Sequence[int], start: int) -> int | None:
    wanted = list(wanted)
    for place in range(start, len(ids) - len(wanted) + 1):
        if list(ids[place : place + len(wanted)]) == wanted:
            return place
    return None
