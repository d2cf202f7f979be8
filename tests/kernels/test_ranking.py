"""Ranked places of rows against Python's own stable sort, by every way there is to find them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.ranking import FEW_NUMBERS, best_places, closing_others, rising_places
from tests.profiles import IS_SOAK

NUMBERS = (0.0, -0.0, 1.0, -1.0, 0.1, -0.1, 1e-40, -1e-40, 3e38, -3e38, math.inf, -math.inf)


def _ranked(row: list[float], count: int) -> list[int]:
    return sorted(range(len(row)), key=lambda place: -row[place])[:count]


@settings(max_examples=400 if IS_SOAK else 60, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(0, 3), (1, 1), (1, 700), (3, 16), (40, 16), (600, 2), (33, 70)]),
    count=st.sampled_from([1, 2, 3, 1000]),
    is_finite=st.booleans(),
    has_strides=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_best_come_first_and_equal_ones_by_place(
    shape: tuple[int, int], count: int, is_finite: bool, has_strides: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.tensor(NUMBERS[:10] if is_finite else NUMBERS)
    x = numbers[torch.randint(len(numbers), shape, generator=generator)]
    x = x.T.contiguous().T if has_strides else x
    count = min(count, shape[1])
    before = x.clone()
    places = best_places(x, count)
    assert (places.dtype, places.shape) == (torch.int64, (shape[0], count))
    assert places.tolist() == [_ranked(row, count) for row in x.tolist()]
    left = x.clamp(-1, 1) + closing_others(x, count)
    for row, chosen in zip(left.tolist(), places.tolist(), strict=True):
        assert {i for i, number in enumerate(row) if number >= -1} == set(chosen)
    assert torch.equal(x, before)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_and_many_rows_are_ranked_alike(count: int) -> None:
    x = torch.randn(400, 7, generator=torch.Generator().manual_seed(0)).mul_(4).round_()
    assert x.numel() > FEW_NUMBERS
    assert torch.equal(torch.cat([best_places(row[None], count) for row in x]), best_places(x, count))
    assert np.array_equal(rising_places(-x.numpy(), count), best_places(x, count).numpy())


def test_places_of_what_has_a_gradient() -> None:
    x = torch.tensor([[0.5, 2.0, 2.0]], requires_grad=True)
    assert best_places(x, 2).tolist() == [[1, 2]]
    assert closing_others(x, 1).tolist()[0][1] == 0
