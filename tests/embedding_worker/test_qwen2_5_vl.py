"""The vision tower against transformers, in float32, and its invariances."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from embedding_worker.config import EmbedConfig
from embedding_worker.errors import EmbedConfigError, UnsupportedModel
from embedding_worker.models.qwen2_5_vl import frame_layout
from embedding_worker.preprocess import ImageLimits, PreparedImage, prepare_image
from embedding_worker.runner import VisionRunner
from tests.embedding_worker.images import png
from tests.tiny_models import QWEN2_5_VL_CONFIGS, make_qwen2_5_vl, reference
from transfer.checkpoint import Checkpoint, CheckpointError

LIMITS = ImageLimits(max_bytes=10_000_000, max_pixels=10_000_000)
SIZES = ((101, 67), (57, 140), (300, 90), (28, 28), (1, 1), (169, 168), (33, 500))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _prepare(runner: VisionRunner, sizes: tuple[tuple[int, int], ...], seed: int = 0) -> list[PreparedImage]:
    media = [png(width, height, seed=seed + i) for i, (width, height) in enumerate(sizes)]
    return [prepare_image(medium, i, runner.settings, LIMITS) for i, medium in enumerate(media)]


def _load(folder: Path, **config: Any) -> VisionRunner:
    return VisionRunner.load(folder, EmbedConfig(device="cpu", **config))


@pytest.mark.parametrize("case", range(len(QWEN2_5_VL_CONFIGS)))
def test_features_equal_the_reference(tmp_path: Path, case: int) -> None:
    make_qwen2_5_vl(tmp_path, seed=case, **QWEN2_5_VL_CONFIGS[case])
    runner = _load(tmp_path)
    assert runner.dtype == torch.float32
    sizes = (*SIZES[case % 7 :], *SIZES[: case % 7])[:4]
    images = _prepare(runner, sizes, seed=case)
    with torch.inference_mode():
        expected = reference(tmp_path).model.visual(
            torch.cat([image.patches for image in images]), torch.tensor([image.grid for image in images])
        )
    actual = runner.encode(images)
    assert [rows.shape[0] for rows in actual] == [runner.num_rows(image.grid) for image in images]
    torch.testing.assert_close(torch.cat(actual), expected.pooler_output, rtol=0, atol=1e-4)
    assert float(expected.pooler_output.std()) > 0.2, "the tower must not be asleep"


def test_a_batch_equals_its_members_alone(tmp_path: Path) -> None:
    runner = _load(make_qwen2_5_vl(tmp_path, seed=3, vision_depth=4, fullatt_block_indexes=(1, 3)))
    images = _prepare(runner, (*SIZES, SIZES[0]))
    for image, rows in zip(images, runner.encode(images), strict=True):
        (alone,) = runner.encode([image])
        torch.testing.assert_close(rows, alone, rtol=0, atol=2e-5)
        assert rows.is_contiguous()


def test_bfloat16_stays_close_to_float32(tmp_path: Path) -> None:
    make_qwen2_5_vl(tmp_path, seed=4, torch_dtype="bfloat16")
    half, full = _load(tmp_path), _load(tmp_path, dtype="float32")
    assert (half.dtype, half.dtype_name, full.dtype) == (torch.bfloat16, "bfloat16", torch.float32)
    (image,) = _prepare(half, ((150, 100),))
    (rough,), (fine,) = half.encode([image]), full.encode([image])
    assert rough.dtype == torch.bfloat16
    assert float((rough.float() - fine).norm() / fine.norm()) < 0.03


def test_both_spellings_and_any_shards_give_the_same_model(tmp_path: Path) -> None:
    results, keys = [], set()
    for layout, shards in (("published", 1), ("nested", 1), ("nested", 3), ("published", 4)):
        folder = make_qwen2_5_vl(tmp_path / f"{layout}{shards}", seed=5, layout=layout, num_shards=shards)
        runner = _load(folder)
        results.append(runner.encode(_prepare(runner, ((101, 67),)))[0])
    assert all(torch.equal(results[0], other) for other in results[1:])
    keys = {_load(make_qwen2_5_vl(tmp_path / str(seed), seed=seed)).content_key(b"x") for seed in (5, 6)}
    assert len(keys) == 2, "other weights, other content keys"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    frames=st.integers(1, 3), rows=st.integers(1, 11), columns=st.integers(1, 11), window=st.integers(1, 5),
    merge=st.sampled_from([1, 2, 3]),
)  # fmt: skip
def test_layout_puts_every_window_together(frames: int, rows: int, columns: int, window: int, merge: int) -> None:
    layout = frame_layout((frames, rows * merge, columns * merge), merge, window)
    units = frames * rows * columns
    assert sorted(layout.order.tolist()) == list(range(units))
    assert layout.frame_lengths == (rows * columns * merge**2,) * frames
    expected = {
        (frame, row // window, column // window)
        for frame, row, column in itertools.product(range(frames), range(rows), range(columns))
    }
    seen, first = [], 0
    for length in layout.window_lengths:
        members = layout.order[first : first + length // merge**2].tolist()
        places = {(u // (rows * columns), u // columns % rows // window, u % columns // window) for u in members}
        assert len(places) == 1
        seen += places
        first += len(members)
    assert first == units
    assert len(seen) == len(set(seen)) == len(expected)
    for place, unit in enumerate(layout.order.tolist()):
        row, column = unit // columns % rows, unit % columns
        patches = layout.positions[place * merge**2 : (place + 1) * merge**2].tolist()
        assert patches == [[row * merge + i, column * merge + j] for i in range(merge) for j in range(merge)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "no vision half for LlamaForCausalLM"),
        ({"vision_config": None}, "no vision_config"),
        ({"vision_config.depth": None}, "needs integers for depth"),
        ({"vision_config.hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"vision_config.num_heads": 16}, "heads of a multiple of 4"),
        ({"vision_config.window_size": 7}, "smaller than one merged patch"),
        ({"vision_config.patch_size": 16}, "makes patches of 1176 numbers"),
        ({"torch_dtype": "int8"}, "dtype 'int8'"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    make_qwen2_5_vl(tmp_path, **({"patch_size": 16} if "vision_config.patch_size" in change else {}))
    _rewrite_config(tmp_path, change)
    if "vision_config.patch_size" in change:
        path = tmp_path / "preprocessor_config.json"
        path.write_text(path.read_text().replace('"patch_size": 16', '"patch_size": 14'))
    with pytest.raises(UnsupportedModel, match=message):
        _load(tmp_path)


@pytest.mark.parametrize("name", ["warp", "meta", "cuda:7"])
def test_a_device_that_is_not_here_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(EmbedConfigError, match=f"embedding.device: device '{name}'"):
        VisionRunner.load(make_qwen2_5_vl(tmp_path), EmbedConfig(device=name))


def test_a_config_that_does_not_fit_the_tensors_names_them(tmp_path: Path) -> None:
    make_qwen2_5_vl(tmp_path, vision_depth=2)
    _rewrite_config(tmp_path, {"vision_config.depth": 3, "vision_config.intermediate_size": 50})
    with pytest.raises(CheckpointError) as caught:
        _load(tmp_path)
    assert "missing: visual.blocks.2.attn.qkv.weight" in str(caught.value)
    assert "wrong shape: visual.blocks.1.mlp.down_proj.weight" in str(caught.value)
    assert len(caught.value.problems) == 12 + 2 * 5


def test_every_vision_key_is_needed_and_the_text_half_is_not(tmp_path: Path) -> None:
    make_qwen2_5_vl(tmp_path, vision_depth=1, num_shards=2)
    names = [name for name in Checkpoint.open(tmp_path).tensors if name.startswith("visual.")]
    tensors = {}
    for file in tmp_path.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    for name in names:
        save_file({key: value for key, value in tensors.items() if key != name}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError) as caught:
            _load(tmp_path)
        assert caught.value.problems == (f"missing: {name}",)
    save_file({name: tensors[name] for name in names}, tmp_path / "model.safetensors")
    _load(tmp_path)


def _rewrite_config(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    for path, value in change.items():
        *parents, last = path.split(".")
        target = config
        for parent in parents:
            target = target[parent]
        target[last] = value
    (folder / "config.json").write_text(json.dumps(config))
