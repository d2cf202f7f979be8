"""Images of any shape through SigLIP 2 NaFlex and MiniMind-V's merging projector, against transformers' own classes."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from embedding_worker.config import EmbedConfig
from embedding_worker.errors import ImageAspect, UnsupportedModel
from embedding_worker.patch_budget import fitted_patches
from embedding_worker.preprocess import ImageLimits, PreparedImage, prepare_image
from embedding_worker.runner import VisionRunner
from tests.profiles import IS_SOAK
from tests.tiny_minimind_v import FOLDERS, NAFLEX_ROWS, image_rows, make_minimind_v
from tests.tiny_models import random_image

LIMITS = ImageLimits(max_bytes=10**8, max_pixels=10**8)
CONFIG = EmbedConfig(device="cpu", dtype="float32", num_threads=1)
SIDES = st.integers(1, 5000)


def _prepared(runner: VisionRunner, image: Image.Image) -> PreparedImage:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return prepare_image(stream.getvalue(), 0, runner.settings, LIMITS)


def _sizes(seed: int) -> dict[str, int]:
    """Of an encoder; whose grid of positions is smaller than images' or larger, of even or odd side."""
    chosen = random.Random(seed)
    return {
        "patch_size": chosen.choice([4, 8, 14]),
        "num_patches": chosen.choice([1, 4, 9, 16, 64, 100, 256]),
        "num_hidden_layers": chosen.choice([1, 2, 3]),
        "num_attention_heads": chosen.choice([1, 2, 4]),
    }


def _images(seed: int) -> list[Image.Image]:
    """As large as the patches, tiny, lying, standing, a line, and any."""
    chosen = random.Random(seed)
    shapes = [(64, 64), (1, 1), (150, 31), (17, 93), (190, 1), (3, 333)]
    shapes += [(chosen.randint(1, 300), chosen.randint(1, 300)) for _ in range(2)]
    chosen.shuffle(shapes)
    return [random_image(*shape, seed=seed) for shape in shapes]


@pytest.mark.parametrize("seed", range(40 if IS_SOAK else 12))
def test_rows_of_images_of_any_shape_equal_the_reference(seed: int, tmp_path: Path) -> None:
    made = make_minimind_v(tmp_path, "naflex", seed=seed, own_encoder=seed % 2 > 0, sizes=_sizes(seed))
    runner, images = VisionRunner.load(tmp_path, CONFIG), _images(seed)
    prepared = [_prepared(runner, image) for image in images]
    together = runner.encode(prepared)
    expected = image_rows(made, images)
    assert expected.shape[1] == NAFLEX_ROWS
    for image, rows, alone in zip(prepared, together, expected, strict=True):
        assert runner.num_rows(image.grid) == len(rows) == NAFLEX_ROWS
        assert (rows - alone).abs().max().item() < 1e-4
    (first,) = runner.encode(prepared[:1])
    assert (first - expected[0]).abs().max().item() < 1e-4


def test_the_published_numbers_are_meant_where_none_is_given(tmp_path: Path) -> None:
    made = make_minimind_v(tmp_path, "naflex", as_published=True)
    runner, images = VisionRunner.load(tmp_path, CONFIG), [random_image(300, 200), random_image(256, 256)]
    prepared = [_prepared(runner, image) for image in images]
    assert [image.grid for image in prepared] == [(1, 13, 19), (1, 16, 16)]
    rows = torch.stack(runner.encode(prepared))
    assert rows.shape[1] == 64 and (rows - image_rows(made, images)).abs().max().item() < 1e-4


def test_patches_are_the_reference_s_bit_for_bit(tmp_path: Path) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    made = make_minimind_v(tmp_path, "naflex")
    runner, images = VisionRunner.load(tmp_path, CONFIG), [*_images(0), random_image(50, 70).convert("L")]
    plain = {name: value for name, value in made["preprocessor"].items() if value is not None}
    reference = Siglip2ImageProcessorPil(**plain)
    for image in images:
        wanted = reference(images=image.convert("RGB"), return_tensors="pt")
        got = _prepared(runner, image)
        assert got.grid == (1, *wanted["spatial_shapes"][0].tolist())
        by_pixel = got.patches.view(-1, 3, 8, 8).permute(0, 2, 3, 1).flatten(1)
        assert torch.equal(by_pixel, wanted["pixel_values"][0][: len(by_pixel)])
        assert int(wanted["pixel_attention_mask"].sum()) == len(by_pixel)


@settings(max_examples=2000 if IS_SOAK else 150, deadline=None, derandomize=True)
@given(height=SIDES, width=SIDES, patch_size=st.sampled_from([8, 14, 16]), max_patches=st.sampled_from([1, 64, 256]))
@example(height=1, width=1, patch_size=16, max_patches=256)
@example(height=256, width=256, patch_size=16, max_patches=256)
@example(height=5000, width=25, patch_size=16, max_patches=256)
def test_sizes_are_the_published_ones(height: int, width: int, patch_size: int, max_patches: int) -> None:
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    rows, columns = fitted_patches(height, width, patch_size, max_patches)
    wanted = get_image_size_for_max_num_patches(height, width, patch_size, max_patches)
    assert (rows * patch_size, columns * patch_size) == wanted
    assert rows * columns <= max_patches


def test_what_does_not_fit_the_encoder_is_refused(tmp_path: Path) -> None:
    make_minimind_v(tmp_path, "naflex")
    runner = VisionRunner.load(tmp_path, CONFIG)
    with pytest.raises(ImageAspect, match="aspect ratio of 201"):
        _prepared(runner, random_image(201, 1))
    patches = torch.zeros(66, 192)
    for grids in ([(1, 8, 8)], [(1, 66, 1)], [(1, 8, 8), (1, 2, 2)], [(1, 6, 11)]):
        with pytest.raises(ValueError, match=r"patches are \(66, 192\)"):
            runner._model.encode(patches, grids)


@pytest.mark.parametrize(
    ("file", "entry", "message"),
    [
        ("preprocessor_config.json", {"max_num_patches": 256}, "max_num_patches is 256; the model takes 64"),
        ("preprocessor_config.json", {"max_num_patches": None}, "max_num_patches is 256; the model takes 64"),
        ("preprocessor_config.json", {"patch_size": 16}, "patch_size is 16; the model takes 8"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize=false is not supported"),
        ("config.json", {"num_patches": 24}, "num_patches 24 and patch_size 8; a square number"),
        ("config.json", {"num_patches": "x"}, "a square number"),
        ("config.json", {"patch_size": [8, 8]}, r"patch_size \[8, 8\]"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(
    file: str, entry: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make_minimind_v(tmp_path, "naflex")
    path = tmp_path / FOLDERS["naflex"] / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
    with pytest.raises(UnsupportedModel, match=message):
        VisionRunner.check(tmp_path, CONFIG)
