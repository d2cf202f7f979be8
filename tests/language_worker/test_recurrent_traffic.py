"""The random traffic of one engine and of two, with a model that keeps recurrent state: forks, preemption, chunks,
moves to another engine and failing steps leave every token the naive decoder's. Then planted bugs: each must be caught.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from language_worker import page_keeper, runner, state_slots
from language_worker.api import GenerateRequest
from language_worker.handover import exports
from language_worker.request import Sequence
from language_worker.sampling_params import SamplingParams
from tests.language_worker import test_handover, test_random_traffic
from tests.language_worker.helpers import drive
from tests.language_worker.toy import ToyRecurrent, naive
from tests.profiles import IS_SOAK
from tests.tiny_models import make_qwen2_5_vl


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make_qwen2_5_vl(tmp_path_factory.mktemp("toy"))
    test_handover.FOLDER[:] = test_random_traffic.FOLDER[:] = [folder]


class Traffic(test_random_traffic.Traffic):
    """One engine, whose steps fail now and then."""

    has_state = True
    failures: ClassVar[Counter[str]] = Counter()

    def _step(self) -> bool:
        self._model.fails_every = 3
        return super()._step()

    @property
    def _model(self) -> ToyRecurrent:
        model = self.engine.runner.model
        assert isinstance(model, ToyRecurrent)
        return model

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "engine"):
            self.failures["steps"] += self._model.num_failed


class Split(test_handover.Split):
    """A prefill and a decode engine."""

    has_state = True


def _settings(max_examples: int, **values: Any) -> settings:
    return settings(
        max_examples=max_examples,
        stateful_step_count=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        **values,
    )


def test_tokens_are_right_whatever_the_traffic() -> None:
    Traffic.reached.clear()
    Traffic.failures.clear()
    run_state_machine_as_test(Traffic, settings=_settings(2000 if IS_SOAK else 60))
    assert Traffic.failures["steps"] > 20 and Traffic.reached["num_preemptions_total"] > 5


def test_tokens_are_right_in_two_engines() -> None:
    Split.reached.clear()
    run_state_machine_as_test(Split, settings=_settings(2000 if IS_SOAK else 40))
    assert min(Split.reached[name] for name in ("answered", "kv_tokens_imported_total", "num_preemptions_total")) > 5


def test_a_state_that_is_made_again_costs_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a prompt whose logits are asked for were computed, in chunks that they fit."""
    engine = test_random_traffic.toy_engine(
        test_random_traffic.FOLDER[0], num_pages=32, has_state=True, prefix_cache=False
    )
    engine.scheduler.max_prompt_logits = 3
    model, counts = engine.runner.model, []
    assert isinstance(model, ToyRecurrent)
    original = model.forward

    def forward(inputs: Any, caches: Any) -> torch.Tensor:
        logits = original(inputs, caches)
        counts.append(len(logits))
        return logits

    monkeypatch.setattr(model, "forward", forward)
    chunked = SamplingParams(temperature=0.0, seed=1, max_tokens=4, ignore_eos=True, prompt_logprobs=1)
    asked = [
        GenerateRequest(request_id="a", prompt_token_ids=tuple(range(1, 18)), sampling=chunked),
        GenerateRequest(
            request_id="b", prompt_token_ids=(3, 4), sampling=replace(chunked, max_tokens=12, prompt_logprobs=None)
        ),
    ]
    found = []
    for fails_every in (0, 1):
        model.fails_every, model.num_failed = fails_every, 0
        results = drive(engine, asked)
        found.append([(results[r.request_id].tokens(), results[r.request_id].chunks[0].prompt_logprobs) for r in asked])
        assert [[tokens] for tokens, _ in found[-1]] == [naive(r, has_state=True) for r in asked]
        assert (model.num_failed > 4) == bool(fails_every)
    assert found[0] == found[1] and max(counts) <= 3 + 1


def test_forks_begin_with_what_a_slot_held_though_it_was_given_away() -> None:
    """To a new sequence, before the plan that starts them all; a fork of a fork that has not begun reads there, too."""
    runner_of_toy = test_random_traffic.toy_engine(
        test_random_traffic.FOLDER[0], num_pages=4, has_state=True, prefix_cache=False
    ).runner
    slots, store = state_slots.StateSlots(4), runner_of_toy.states
    assert store is not None
    donor, fork, other, fork_of_fork = (Sequence(key=(0, i), prompt=[1], max_len=4) for i in range(4))
    slots.start(donor)
    runner_of_toy.start_states(slots.take_starts())
    store.write(donor.state_slot, {"sum": torch.tensor([[5.0]])})
    slots.start(fork, donor=donor)
    slots.release(donor)
    slots.start(other)
    slots.start(fork_of_fork, donor=fork)
    runner_of_toy.start_states(slots.take_starts())
    held = [float(store.read(seq.state_slot)["sum"]) for seq in (fork, other, fork_of_fork)]
    assert held == [5.0, 0.0, 5.0] and other.state_slot == 0


# -- planted bugs -----------------------------------------------------------------------------------------------------


def _begin_with_what_is_there(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(runner.ModelRunner, "start_states", lambda self, starts: None)


def _lend_at_any_position(patch: pytest.MonkeyPatch) -> None:
    """A sibling that has gone on lends its state with the prompt."""

    def lent(self: Any, seq: Any, sibling: Any) -> Any:
        states, self.states = self.states, None
        try:
            found = original(self, seq, sibling)
        finally:
            self.states = states
        return replace(found, donor=sibling)

    original = page_keeper.PageKeeper._lent
    patch.setattr(page_keeper.PageKeeper, "_lent", lent)


def _go_on_after_a_failed_step(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(runner.ModelRunner, "restore_state", lambda self, seq, position, max_chunk: None)


def _leave_without_state(patch: pytest.MonkeyPatch) -> None:
    def advance(self: Any, kv_len: int, read: Any, read_state: Any) -> None:
        original(self, kv_len, read)

    original = exports.KVExport.advance
    patch.setattr(exports.KVExport, "advance", advance)


def _leave_with_the_state_of_the_whole_prompt(patch: pytest.MonkeyPatch) -> None:
    def advance(self: Any, kv_len: int, read: Any, read_state: Any) -> None:
        if kv_len > self._header.num_tokens:
            for name, tensor in read_state().items() if self._state else ():
                self._state[name].copy_(tensor)
        original(self, kv_len, read)

    original = exports.KVExport.advance
    patch.setattr(exports.KVExport, "advance", advance)


def _leak_a_slot(patch: pytest.MonkeyPatch) -> None:
    def release(self: Any, seq: Any) -> None:
        if len(seq.tokens) % 5:
            original(self, seq)

    original = state_slots.StateSlots.release
    patch.setattr(state_slots.StateSlots, "release", release)


PLANTED = (
    (_begin_with_what_is_there, Traffic),
    (_lend_at_any_position, Traffic),
    (_go_on_after_a_failed_step, Traffic),
    (_leave_without_state, Split),
    (_leave_with_the_state_of_the_whole_prompt, Split),
    (_leak_a_slot, Traffic),
)


@pytest.mark.parametrize(("plant", "machine"), PLANTED, ids=[plant.__name__.strip("_") for plant, _ in PLANTED])
def test_planted_bugs_are_found(
    plant: Callable[[pytest.MonkeyPatch], None], machine: type[RuleBasedStateMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(Exception):  # noqa: B017 - whatever it breaks first
        run_state_machine_as_test(machine, settings=_settings(300, phases=[Phase.generate]))
