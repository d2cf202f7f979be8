"""Pointwise gates and the variants of RMSNorm against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dispatch import Path, forced
from kernels.gates import relu_squared, sigmoid_blend, silu_gate, softcap
from kernels.norm import rms_norm
from tests import oracles
from tests.kernels.paths import paths
from tests.tolerances import assert_matches

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _draw(seed: int, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 300)),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
    seed=st.integers(0, 99),
    path=paths,
)
def test_gates(shape: tuple[int, int], dtype: torch.dtype, scale: float, seed: int, path: Path) -> None:
    rows, width = shape
    first, second, gate = (_draw(seed + i, rows, 2 * width, dtype=dtype, scale=scale)[:, ::2] for i in range(3))
    before = [x.clone() for x in (first, second, gate)]
    with forced(path):
        squared, capped = relu_squared(first), softcap(first, 15.0)
        blended, gated = sigmoid_blend(gate, first, second), silu_gate(first, gate)
    share = 1 / (1 + (-gate.double()).exp())
    assert_matches(squared, first.double().clamp_min(0) ** 2, reduced=16)
    assert_matches(capped, 15 * torch.tanh(first.double() / 15), reduced=16)
    assert_matches(blended, share * first.double() + (1 - share) * second.double(), reduced=16)
    assert_matches(gated, first.double() * gate.double() * share, reduced=16)
    assert all(torch.equal(*pair) for pair in zip((first, second, gate), before, strict=True))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 129)),
    dtype=st.sampled_from(DTYPES),
    has_weight=st.booleans(),
    rounds=st.booleans(),
    seed=st.integers(0, 99),
    path=paths,
)
def test_rms_norm_without_weight_and_rounded_before_it(
    shape: tuple[int, int], dtype: torch.dtype, has_weight: bool, rounds: bool, seed: int, path: Path
) -> None:
    x = _draw(seed, *shape, dtype=dtype)
    weight = _draw(seed + 1, shape[1], dtype=dtype) if has_weight else None
    with forced(path):
        actual = rms_norm(x, weight, 1e-5, round_before_weight=rounds)
    factor = torch.ones(shape[1], dtype=torch.float64) if weight is None else weight
    assert_matches(actual, oracles.rms_norm(x, factor, 1e-5))


@pytest.mark.parametrize(
    ("dtype", "path"),
    [(torch.bfloat16, "torch"), (torch.float16, "torch"), (torch.float16, "triton")],  # interpreted bfloat16 truncates
)
def test_the_place_of_the_rounding_shows(dtype: torch.dtype, path: Path) -> None:
    x, weight = _draw(0, 50, 64, dtype=dtype), _draw(1, 64, dtype=dtype)
    with forced(path):
        once, twice = (rms_norm(x, weight, 1e-6, round_before_weight=rounds) for rounds in (False, True))
        normed = rms_norm(x, None, 1e-6)
    assert torch.equal(twice, (normed.float() * weight.float()).to(dtype))
    assert not torch.equal(once, twice)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        softcap(torch.zeros(2), 0.0)
    with pytest.raises(ValueError, match="shapes and dtypes differ"):
        silu_gate(torch.zeros(2), torch.zeros(3))
