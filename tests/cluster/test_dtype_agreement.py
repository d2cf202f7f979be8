"""Both halves of a checkpoint load it in one dtype, whatever the folder says of it: rows pass from one to the other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedding_worker import runner
from language_worker import engine_builder
from tests.tiny_models import make_qwen2_5_vl
from transfer.checkpoint import Checkpoint


def _rewrite_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["torch_dtype"]
    path.write_text(json.dumps(config | changes), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "torch.float16", "torch_dtype": "float32"}, torch.float16),
        ({"text_config": {"dtype": "float16"}}, torch.float16),
        ({"dtype": None, "text_config": {"torch_dtype": "float32"}}, torch.float32),
        ({"dtype": "float16", "text_config": {"torch_dtype": "float32"}}, torch.float16),
    ],
    ids=str,
)
def test_auto_is_one_dtype_for_both_halves(tmp_path: Path, changes: dict[str, Any], wanted: torch.dtype) -> None:
    _rewrite_config(make_qwen2_5_vl(tmp_path, torch_dtype="bfloat16"), changes)
    checkpoint = Checkpoint.open(tmp_path)
    assert engine_builder.resolve_dtype("auto", checkpoint) is wanted
    assert runner.resolve_dtype("auto", checkpoint) is wanted


def test_most_of_the_numbers_decide_and_not_most_of_the_tensors(tmp_path: Path) -> None:
    """As a checkpoint keeps its many small norms and biases in float32."""
    folder = make_qwen2_5_vl(tmp_path, torch_dtype="bfloat16")
    _rewrite_config(folder, {})
    path = folder / "model.safetensors"
    tensors = {
        name: tensor.float() if tensor.ndim == 1 else tensor.contiguous() for name, tensor in load_file(path).items()
    }
    assert sum(tensor.ndim == 1 for tensor in tensors.values()) > len(tensors) / 2
    save_file(tensors, path)
    checkpoint = Checkpoint.open(folder)
    assert (
        engine_builder.resolve_dtype("auto", checkpoint) is runner.resolve_dtype("auto", checkpoint) is torch.bfloat16
    )
