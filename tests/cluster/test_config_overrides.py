"""Entries that a user sets against config.json count wherever it is read: in both halves, and in front of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import LLM
from cluster.config import build_config, load_config
from cluster.errors import ConfigError
from cluster.model_info import ModelInfo
from embedding_worker.config import EmbedConfig
from embedding_worker.runner import VisionRunner
from tests.tiny_models import make_qwen2_5_vl, random_image
from transfer.checkpoint import CheckpointError

IMAGE = random_image(140, 84, seed=3)
QUESTION = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "What is it?"}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2_5_vl(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def overrides(folder: Path) -> dict[str, Any]:
    """One entry for the vision half, whose blocks then all attend to the whole frame, and one for the language half."""
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"]
    assert vision["fullatt_block_indexes"] != list(range(vision["depth"]))
    return {"vision_config": {**vision, "fullatt_block_indexes": list(range(vision["depth"]))}, "rms_norm_eps": 1e-2}


def _logits(folder: Path, **sections: dict[str, Any]) -> torch.Tensor:
    """sections: as in a file."""
    model = {"path": str(folder), "dtype": "float32", "device": "cpu", **sections.pop("model", {})}
    with LLM.from_config(build_config({"model": model, **sections}).resolve()) as llm:
        return llm.logits(QUESTION)


@pytest.fixture(scope="module")
def expected(folder: Path, overrides: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """What a folder says whose config.json was edited."""
    edited = tmp_path_factory.mktemp("edited") / "tiny"
    shutil.copytree(folder, edited)
    config = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps(config | overrides))
    logits = _logits(edited)
    for name in overrides:  # each alone makes a difference, so that neither can be lost unnoticed
        (edited / "config.json").write_text(json.dumps(config | {name: overrides[name]}))
        assert not torch.equal(_logits(edited), logits), f"the other one than {name} changes nothing"
    return logits


@pytest.mark.parametrize("section", ["model", "embedding", "language"])
def test_they_reach_both_halves_wherever_they_are_set(
    section: str, folder: Path, overrides: dict[str, Any], expected: torch.Tensor
) -> None:
    assert torch.equal(_logits(folder, **{section: {"config_overrides": overrides}}), expected)


def test_a_script_gives_them_by_their_bare_name(
    folder: Path, overrides: dict[str, Any], expected: torch.Tensor
) -> None:
    with LLM(model=str(folder), dtype="float32", device="cpu", config_overrides=overrides) as llm:
        assert torch.equal(llm.logits(QUESTION), expected)


def test_one_half_in_one_section_and_the_other_in_another(
    folder: Path, overrides: dict[str, Any], expected: torch.Tensor
) -> None:
    sections = {"embedding": "vision_config", "language": "rms_norm_eps"}
    settings = {section: {"config_overrides": {name: overrides[name]}} for section, name in sections.items()}
    assert torch.equal(_logits(folder, **settings), expected)


def test_sections_that_contradict_each_other_are_refused(folder: Path) -> None:
    tree: dict[str, Any] = {
        "model": {"path": str(folder), "config_overrides": {"rms_norm_eps": 1e-6}},
        "language": {"config_overrides": {"rms_norm_eps": 1e-5}},
    }
    with pytest.raises(ConfigError, match=r"language\.config_overrides\.rms_norm_eps is 1e-05, and another section"):
        build_config(tree).resolve()
    for section in ("model", "language"):  # which are no contradiction, whatever a float says of itself
        tree[section] = {**tree[section], "config_overrides": {"rope_theta": float("nan")}}
    assert build_config(tree).config_overrides().keys() == {"rope_theta"}
    with pytest.raises(CheckpointError, match="rope_theta = nan; a positive number is needed"):
        ModelInfo.load(folder, build_config(tree).config_overrides())
    tree["model"]["config_overrides"] = {"rms_norm_eps": 1e-6}
    tree["language"] = {"config_overrides": {"rms_norm_eps": 1e-6, "rope_theta": 5.0}}
    config = build_config(tree).resolve()
    assert config.resolve() == config, "resolving again changes nothing"
    for part in (config.model, config.embedding, config.language):
        assert part.config_overrides == {"rms_norm_eps": 1e-6, "rope_theta": 5.0}


def test_the_front_reads_them_too(folder: Path, tmp_path: Path) -> None:
    assert ModelInfo.load(folder, {"image_token_id": 7}).image_token_id == 7
    (tmp_path / "tandem.yaml").write_text("model: {config_overrides: {image_token_id: 7}}\n")
    assert load_config(tmp_path / "tandem.yaml").config_overrides() == {"image_token_id": 7}


@pytest.mark.parametrize(
    ("vision", "words"),
    [
        ({"depth": "two"}, "config.json's vision_config has depth = 'two'; a positive integer is needed"),
        ("none", "config.json has vision_config = 'none'; an object is needed"),
    ],
)
def test_what_the_vision_half_cannot_be_is_refused_by_name(folder: Path, vision: Any, words: str) -> None:
    for read in (VisionRunner.load, VisionRunner.check):
        with pytest.raises(CheckpointError, match=re.escape(words)):
            read(folder, EmbedConfig(device="cpu", config_overrides={"vision_config": vision}))
