"""Rotary embeddings against complex multiplication in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dispatch import Path, forced
from kernels.rotary import (
    inverse_frequencies,
    mrope_cos_sin,
    rotary_2d_cos_sin,
    rotary_cos_sin,
    rotary_table,
    rotate,
)
from tests import oracles
from tests.kernels.paths import with_native
from tests.tolerances import assert_matches

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _frequency(i: int, head_dim: int, theta: float) -> float:
    return float(theta ** (-2 * i / head_dim))


def _heads(seed: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, heads, head_dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    positions=st.lists(st.integers(0, 500), min_size=1, max_size=9),
    heads=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    half=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    path=with_native,
)
def test_one_dimensional(
    positions: list[int], heads: tuple[int, int], half: int, dtype: torch.dtype, path: Path
) -> None:
    theta, head_dim = 1e4, 2 * half
    angles = torch.tensor(
        [[p * _frequency(i, head_dim, theta) for i in range(half)] for p in positions], dtype=torch.float64
    )
    q, k = (_heads(i, len(positions), count, head_dim, dtype) for i, count in enumerate(heads))
    cos, sin = rotary_cos_sin(torch.tensor(positions), inverse_frequencies(head_dim, theta))
    table = rotary_table(cos, sin)
    for x in (q, k):
        with forced(path):
            actual = rotate(x, table)
        assert_matches(actual, oracles.rotate_pairs(x, angles), reduced=500**2)  # an angle is off by its size x 1e-7


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(0, 7),
    heads=st.integers(1, 4),
    half=st.integers(1, 20),
    kept=st.integers(1, 30),
    dtype=st.sampled_from(DTYPES),
    path=with_native,
)
def test_a_table_of_fewer_elements_rotates_the_first_ones(
    num_tokens: int, heads: int, half: int, kept: int, dtype: torch.dtype, path: Path
) -> None:
    positions = torch.arange(3, 3 + num_tokens)
    frequencies = inverse_frequencies(2 * half, 1e4)
    x = _heads(5, num_tokens, heads, 2 * half + kept, dtype)
    with forced(path):
        actual = rotate(x, rotary_table(*rotary_cos_sin(positions, frequencies)))
    angles = torch.tensor(
        [[p * _frequency(i, 2 * half, 1e4) for i in range(half)] for p in positions.tolist()], dtype=torch.float64
    ).view(num_tokens, half)
    assert_matches(actual[..., : 2 * half], oracles.rotate_pairs(x[..., : 2 * half], angles), reduced=10**2)
    assert torch.equal(actual[..., 2 * half :], x[..., 2 * half :])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    positions=st.lists(st.tuples(*[st.integers(0, 300)] * 3), min_size=1, max_size=9),
    sections=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any),
    path=with_native,
)
def test_mrope_sections_follow_their_row(
    positions: list[tuple[int, int, int]], sections: list[int], path: Path
) -> None:
    half, theta = sum(sections), 1e6
    row_of = [row for row, count in enumerate(sections) for _ in range(count)]
    angles = torch.tensor(
        [[p[row_of[i]] * _frequency(i, 2 * half, theta) for i in range(half)] for p in positions], dtype=torch.float64
    )
    cos, sin = mrope_cos_sin(torch.tensor(positions).T, inverse_frequencies(2 * half, theta), sections)
    x = _heads(3, len(positions), 2, 2 * half, torch.float32)
    with forced(path):
        assert_matches(rotate(x, rotary_table(cos, sin)), oracles.rotate_pairs(x, angles), reduced=300**2)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    positions=st.lists(st.tuples(*[st.integers(0, 300)] * 3), min_size=1, max_size=9),
    sections=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any),
)
def test_interleaved_mrope_sections_take_turns(positions: list[tuple[int, int, int]], sections: list[int]) -> None:
    """Frequency i is the height's or the width's in its turn, as long as their sections last; else it is time's."""
    half, theta = sum(sections), 1e6
    row_of = [i % 3 if i < 3 * sections[i % 3] else 0 for i in range(half)]
    angles = torch.tensor([[p[row_of[i]] * _frequency(i, 2 * half, theta) for i in range(half)] for p in positions])
    frequencies = inverse_frequencies(2 * half, theta)
    cos, sin = mrope_cos_sin(torch.tensor(positions).T, frequencies, sections, interleaved=True)
    torch.testing.assert_close(cos, angles.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(sin, angles.sin(), rtol=0, atol=1e-4)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    positions=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=9),
    quarter=st.integers(1, 20),
    path=with_native,
)
def test_two_dimensional(positions: list[tuple[int, int]], quarter: int, path: Path) -> None:
    head_dim, theta = 4 * quarter, 1e4
    angles = torch.tensor(
        [[p[axis] * _frequency(i, head_dim // 2, theta) for axis in (0, 1) for i in range(quarter)] for p in positions],
        dtype=torch.float64,
    )
    cos, sin = rotary_2d_cos_sin(torch.tensor(positions), head_dim, theta)
    x = _heads(4, len(positions), 3, head_dim, torch.float32)
    with forced(path):
        assert_matches(rotate(x, rotary_table(cos, sin)), oracles.rotate_pairs(x, angles), reduced=100**2)


def test_shapes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="must be even"):
        inverse_frequencies(7, 1e4)
    with pytest.raises(ValueError, match="must sum up to 8"):
        mrope_cos_sin(torch.zeros(3, 2), inverse_frequencies(16, 1e4), [2, 3, 4])
    with pytest.raises(ValueError, match="multiple of 4"):
        rotary_2d_cos_sin(torch.zeros(1, 2), 6, 1e4)
