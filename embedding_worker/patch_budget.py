"""How SigLIP 2 NaFlex fits an image of any shape into a number of patches: the largest scale at which it has no more.

Sides are rounded up to whole patches, so the shape is kept about. The scale is found by halving an interval as often as
the published processor does, with the same numbers: what is left of the interval decides which of two sizes it is.
Plain numbers; knows no pixels and no model.
"""

from __future__ import annotations

import math

LARGEST_SCALE = 100.0  # an image of a few pixels is not blown up further
PRECISION = 1e-5


def fitted_patches(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """(rows, columns) of patches that an image of this many pixels is resized to."""

    def at(scale: float) -> tuple[int, int]:
        rows, columns = (math.ceil(length * scale / patch_size) for length in (height, width))
        return max(1, rows), max(1, columns)

    fits, exceeds = PRECISION / 10, LARGEST_SCALE
    while exceeds - fits >= PRECISION:
        middle = (fits + exceeds) / 2
        if math.prod(at(middle)) <= max_patches:
            fits = middle
        else:
            exceeds = middle
    return at(fits)
