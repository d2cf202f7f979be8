"""Accept rules of diffusion blocks against a walk down the ranking."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dispatch import Path, forced
from kernels.selection import select_count, select_entropy, select_factor, select_threshold
from tests import oracles_sampling as oracles
from tests.kernels.paths import paths
from tests.profiles import IS_SOAK

RULES = {
    "count": (select_count, [0, 1, 3, 200]),
    "threshold": (select_threshold, [0.0, 0.375, 0.9, 2.0]),
    "factor": (select_factor, [0.0, 0.8, 1.5, 50.0]),
    "entropy": (select_entropy, [0.0, 0.7, 2.5, 1000.0]),
}


@settings(max_examples=400 if IS_SOAK else 60, deadline=None, derandomize=True)
@given(
    rule=st.sampled_from(sorted(RULES)),
    length=st.sampled_from([1, 2, 4, 7, 32, 65]),
    rows=st.integers(0, 3),
    share_open=st.sampled_from([0.0, 0.3, 1.0]),
    data=st.data(),
    path=paths,
)
def test_rules_take_what_the_ranking_gives(
    rule: str, length: int, rows: int, share_open: float, data: st.DataObject, path: Path
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    scores = (torch.rand(rows, length, generator=generator) * 16).round() / 16  # exact sums, and ties
    is_open = torch.rand(rows, length, generator=generator) < share_open
    function, choices = RULES[rule]
    parameters = [data.draw(st.sampled_from(choices)) for _ in range(rows)]
    parameter = torch.tensor(parameters, dtype=torch.int64 if rule == "count" else torch.float32)
    with forced(path):
        selected = function(scores, is_open, parameter)
    assert selected.dtype == torch.bool
    for r in range(rows):
        confidence = [-x if rule == "entropy" else x for x in scores[r].tolist()]
        limit = float(parameter[r])
        expected = oracles.selected(rule, confidence, is_open[r].tolist(), limit)
        assert set(selected[r].nonzero()[:, 0].tolist()) == expected


@settings(max_examples=10, deadline=None, derandomize=True)
@given(path=paths)
def test_open_positions_without_confidence_come_before_closed_ones(path: Path) -> None:
    confidence = torch.tensor([[0.5, -math.inf, -math.inf, 0.1]])
    is_open = torch.tensor([[False, False, True, True]])
    with forced(path):
        assert select_count(confidence, is_open, torch.tensor([2])).tolist() == [[False, False, True, True]]
        assert select_count(confidence, is_open, torch.tensor([1])).tolist() == [[False, False, False, True]]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(path=paths)
def test_entropies_without_bound_add_up_to_no_warning(path: Path) -> None:
    """As masks have them whose end of text is deferred: warnings are errors here, and lines in an operator's log."""
    entropy = torch.tensor([[0.5, math.inf, 0.25, math.inf, math.inf]])
    is_open = torch.tensor([[True, True, True, True, False]])
    with forced(path):
        assert select_entropy(entropy, is_open, torch.tensor([1.0])).tolist() == [[True, False, True, False, False]]
        assert select_entropy(entropy[:, 3:], is_open[:, 3:], torch.tensor([1.0])).tolist() == [[True, False]]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must be equal"):
        select_count(torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.bool), torch.ones(1))
    with pytest.raises(ValueError, match="one parameter per row, 1, got 2"):
        select_threshold(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), torch.ones(2))
