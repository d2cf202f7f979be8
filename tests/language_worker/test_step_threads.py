"""How many torch threads a CPU step runs on, and that nobody else's number changes."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.demo import MODEL_DIR
from kernels import machine
from language_worker import engine as engine_module
from language_worker import runner
from language_worker.engine import Engine
from language_worker.verification import choose
from tests.kernels.test_shared_steps import parts_taken_by_helpers
from tests.language_worker.helpers import SamplingParams, drive, make_engine, prompt, request
from tests.tiny_models import make_qwen2_5_vl
from tests.waiting import eventually

HIDDEN = 128
SAMPLING = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_of_steps(engine: Engine, prompt_length: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Threads inside the model, step by step: the prefill of one prompt, then its decode steps."""
    seen: list[int] = []
    forward = engine.runner.model.forward

    def recording(*arguments: object) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return forward(*arguments)

    monkeypatch.setattr(engine.runner.model, "forward", recording)
    drive(engine, [request("a", prompt(prompt_length), SAMPLING)])
    return seen


@pytest.mark.usefixtures("two_threads")
def test_small_steps_run_on_one_thread_and_the_setting_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(make_qwen2_5_vl(tmp_path, hidden_size=HIDDEN))
    largest_small = runner.SERIAL_WORK // HIDDEN**2
    assert threads_of_steps(engine, largest_small + 1, monkeypatch) == [2, 1, 1]
    assert torch.get_num_threads() == 2
    assert threads_of_steps(engine, largest_small, monkeypatch)[0] == 1
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")  # which are put back: the engine sets its own
@pytest.mark.parametrize(
    ("num_threads", "num_cpus", "is_helped"), [(2, 2, True), (7, 2, True), (1, 2, False), (2, 1, False)]
)
def test_steps_in_one_call_are_shared_with_helpers(
    monkeypatch: pytest.MonkeyPatch, num_threads: int, num_cpus: int, is_helped: bool
) -> None:
    """As many as the settings say and the process may use, though torch's own operations run on one thread."""
    monkeypatch.setattr(runner, "num_usable_cpus", lambda: num_cpus)
    engine = make_engine(MODEL_DIR, num_threads=num_threads)
    sampling = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    names = itertools.count()

    def help_came() -> bool:
        before = parts_taken_by_helpers()
        results = drive(engine, [request(f"{next(names)}", prompt(5 + i), sampling) for i in range(16)])
        assert all(result.done for result in results.values())
        return parts_taken_by_helpers() > before

    if is_helped:
        eventually(help_came, "nobody helps")
    else:
        assert not help_came()


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 3), ("150000 100000", 2), ("50000 100000", 1), ("900000 100000", 3), ("?", 3)],
)
def test_cpus_that_a_quota_or_an_affinity_keeps_away_do_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, expected: int
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5})
    assert machine.num_usable_cpus() == expected
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "none")
    assert machine.num_usable_cpus() == 3


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("most", "expected"), [(engine_module.SMALL_LOGITS, 1), (0, 2)])
def test_few_logits_are_chosen_from_on_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, expected: int
) -> None:
    engine = make_engine(make_qwen2_5_vl(tmp_path, hidden_size=HIDDEN))
    seen: list[int] = []

    def recording(*arguments: Any, **named: Any) -> Any:
        seen.append(torch.get_num_threads())
        return choose(*arguments, **named)

    monkeypatch.setattr(engine_module, "choose", recording)
    monkeypatch.setattr(engine_module, "SMALL_LOGITS", most)
    drive(engine, [request("a", prompt(4), SAMPLING)])
    assert seen == [expected] * 3
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_the_setting_is_put_back_when_a_step_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(make_qwen2_5_vl(tmp_path, hidden_size=HIDDEN))

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(engine.runner.model, "forward", broken)
    assert drive(engine, [request("a", prompt(4), SAMPLING)])["a"].error is not None
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_large_step_takes_the_configured_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(make_qwen2_5_vl(tmp_path, hidden_size=HIDDEN), num_threads=1)
    torch.set_num_threads(2)  # another user of this process changed its mind after the engine was built
    assert threads_of_steps(engine, runner.SERIAL_WORK // HIDDEN**2 + 1, monkeypatch)[0] == 1
    assert torch.get_num_threads() == 2
