"""The first of each row in order, equal ones by rising place: how experts and positions of a block are chosen.

`torch.topk` promises no order of equal numbers, and torch's stable sort takes up to four times as long. On the CPU
numpy orders few numbers by a stable sort; of many it finds one or two places by looking for the first that is left, and
more by sorting them as whole numbers, where no branch has to be guessed.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

Floats: TypeAlias = npt.NDArray[np.float32]
Places: TypeAlias = npt.NDArray[np.int64]

LOWEST = torch.finfo(torch.float32).min
FEW_NUMBERS = 512  # up to which a stable sort takes less than the other ways' calls
FEW_PLACES = 2  # up to which looking for each by itself takes less than sorting whole numbers
_LOW_BITS = 0xFFFF_FFFF


def best_places(x: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the `count` largest numbers of each row, falling, equal ones by rising place: [R, count] int64.

    x: [R, N] float32 without NaN; 1 <= count <= N.
    """
    if not x.is_cpu:
        return x.sort(dim=1, descending=True, stable=True).indices[:, :count]
    values = -(x.detach() if x.requires_grad else x).numpy()
    if values.size <= FEW_NUMBERS:  # here as well: at this size every call counts
        return torch.from_numpy(values.argsort(1, "stable")[:, :count])
    return torch.from_numpy(rising_places(values, count))


def closing_others(x: torch.Tensor, count: int) -> torch.Tensor:
    """What to add so that of each row the `count` best alone are left: 0 for them, the lowest float32 elsewhere."""
    if not x.is_cpu:
        return torch.full_like(x, LOWEST).scatter_(1, best_places(x, count), 0.0)
    values = np.negative((x.detach() if x.requires_grad else x).numpy(), order="C")
    places = flat_places(rising_places(values, count), values.shape[1])
    values.fill(LOWEST)
    values.reshape(-1)[places] = 0
    return torch.from_numpy(values)


def rising_places(values: Floats, count: int) -> Places:
    """Places of the `count` smallest numbers of each row, rising, equal ones by rising place: of [R, N] without NaN."""
    if count == 1:
        first: Places = values.argmin(1)[:, None]
        return first
    if values.size <= FEW_NUMBERS:
        return values.argsort(1, "stable")[:, :count]
    if count <= FEW_PLACES and values.max() < np.inf:
        return _one_by_one(values, count)
    keys = _rising_keys(values)
    keys.sort(axis=1)
    return keys[:, :count] & _LOW_BITS


def flat_places(places: Places, width: int) -> Places:
    """Where they are in the array laid flat, whose rows are `width` wide."""
    return places if len(places) == 1 else places + np.arange(0, len(places) * width, width)[:, None]


def _one_by_one(values: Floats, count: int) -> Places:
    """By what is smallest once those found are infinite. Of finite values."""
    rows, width = values.shape
    left = values.copy()
    flat, starts = left.reshape(-1), np.arange(0, rows * width, width)
    places = np.empty((count, rows), dtype=np.int64)
    for found in places:
        left.argmin(axis=1, out=found)
        flat[found + starts] = np.inf
    return places.T


def _rising_keys(values: Floats) -> Places:
    """Distinct numbers that rise with the values, and among equal ones with the place, which is their low half."""
    bits = (values + np.float32(0)).view(np.int32)  # + 0: negative zero has other bits
    ordered = bits >> 31
    ordered &= 0x7FFF_FFFF
    ordered ^= bits  # of negative numbers all bits but the sign are turned: they rise with the number
    keys = ordered.astype(np.int64)
    keys <<= 32
    keys |= np.arange(values.shape[1])
    return keys
