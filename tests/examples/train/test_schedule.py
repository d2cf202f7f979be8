"""Properties of the learning rate over any run."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from examples.train.schedule import CosineSchedule, half_cosine, warm_up
from examples.train_diffusion import DiffusionPlan

plans = st.builds(
    CosineSchedule,
    steps=st.integers(1, 600),
    warmup_steps=st.integers(0, 700),
    floor=st.floats(0.0, 1.0, allow_subnormal=False),
)


@settings(deadline=None, max_examples=200)
@given(plans)
def test_it_rises_to_the_peak_and_falls_to_the_floor_and_never_leaves_them(plan: CosineSchedule) -> None:
    shares = [plan(step) for step in range(plan.steps + 1)]
    assert max(shares) <= 1.0 and min(shares) >= 0.0
    warmup = min(plan.warmup_steps, plan.steps)
    assert all(b > a for a, b in itertools.pairwise(shares[:warmup]))
    assert all(b <= a for a, b in itertools.pairwise(shares[warmup:]))
    if plan.warmup_steps < plan.steps:
        assert shares[max(plan.warmup_steps - 1, 0)] == pytest.approx(1.0, abs=0)
        assert shares[plan.steps] == pytest.approx(plan.floor, rel=1e-12)
        assert all(share >= plan.floor for share in shares[plan.warmup_steps :])


@settings(deadline=None, max_examples=100)
@given(plans, st.data())
def test_it_is_the_formula(plan: CosineSchedule, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, plan.steps - 1))
    if step < plan.warmup_steps:
        wanted = (step + 1) / plan.warmup_steps
    else:
        progress = (step - plan.warmup_steps) / (plan.steps - plan.warmup_steps)
        wanted = plan.floor + (1 - plan.floor) * math.cos(math.pi / 2 * progress) ** 2
    assert plan(step) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 8000))
def test_the_diffusion_models_stays_below_its_peak_too(steps: int) -> None:
    plan = DiffusionPlan(steps=steps)
    shares = [plan.rate(step) for step in range(0, steps, max(1, steps // 50))]
    assert all(0.01 <= share <= 1.0 for share in shares)


def test_a_floor_of_a_tenth_without_warm_up_is_minimind_s() -> None:
    plan = CosineSchedule(steps=80, warmup_steps=0, floor=0.1)
    for step in range(81):
        assert plan(step) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * step / 80)))


def test_factors_at_their_ends() -> None:
    assert [warm_up(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warm_up(0, 0) == 1.0
    assert [half_cosine(step, 2, 4) for step in (0, 2, 4, 9)] == [1.0, 1.0, 0.0, 0.0]
    assert half_cosine(3, 2, 4) == pytest.approx(0.5)


@pytest.mark.parametrize("values", [{"steps": 0}, {"steps": 5, "warmup_steps": -1}, {"steps": 5, "floor": 1.5}])
def test_what_would_leave_the_range_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="steps are at least 1"):
        CosineSchedule(**values)  # type: ignore[arg-type]
