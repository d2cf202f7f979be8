"""How many torch threads a CPU step runs on, and that nobody else's number changes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from language_worker import runner
from language_worker.engine import Engine
from tests.language_worker.helpers import SamplingParams, drive, make_engine, prompt, request
from tests.tiny_models import make_qwen2_5_vl

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
