"""The random traffic of one engine and of two, with a model that keeps recurrent state: forks, preemption, chunks,
moves to another engine and failing steps leave every token the naive decoder's. Then planted bugs: each must be caught.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from language_worker import page_keeper, runner, state_slots
from language_worker.handover import exports
from tests.language_worker import test_handover, test_random_traffic
from tests.language_worker.toy import ToyRecurrent
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

    @precondition(lambda self: self.requests)
    @rule(count=st.integers(1, 3))
    def step_fails(self, count: int) -> None:
        """The next step with several sequences does, when its states have gone on."""
        self._model.fails = 1
        for _ in range(count):
            self._step()

    @property
    def _model(self) -> ToyRecurrent:
        model = self.engine.runner.model
        assert isinstance(model, ToyRecurrent)
        return model

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.failures["steps"] += self._model.num_failed
        super().teardown()


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
    run_state_machine_as_test(Traffic, settings=_settings(2000 if IS_SOAK else 80))
    assert Traffic.failures["steps"] > 20 and Traffic.reached["num_preemptions_total"] > 20


def test_tokens_are_right_in_two_engines() -> None:
    Split.reached.clear()
    run_state_machine_as_test(Split, settings=_settings(2000 if IS_SOAK else 50))
    assert min(Split.reached[name] for name in ("answered", "kv_tokens_imported_total", "num_preemptions_total")) > 20


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


def _copy_from_a_donor_that_has_not_begun(patch: pytest.MonkeyPatch) -> None:
    """States are started one by one, not all sources first."""

    def start_states(self: Any, starts: Any) -> None:
        for start in sorted(starts, key=lambda start: start.slot):
            original(self, [start])

    original = runner.ModelRunner.start_states
    patch.setattr(runner.ModelRunner, "start_states", start_states)


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
    (_copy_from_a_donor_that_has_not_begun, Traffic),
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
