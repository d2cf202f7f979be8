"""Routing, grouping, grouped matmul and combination against loops over tokens and choices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dispatch import Path, forced
from kernels.experts import combine_experts, group_by_expert, grouped_matmul, route, route_grouped
from tests.kernels.paths import paths
from tests.profiles import IS_SOAK
from tests.tolerances import assert_matches

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXAMPLES = 200 if IS_SOAK else 25


def _draw(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 20),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 3),
    normalise=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_routing_and_grouping(
    tokens: int, experts: int, top_k: int, normalise: bool, dtype: torch.dtype, seed: int
) -> None:
    top_k = min(top_k, experts)
    logits = (_draw(seed, tokens, experts, dtype=torch.float32) * 2).round().to(dtype)  # with ties
    weights, chosen = route(logits, top_k, normalise=normalise)
    groups = group_by_expert(chosen, experts)
    for t in range(tokens):
        ranked = sorted(range(experts), key=lambda e: (-float(logits[t, e]), e))[:top_k]
        assert chosen[t].tolist() == ranked
        total = math.fsum(math.exp(float(logits[t, e])) for e in (ranked if normalise else range(experts)))
        expected = torch.tensor([math.exp(float(logits[t, e])) / total for e in ranked], dtype=torch.float64)
        assert_matches(weights[t], expected)
        for k in range(top_k):
            place, expert = int(groups.places[t, k]), int(chosen[t, k])
            assert int(groups.tokens[place]) == t
            assert int(groups.offsets[expert]) <= place < int(groups.offsets[expert + 1])
    assert sorted(groups.places.flatten().tolist()) == list(range(tokens * top_k))
    assert groups.offsets[[0, -1]].tolist() == [0, tokens * top_k]


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 9),
    groups=st.sampled_from([(1, 1, 5), (2, 1, 3), (4, 2, 2), (3, 3, 4)]),  # how many, kept, of how many experts
    top_k=st.integers(1, 4),
    normalise=st.booleans(),
    seed=st.integers(0, 99),
)
def test_routing_within_groups(
    tokens: int, groups: tuple[int, int, int], top_k: int, normalise: bool, seed: int
) -> None:
    num_groups, kept, size = groups
    top_k = min(top_k, kept * size)
    logits = (_draw(seed, tokens, num_groups * size, dtype=torch.float32) * 2).round()  # with ties
    bias = (_draw(seed + 1, num_groups * size, dtype=torch.float32) * 4).round() / 4
    weights, chosen = route_grouped(
        logits, bias, top_k, normalise=normalise, num_groups=num_groups, groups_kept=kept, scale=2.5
    )
    scores = torch.sigmoid(logits)
    for t in range(tokens):
        wanted = (scores[t] + bias).tolist()
        of_group = [sorted(wanted[g * size : (g + 1) * size], reverse=True) for g in range(num_groups)]
        totals = [float(torch.tensor(best[:2]).sum()) for best in of_group]
        open_groups = sorted(range(num_groups), key=lambda g: (-totals[g], g))[:kept]
        candidates = [e for e in range(num_groups * size) if e // size in open_groups]
        ranked = sorted(candidates, key=lambda e: (-wanted[e], e))[:top_k]
        assert chosen[t].tolist() == ranked
        expected = torch.tensor([float(scores[t, e]) for e in ranked], dtype=torch.float64)
        assert_matches(weights[t], 2.5 * (expected / expected.sum() if normalise else expected))


def test_groups_that_do_not_fit_are_refused() -> None:
    for num_groups, kept, top_k in [(3, 1, 1), (8, 1, 1), (4, 5, 1), (4, 1, 3), (4, 1, 0)]:
        with pytest.raises(ValueError, match="route_grouped"):
            route_grouped(
                torch.zeros(1, 8), torch.zeros(8), top_k, normalise=True, num_groups=num_groups, groups_kept=kept,
                scale=1.0,
            )  # fmt: skip


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 3, 16, 40]), min_size=1, max_size=6),
    sizes=st.tuples(st.sampled_from([1, 31, 64, 70]), st.sampled_from([1, 33, 130])),
    gathers=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    path=paths,
)
def test_grouped_matmul(
    counts: list[int], sizes: tuple[int, int], gathers: bool, dtype: torch.dtype, seed: int, path: Path
) -> None:
    width, inputs = sizes
    rows = sum(counts)
    weight = _draw(seed, len(counts), width, inputs, dtype=dtype)
    for expert, count in enumerate(counts):
        if not count:
            weight[expert] = math.nan  # nobody may read what no row needs
    x = _draw(seed + 1, rows + 3, inputs + 2, dtype=dtype)[:, 1 : 1 + inputs]
    tokens = torch.randint(rows + 3, (rows,), generator=torch.Generator().manual_seed(seed)) if gathers else None
    offsets = torch.tensor([sum(counts[:e]) for e in range(len(counts) + 1)])
    source = x[:rows] if tokens is None else x
    with forced(path):
        actual = grouped_matmul(source, weight, offsets, tokens)
    expected = torch.empty(rows, width, dtype=torch.float64)
    for r in range(rows):
        expert = next(e for e in range(len(counts)) if r < int(offsets[e + 1]))
        expected[r] = weight[expert].double() @ x[r if tokens is None else int(tokens[r])].double()
    assert_matches(actual, expected, reduced=inputs)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 7),
    top_k=st.integers(1, 4),
    width=st.sampled_from([1, 33, 2100]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    path=paths,
)
def test_combination(tokens: int, top_k: int, width: int, dtype: torch.dtype, seed: int, path: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = _draw(seed, tokens * top_k, width + 1, dtype=dtype)[:, 1:]
    places = torch.randperm(tokens * top_k, generator=generator).view(tokens, top_k)
    weights = torch.rand(tokens, top_k, generator=generator)
    with forced(path):
        actual = combine_experts(rows, places, weights)
    expected = torch.zeros(tokens, width, dtype=torch.float64)
    for t in range(tokens):
        for k in range(top_k):
            expected[t] += float(weights[t, k]) * rows[int(places[t, k])].double()
    assert_matches(actual, expected, reduced=top_k)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="3 of 2 experts"):
        route(torch.zeros(1, 2), 3, normalise=True)
    with pytest.raises(ValueError, match="do not fit"):
        grouped_matmul(torch.zeros(2, 3), torch.zeros(1, 4, 5), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="combine_experts"):
        combine_experts(torch.zeros(2, 3), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 1))
