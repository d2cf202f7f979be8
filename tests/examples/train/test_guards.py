"""A number that is not finite is traced to where it was planted, and the run goes back to weights that were good."""

from __future__ import annotations

import pickle
import statistics
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from examples.train.errors import NonFiniteError, ResumeError
from examples.train.guards import LOSS, NORM, LossSpikes, broken_gradient, locate
from tests.examples.train.toy import Block, Run, Toy, bits, weights

INF, NAN = float("inf"), float("nan")


def _in_a_module(name: str, value: float) -> Callable[[Toy], object]:
    """The output of one module holds one such number."""

    def plant(model: Toy) -> object:
        def spoil(_module: nn.Module, _given: object, output: Tensor) -> Tensor:
            spoilt = output.clone()
            spoilt.view(-1)[0] = value
            return spoilt

        return model.get_submodule(name).register_forward_hook(spoil)

    return plant


def _between_modules(model: Toy) -> object:
    """The root of a negative number, in a block and in none of its parts."""
    model.blocks[1].shift = -1e6  # type: ignore[assignment]
    return None


def _in_a_weight(model: Toy) -> object:
    with torch.no_grad():
        model.get_parameter("blocks.1.up.bias")[2] = INF
    return None


PLANTED = [
    (_in_a_module("embed", NAN), "embed", "output of embed (Embedding) holds 1 nan and 0 inf among 12 numbers"),
    (_in_a_module("blocks.0.down", INF), "blocks.0.down", "output of blocks.0.down (Linear) holds 0 nan and 1 inf"),
    (_in_a_module("blocks.1", NAN), "blocks.1", "output of blocks.1 (Block) holds 1 nan"),
    (_in_a_module("head", -INF), "head", "output of head (Linear) holds 0 nan and 1 inf among 22"),
    (_between_modules, "blocks.1", "blocks.1 (Block) hands 24 nan and 0 inf among 24 numbers to blocks.1.down"),
    (_in_a_weight, "blocks.1.up.bias", "the weight blocks.1.up.bias holds 0 nan and 1 inf among 12 numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("plant", "place", "words"), PLANTED)
def test_it_is_traced_to_where_it_was_planted(plant: Callable[[Toy], object], place: str, words: str) -> None:
    torch.manual_seed(0)
    model = Toy()
    plant(model)
    error = locate(model, lambda: model(torch.tensor([1, 2])), step=41)
    assert (error.place, error.step) == (place, 41)
    assert words in str(error) and str(error).startswith("step 41: ")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert sum(hooks) <= 1, "the hooks are gone"


def test_what_breaks_outside_of_every_module_is_said_to() -> None:
    model = Toy()
    assert locate(model, lambda: model(torch.tensor([1])).sum() * INF, step=0).place == LOSS
    block = Block()
    error = locate(block, lambda: block(torch.full((1, 6), NAN)), step=0)
    assert error.place == "the objective" and "the objective hands 6 nan" in str(error)


def test_a_gradient_is_traced_to_the_last_parameter_before_the_break() -> None:
    """The root's slope is infinite at zero: all before it breaks, nothing behind it."""
    model = Toy()
    x = model.blocks[1].up(model.blocks[0](model.embed(torch.tensor([3])))) * 0.0
    (model.head(model.blocks[1].down(x.sqrt())).sum()).backward()
    error = broken_gradient(model, 5)
    assert error.place == "blocks.1.up.bias"
    assert "gradient of blocks.1.up.bias holds 12 nan" in str(error) and "parameters before it" in str(error)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert broken_gradient(model, 5).place == NORM


def _spoil_at(run: Run, steps: set[int], place: str) -> None:
    """The output of a module holds a nan in the first forward pass of some steps, and when that pass is traced."""

    def spoil(_module: nn.Module, _given: object, output: Tensor) -> Tensor:
        return output * NAN if run.state.step in steps else output

    run.model.get_submodule(place).register_forward_hook(spoil)


def test_weights_optimizer_and_average_go_back_and_the_run_goes_on() -> None:
    other = Run(steps=12, every=3).go()
    run = Run(steps=12, every=3)
    _spoil_at(run, {7}, "blocks.0.up")
    seen: dict[int, object] = {}

    class Watching(type(run.heard)):  # type: ignore[misc]
        def figures(self, step: int, figures: dict[str, float]) -> None:
            super().figures(step, figures)
            if step in (6, 8):
                state = run.state.snapshot()["learned"]
                for group in state["optimizer"]["param_groups"]:
                    del group["lr"]  # set before every step
                seen[step] = bits(state)

    run.heard = Watching()
    run.go()
    assert seen[6] == seen[8], "step 7 of 0.. was taken back to the snapshot after step 6"
    (note,) = run.heard.notes
    assert "step 7: the output of blocks.0.up (Linear)" in note
    assert "Back to the weights of step 6, at 0.5 of the rate" in note
    assert [step for step, figures in run.heard.steps if not figures] == [8]
    assert run.state.step == 12 and run.state.num_rollbacks == 1
    rates = [group["lr"] for group in run.optimizer.param_groups]
    assert rates == [0.5 * group["lr"] for group in other.optimizer.param_groups]
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())


def test_when_going_back_does_not_help_it_ends_with_the_last_good_weights() -> None:
    good = Run(steps=30, every=3)
    good.trainer.steps = 6
    good.go()
    run = Run(steps=30, every=3, max_rollbacks=2)
    _spoil_at(run, set(range(7, 30)), "head")
    with pytest.raises(NonFiniteError, match=r"step 9: the output of head \(Linear\)") as caught:
        run.go()
    assert caught.value.place == "head"
    assert weights(run.model) == weights(good.model)
    assert weights(run.average.model) == weights(good.average.model)


def test_weights_that_an_update_broke_are_never_kept() -> None:
    run = Run(steps=6, every=3)
    step = run.optimizer.step

    def spoiling(*given: object) -> object:
        result = step(*given)  # type: ignore[arg-type]
        if run.state.step == 5:
            with torch.no_grad():
                run.model.head.bias[0] = NAN
        return result

    run.optimizer.step = spoiling  # type: ignore[method-assign, assignment]
    run.go()
    assert "the weight head.bias holds 1 nan" in run.heard.notes[0]
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0.1, 30.0), max_size=60), st.integers(1, 15), st.integers(1, 20))
def test_spikes_are_those_of_a_recount(losses: list[float], least: int, window: int) -> None:
    monitor = LossSpikes(window=window, least=least)
    for place, loss in enumerate(losses):
        before = losses[max(0, place - window) : place]
        is_jump = len(before) >= least and loss > 2 * statistics.median(before)
        wanted = pytest.approx(loss / statistics.median(before)) if is_jump else None
        assert monitor.observe(loss) == wanted


def test_a_spike_is_told_of() -> None:
    run = Run(steps=40, every=50)
    telling = run.trainer.objective
    share = type(telling).share

    class Jumping(type(telling)):  # type: ignore[misc]
        def share(self, batch: object, step: int, counts: object) -> object:
            found = share(self, batch, step, counts)  # type: ignore[arg-type]
            return type(found)(found.loss * (50.0 if step == 30 else 1.0), found.figures)

    run.trainer.objective = Jumping(model=telling.model, precision=telling.precision)  # type: ignore[attr-defined]
    run.go()
    (note,) = run.heard.notes
    assert note.startswith("step 30: the loss") and note.endswith("times the recent median")


@pytest.mark.parametrize("error", [NonFiniteError(3, "head", "it broke"), ResumeError("another run")])
def test_errors_survive_pickling(error: Exception) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and again.args == error.args
