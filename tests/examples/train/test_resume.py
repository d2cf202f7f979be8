"""A run that was stopped goes on as if it had not been, bit for bit; a file of another run is refused by name."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.train import checkpoint
from examples.train.errors import ResumeError
from tests.examples.train.toy import Run, Tokens, bits


class Stopped(BaseException):
    """As a signal does, in the middle of a step."""


def _stop_at(run: Run, step: int) -> None:
    draw = run.trainer.draw

    def stopping(at: int) -> Sequence[Tokens]:
        drawn = draw(at)
        if at == step:
            raise Stopped
        return drawn

    run.trainer.draw = stopping


def _broken_twice(run: Run) -> None:
    """Roll-backs before and after the stop are part of a run too."""

    def spoil(_module: nn.Module, _given: object, output: Tensor) -> Tensor:
        return output * float("nan") if run.state.step in (4, 10) else output

    run.model.blocks[1].register_forward_hook(spoil)


@pytest.mark.parametrize("stops", [[7], [3], [6, 7, 11], [2]])
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("is_broken", [False, True])
def test_it_equals_a_run_that_was_not_stopped(
    stops: list[int], precision: Any, is_broken: bool, tmp_path: Path
) -> None:
    settings = {"steps": 13, "every": 3, "precision": precision, "factor": 40.0 if precision == "float16" else 1.0}
    whole = Run(**settings, state_file=tmp_path / "whole.pt")
    if is_broken:
        _broken_twice(whole)
    whole.go()
    file = tmp_path / "folder" / "stopped.pt"
    for stop in [*stops, None]:
        run = Run(**settings, state_file=file)
        if file.exists():
            torch.manual_seed(99)  # a new process stands elsewhere
        if is_broken:
            _broken_twice(run)
        if stop is None:
            run.go()
        else:
            _stop_at(run, stop)
            with pytest.raises(Stopped):
                run.go()
    assert bits(run.state.snapshot()) == bits(whole.state.snapshot())
    kept = (stops[-1] // 3) * 3
    assert [step for step, _ in run.heard.steps] == list(range(kept + 1, 14))
    assert run.heard.steps == whole.heard.steps[kept:]
    assert (f"going on from step {kept}" in "".join(run.heard.notes)) == (kept > 0)
    if is_broken:
        assert whole.state.num_rollbacks == 2
    if precision == "float16":
        assert whole.state.scaler.get_scale() < 65536, "a step was left out"


def test_a_finished_run_comes_back_to_its_end(tmp_path: Path) -> None:
    first = Run(state_file=tmp_path / "state.pt").go()
    again = Run(state_file=tmp_path / "state.pt").go()
    assert again.heard.steps == []
    assert bits(again.state.snapshot()) == bits(first.state.snapshot())


def test_another_plan_is_refused_and_named(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    Run(state_file=file, plan={"steps": 12, "seed": 1, "rate": 0.5}).go()
    with pytest.raises(ResumeError, match=r"seed 1, not 2, precision 'float32', not 'bfloat16', rate 0\.5, not N"):
        Run(state_file=file, plan={"steps": 12, "seed": 2}, precision="bfloat16").go()


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_part_of_a_file_is_refused(size: int, tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    Run(state_file=file).go()
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ResumeError, match=r"state\.pt is no state of a training run, or only part of one"):
        Run(state_file=file).go()


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    torch.save({"model": {"head": torch.zeros(2)}}, file)
    with pytest.raises(ResumeError, match="no state of a training run in format 1"):
        Run(state_file=file).go()


def test_a_stop_while_the_file_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "state.pt"
    run = Run(steps=12, every=3, state_file=file)
    save = torch.save

    def cut(value: dict[str, Any], path: Path) -> None:
        save(value, path)
        if value["step"] == 9:
            path.write_bytes(path.read_bytes()[:700])
            raise Stopped

    monkeypatch.setattr(checkpoint.torch, "save", cut)
    with pytest.raises(Stopped):
        run.go()
    monkeypatch.undo()
    assert checkpoint.read_snapshot(file)["step"] == 6
    resumed = Run(steps=12, every=3, state_file=file).go()
    assert bits(resumed.state.snapshot()) == bits(Run(steps=12, every=3).go().state.snapshot())


def test_a_snapshot_is_left_alone_by_later_steps() -> None:
    run = Run(steps=12)
    first = run.state.snapshot()
    before = bits(first)
    run.go()
    assert bits(first) == before != bits(run.state.snapshot())


@pytest.mark.parametrize("kind", ["a whole model", "an archive"])
def test_what_torch_cannot_read_is_refused(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    if kind == "an archive":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", "a")
    else:
        torch.save(torch.nn.Linear(2, 2), file)
    with pytest.raises(ResumeError, match="no state of a training run"):
        Run(state_file=file).go()
