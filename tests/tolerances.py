"""How far a result may be from the float64 oracle: per dtype a relative part, and an absolute part per reduced element.

A result that sums `n` products carries rounding that grows like `sqrt(n)`; judges scale the absolute part with it.
"""

from __future__ import annotations

import math

import torch

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-12, 1e-13),
    torch.float32: (1e-5, 1e-6),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}


def assert_matches(actual: torch.Tensor, oracle: torch.Tensor, *, reduced: int = 1) -> None:
    """Compare `actual` with a float64 oracle of equal shape; prints the first wrong elements.

    The tolerance is that of `actual`'s dtype; `reduced` is the number of elements summed per result.
    """
    assert oracle.dtype == torch.float64, f"oracles are float64, got {oracle.dtype}"
    assert actual.shape == oracle.shape, f"shape {tuple(actual.shape)}, oracle {tuple(oracle.shape)}"
    relative, absolute = TOLERANCES[actual.dtype]
    allowed = relative * oracle.abs() + absolute * math.sqrt(max(1, reduced))
    wrong = ~((actual.double() - oracle).abs() <= allowed)
    if wrong.any():
        places = wrong.nonzero()[:5].tolist()
        shown = [(place, float(actual[tuple(place)]), float(oracle[tuple(place)])) for place in places]
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are off; (place, actual, oracle): {shown}"
        )
