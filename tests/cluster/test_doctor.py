"""`tandem doctor` on model folders that lack something: it names it, without loading a weight."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.__main__ import main
from cluster.cli import doctor
from cluster.cli.doctor import Finding, findings
from cluster.config import build_config
from cluster.demo import MODEL_DIR
from tests.tiny_text_models import make_text_model

WEIGHTS = "model.safetensors"


def _about(folder: Path) -> dict[str, Finding]:
    """The findings about a model folder by the part of it."""
    config = build_config({"model": {"path": str(folder)}, "gateway": {"port": 0}})
    found = [f for f in findings(config) if f.what.startswith(f"{folder}: ")]
    return {f.what.removeprefix(f"{folder}: ").split(":")[0]: f for f in found}


def _tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def _json(name: str, **values: object) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return damage


UP, QKV = "model.layers.1.mlp.up_proj.weight", "visual.blocks.2.attn.qkv.bias"
DAMAGE: dict[
    str, tuple[Callable[[Path], object], dict[str, str]]
] = {  # name -> what is done, what is said of which part
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), {"weights": "safetensors are preferred"}),
    "cut weights": (lambda folder: (folder / WEIGHTS).write_bytes(b"0" * 100), {"weights": "damaged or cut short"}),
    "text tensor missing": (_tensors(lambda t: t.pop(UP)), {"language half": f"missing: {UP}"}),
    "vision tensor missing": (_tensors(lambda t: t.pop(QKV)), {"vision half": f"missing: {QKV}"}),
    "tensor too many": (
        _tensors(lambda t: t.update({"extra.bias": torch.zeros(2)})),
        {"language half": "unexpected: extra.bias", "vision half": "unexpected: extra.bias"},
    ),
    "other sizes": (_json("config.json", intermediate_size=77), {"language half": "wrong shape: model.layers.0.mlp"}),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        {"tokenizer and chat template": "has no tokenizer.json"},
    ),
    "no preprocessor": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        {"vision half": "preprocessor_config.json is missing"},
    ),
    "another preprocessor": (
        _json("preprocessor_config.json", patch_size=16),
        {"vision half": "patches of 1536 numbers"},
    ),
    "another architecture": (
        _json("config.json", architectures=["FalconForCausalLM"]),
        {"language half": "FalconForCausalLM", "vision half": "FalconForCausalLM"},
    ),
}


def test_a_whole_folder_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfer.checkpoint.Checkpoint.stream", lambda *_: pytest.fail("weights were read"))
    about = _about(MODEL_DIR)
    assert list(about) == ["weights", "tokenizer and chat template", "language half", "vision half"]
    assert {finding.verdict for finding in about.values()} == {"ok"}
    counts = [int(about[half].what.split(": ")[2].split()[0]) for half in ("language half", "vision half")]
    assert sum(counts) == len(load_file(MODEL_DIR / WEIGHTS))


def test_a_text_only_model_needs_no_vision_half(tmp_path: Path) -> None:
    folder = make_text_model(tmp_path, "qwen3")
    about = _about(folder)
    assert {finding.verdict for finding in about.values()} == {"ok"}
    assert "text only" in about["vision half"].what
    assert f": {len(load_file(folder / WEIGHTS))} tensors" in about["language half"].what


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_wrong_is_named_and_advice_given(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIR, folder)
    damage, expected = DAMAGE[name]
    damage(folder)
    bad = {part: finding for part, finding in _about(folder).items() if finding.verdict == "bad"}
    assert bad.keys() == expected.keys()
    for part, text in expected.items():
        assert text in bad[part].what and bad[part].advice


SETTINGS: dict[str, tuple[str, str]] = {  # name -> the language section of a configuration, what is said of it
    "an override that contradicts the weights": ("config_overrides: {intermediate_size: 77}", "wrong shape"),
    "an adapter that is not there": ("lora: nowhere", "no such file or folder"),
    "a dtype that is not the checkpoint's": ("dtype: float16", "embedding.dtype"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_model_is_checked_as_it_would_be_served(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section, said = SETTINGS[name]
    file = tmp_path / "tandem.yaml"
    file.write_text(f"model: {{path: {MODEL_DIR}}}\ngateway: {{port: 0}}\nlanguage: {{{section}}}\n")
    assert main(["doctor", "--config", str(file)]) == 1
    told = capsys.readouterr().out
    assert said in told and sum(line.strip().startswith("bad") for line in told.splitlines()) == 1, told


def test_flags_of_the_model_count_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--port", "0", "--lora", str(tmp_path)]) == 1
    assert "one lora_*.pth" in capsys.readouterr().out
    assert main(["doctor", "--port", "0", "--quantization", "int8"]) == 0


def test_every_required_package_is_looked_at_and_only_those(monkeypatch: pytest.MonkeyPatch) -> None:
    required = ["torch>=2", "nonsense-that-nobody-has", "ray[default]<1", 'triton>=3; extra == "gpu"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: required)
    found = {finding.what.split()[0]: finding for finding in doctor._packages()}
    assert {name: finding.verdict for name, finding in found.items()} == {
        "torch": "ok",
        "nonsense-that-nobody-has": "bad",
        "ray": "bad",
    }
    assert found["ray"].what.endswith(", but <1 is required") and "pip install" in found["ray"].advice


def test_the_real_requirements_are_met() -> None:
    found = list(doctor._packages())
    assert len(found) > 10 and {finding.verdict for finding in found} == {"ok"}


def test_a_temporary_folder_too_deep_for_sockets_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._temporary_folder().verdict == "ok"
    monkeypatch.setattr(doctor.tempfile, "tempdir", str(tmp_path / ("deep" * 30)))
    finding = doctor._temporary_folder()
    assert finding.verdict == "bad" and "too long" in finding.what and "TMPDIR" in finding.advice
