"""Weights as torch.save wrote them: what is read, what is refused, and that nothing in such a file runs."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from transfer.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from transfer.checkpoint_rules import Rule

STATE = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.float16)}
RULES = (Rule(pattern=r"a\.weight", target="a"), Rule(pattern="b", target="b"))


def _loaded(folder: Path) -> dict[str, torch.Tensor]:
    found = {"a": torch.zeros(3, 4), "b": torch.zeros(2)}
    report = load_checkpoint(Checkpoint.open(folder), found, RULES, fingerprint=True)
    assert report.num_tensors == 2 and report.fingerprint
    return found


@pytest.mark.parametrize("name", ["pytorch_model.bin", "full_sft_512.pth", "final_model.pt"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "optimizer": {"step": 3}, "epoch": 1},
        lambda state: {"model_state_dict": state, "config": {"model": {"hidden": 3}}},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    ],
)
def test_a_flat_map_of_tensors_is_found(name: str, wrap: Any, tmp_path: Path) -> None:
    torch.save(wrap(STATE), tmp_path / name)
    assert {key: (t.dtype, t.shape) for key, t in Checkpoint.open(tmp_path).tensors.items()} == {
        "a.weight": (torch.float32, (3, 4)),
        "b": (torch.float16, (2,)),
    }
    found = _loaded(tmp_path)
    assert torch.equal(found["a"], STATE["a.weight"]) and torch.equal(found["b"], torch.ones(2))


def test_safetensors_come_first_and_adapters_are_no_models(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "full_sft_512.pth")
    torch.save({"x.lora.A.weight": torch.ones(1)}, tmp_path / "lora_medical_512.pth")
    _loaded(tmp_path)
    torch.save(STATE, tmp_path / "rlhf_512.pth")
    with pytest.raises(CheckpointError, match=r"full_sft_512\.pth, rlhf_512\.pth: several files"):
        Checkpoint.open(tmp_path)
    save_file(STATE, tmp_path / "model.safetensors")
    _loaded(tmp_path)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 3}, {"model": {"a": "x"}}, {1: torch.ones(2)}, {}])
def test_anything_but_a_map_of_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth holds no flat map of tensors"):
        Checkpoint.open(tmp_path)


def test_two_names_that_differ_by_a_wrapper_only_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "module.a": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="holds a twice"):
        Checkpoint.open(tmp_path)


class _Runs:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("how", ["torch", "pickle", "cut", "text"])
def test_files_that_hold_anything_else_do_not_run_and_are_named(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "x.pth"
    if how == "torch":
        torch.save({"a": torch.ones(1), "evil": _Runs()}, file)
    elif how == "pickle":
        file.write_bytes(pickle.dumps({"evil": _Runs()}))
    elif how == "cut":
        torch.save(STATE, file)
        file.write_bytes(file.read_bytes()[:-200])
    else:
        file.write_text("no weights")
    with pytest.raises(CheckpointError, match=r"x\.pth cannot be read as a map of tensors"):
        Checkpoint.open(tmp_path)
    assert not (tmp_path / "ran").exists()
