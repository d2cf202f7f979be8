"""float16 and its gradient scaler: what overflows is left out, all else is float32's gradient to its precision."""

from __future__ import annotations

import pytest
import torch

from examples.train.precision import Precision
from tests.examples.train.toy import Run, bits, weights


def test_steps_that_overflow_are_left_out_and_halve_the_scale() -> None:
    run = Run(steps=3, every=10, precision="float16", factor=300.0)
    with torch.no_grad():
        run.average.model.head.bias += 1.0  # where the weights are not
    start, first = weights(run.model), weights(run.average.model)
    run.trainer.steps = 1
    run.go()
    assert run.state.scaler.get_scale() == 32768.0
    assert weights(run.model) == start and weights(run.average.model) == first
    assert bits(run.state.snapshot()["learned"]["optimizer"]["state"]) == {}
    run.trainer.steps = 30
    run.go()
    assert run.state.scaler.get_scale() < 32768.0
    assert weights(run.model) != start
    assert run.state.num_rollbacks == 0 and not any("not finite" in note for note in run.heard.notes)


def test_the_scale_doubles_after_2000_good_steps() -> None:
    run = Run(steps=1, precision="float16", factor=1e-3)
    run.state.scaler.load_state_dict({**run.state.scaler.state_dict(), "scale": 8.0, "_growth_tracker": 1999})
    run.go()
    assert run.state.scaler.get_scale() == 16.0


def test_an_overflow_that_no_scale_cures_is_an_error_of_its_place() -> None:
    run = Run(steps=60, every=100, precision="float16", factor=1e9, max_rollbacks=1)
    with pytest.raises(Exception, match="the gradient of") as caught:
        run.go()
    assert type(caught.value).__name__ == "NonFiniteError"
    assert caught.value.step >= 16, "sixteen halvings come first"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 0.0), ("float16", 2e-2), ("bfloat16", 1e-1)])
def test_gradients_are_those_of_float32_whatever_the_scale(precision: str, tolerance: float) -> None:
    """Clipped to a norm, they must have been divided by the scale before."""
    gradients = []
    for name in ("float32", precision):
        run = Run(steps=1, precision=name, dropout=0.0, factor=0.5)  # type: ignore[arg-type]
        run.go()
        gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]))
    difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert float(difference) <= tolerance
    assert (float(difference) > 0) == (precision != "float32"), "the narrow dtype was really used"


def test_tiny_gradients_survive_in_float16_by_the_scale_alone() -> None:
    """The loss is so small that its gradients vanish in float16 unless they are scaled."""
    kept = {}
    for scale in (65536.0, 1.0):
        run = Run(steps=1, precision="float16", dropout=0.0, factor=1e-8)
        run.state.scaler.load_state_dict({**run.state.scaler.state_dict(), "scale": scale})
        run.go()
        kept[scale] = float(run.model.blocks[0].up.weight.grad.norm())  # type: ignore[union-attr, operator]
    assert kept[65536.0] > 0.0 and kept[1.0] == 0.0


def test_only_float16_is_scaled() -> None:
    assert Precision("float16").scaler.get_scale() == 65536.0
    assert not Precision("bfloat16").scaler.is_enabled() and not Precision("float32").scaler.is_enabled()
