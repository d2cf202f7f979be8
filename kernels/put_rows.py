"""Whole rows to places of a tensor: on the CPU by numpy, which copies a row in one go, where torch goes by numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

FEW_NUMBERS = 1 << 14  # up to which torch's one call takes less than making arrays


def put_rows(target: torch.Tensor, places: torch.Tensor, rows: torch.Tensor) -> None:
    """target[places[i]] = rows[i], cast to target's dtype. places: [N] int64, distinct, none of them negative."""
    rows = rows.to(target.dtype)
    if target.itemsize == 1:  # neither numpy nor torch's call has float8
        target, rows = target.view(torch.uint8), rows.view(torch.uint8)
    if not target.is_cpu or rows.numel() <= FEW_NUMBERS or rows.requires_grad:
        target.index_copy_(0, places, rows)
    else:
        _array(target)[places.numpy()] = _array(rows)


def _array(x: torch.Tensor) -> npt.NDArray[np.generic]:
    array: npt.NDArray[Any] = (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()  # which numpy lacks
    return array
