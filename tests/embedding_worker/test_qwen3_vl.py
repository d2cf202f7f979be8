"""The vision tower of Qwen3-VL against transformers, in float32: its rows and every deepstack plane."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from embedding_worker.config import EmbedConfig
from embedding_worker.errors import UnsupportedModel
from embedding_worker.preprocess import ImageLimits, PreparedImage, prepare_image
from embedding_worker.runner import VisionRunner
from tests.embedding_worker.images import png
from tests.tiny_qwen3_vl import QWEN3_VL_CONFIGS, make_qwen3_vl, qwen3_vl_reference
from transfer.checkpoint import CheckpointError

LIMITS = ImageLimits(max_bytes=10_000_000, max_pixels=10_000_000)
SIZES = ((101, 67), (64, 160), (300, 90), (32, 32), (1, 1), (169, 168), (33, 500))


def _prepare(runner: VisionRunner, sizes: tuple[tuple[int, int], ...], seed: int = 0) -> list[PreparedImage]:
    media = [png(width, height, seed=seed + i) for i, (width, height) in enumerate(sizes)]
    return [prepare_image(medium, i, runner.settings, LIMITS) for i, medium in enumerate(media)]


def _load(folder: Path) -> VisionRunner:
    return VisionRunner.load(folder, EmbedConfig(device="cpu", dtype="float32"))


@pytest.mark.parametrize("case", range(len(QWEN3_VL_CONFIGS)))
def test_all_planes_equal_the_reference(tmp_path: Path, case: int) -> None:
    runner = _load(make_qwen3_vl(tmp_path, seed=case, **QWEN3_VL_CONFIGS[case]))
    images = _prepare(runner, (*SIZES[case % 7 :], *SIZES[: case % 7])[:4], seed=case)
    with torch.inference_mode():
        expected = qwen3_vl_reference(tmp_path).model.visual(
            torch.cat([image.patches for image in images]), torch.tensor([image.grid for image in images])
        )
    planes = torch.stack([expected.pooler_output, *expected.deepstack_features], dim=1)
    actual = torch.cat([rows.view(rows.shape[0], -1, runner.embedding_dim) for rows in runner.encode(images)])
    assert len(runner.planes) == planes.shape[1]
    torch.testing.assert_close(actual, planes, rtol=0, atol=1e-4)
    assert float(planes.std()) > 0.2, "the tower must not be asleep"


def test_a_batch_equals_its_members_alone_and_planes_lie_as_they_travel(tmp_path: Path) -> None:
    runner = _load(make_qwen3_vl(tmp_path, seed=3))
    images = _prepare(runner, (*SIZES, SIZES[0]))
    for image, rows in zip(images, runner.encode(images), strict=True):
        (alone,) = runner.encode([image])
        torch.testing.assert_close(rows, alone, rtol=0, atol=2e-5)
        assert rows.shape == (runner.num_rows(image.grid), 3, runner.embedding_dim)
        assert all(plane.is_contiguous() for plane in rows.unbind(1))


def test_every_vision_key_is_needed(tmp_path: Path) -> None:
    make_qwen3_vl(tmp_path, vision={"depth": 1, "deepstack_visual_indexes": [0]})
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if "visual" in name]:
        save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError) as caught:
            _load(tmp_path)
        assert caught.value.problems == (f"missing: {name}",)
    save_file({**tensors, "model.visual.more": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected: model\.visual\.more"):
        _load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": None}, "needs integers for depth"),
        ({"hidden_act": "silu"}, "hidden_act 'silu'"),
        ({"num_position_embeddings": 35}, "35 is no square"),
        ({"deepstack_visual_indexes": [0, 9]}, "different blocks of 4"),
        ({"num_heads": 16}, "heads of a multiple of 4"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    make_qwen3_vl(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=message):
        _load(tmp_path)
