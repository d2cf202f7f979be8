"""Preprocessing against transformers' PIL processor, bit for bit, and every refusal."""

from __future__ import annotations

import errno
import io
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as published_smart_resize

from embedding_worker import errors
from embedding_worker.preprocess import (
    ImageLimits,
    ImageSettings,
    content_key,
    inspect_image,
    prepare_image,
    smart_resize,
)
from tests.embedding_worker.images import (
    BAD,
    GOOD,
    exif_payload,
    header_only_png,
    png,
    png_chunk,
    raw_profile,
    with_chunk,
    xmp,
)

LIMITS = ImageLimits(max_bytes=1_000_000, max_pixels=1_000_000)
SMALL: dict[str, Any] = {"min_pixels": 56 * 56, "max_pixels": 28 * 28 * 20}


def _assert_as_published(media: bytes, config: dict[str, Any]) -> None:
    processor = Qwen2VLImageProcessorPil(**config)
    published = processor(images=[load_image(Image.open(io.BytesIO(media)))], return_tensors="pt")
    prepared = prepare_image(media, 0, ImageSettings.from_config(config), LIMITS)
    assert list(prepared.grid) == published["image_grid_thw"][0].tolist()
    assert torch.equal(prepared.patches, published["pixel_values"])
    assert inspect_image(media, 0, ImageSettings.from_config(config), LIMITS) == prepared.grid


@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_of_image_is_prepared_as_published(kind: str) -> None:
    _assert_as_published(GOOD[kind](), SMALL)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(width=st.integers(1, 180), height=st.integers(1, 180), low=st.sampled_from([1, 4, 9]), high=st.integers(9, 40))
def test_odd_sizes_are_prepared_as_published(width: int, height: int, low: int, high: int) -> None:
    _assert_as_published(png(width, height), {"min_pixels": 784 * low, "max_pixels": 784 * high})


def test_other_constants_are_honoured() -> None:
    config = {
        "patch_size": 8,
        "merge_size": 3,
        "temporal_patch_size": 1,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.6, 0.7],
        "rescale_factor": 0.01,
        "resample": 2,
        "size": {"shortest_edge": 24 * 24 * 4, "longest_edge": 24 * 24 * 30},
    }
    _assert_as_published(png(100, 61), config)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    factor=st.sampled_from([14, 24, 28, 32]),
    low=st.integers(1, 100_000),
    span=st.integers(0, 2_000_000),
)
def test_smart_resize_is_the_published_one(height: int, width: int, factor: int, low: int, span: int) -> None:
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(height, width, factor, low, low + span)
        return
    assert smart_resize(height, width, factor, low, low + span) == published_smart_resize(
        height, width, factor, low, low + span
    )


@pytest.mark.parametrize(("height", "width"), [(70, 70), (42, 126), (182, 98), (14, 70)])
def test_halves_round_to_even(height: int, width: int) -> None:
    assert smart_resize(height, width, 28, 1, 10**6) == published_smart_resize(height, width, 28, 1, 10**6)


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_are_refused_by_name_and_place(kind: str) -> None:
    make, code = BAD[kind]
    with pytest.raises(errors.ImageError) as caught:
        prepare_image(make(), 3, ImageSettings.from_config(SMALL), LIMITS)
    assert type(caught.value).__name__ == code
    assert caught.value.index == 3
    assert str(caught.value).startswith("image 3: ")
    for internal in ("<", " 0x", "BytesIO", "PIL", "Error"):  # what a library says of itself is no help to a client
        assert internal not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind, (_, code) in BAD.items() if code != "BadImage"])
def test_size_and_shape_are_refused_from_the_header(kind: str) -> None:
    make, code = BAD[kind]
    with pytest.raises(errors.ImageError) as caught:
        inspect_image(make(), 0, ImageSettings.from_config(SMALL), LIMITS)
    assert type(caught.value).__name__ == code


def test_refusing_a_bomb_takes_no_memory() -> None:
    bombs = [header_only_png(side, side) for side in (9_000, 20_000, 60_000)]
    limits = ImageLimits(max_bytes=1_000_000, max_pixels=80_000_000)
    tracemalloc.start()
    try:
        for bomb in bombs:
            with pytest.raises(errors.ImageTooLarge, match="at most 80000000 pixels"):
                prepare_image(bomb, 0, ImageSettings(), limits)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "chunk", [png_chunk(b"eXIf", exif_payload(6)), raw_profile(6), xmp(6)], ids=["exif", "raw profile", "xmp"]
)
@pytest.mark.parametrize("place", [b"IDAT", b"IEND"])
def test_a_png_says_how_to_turn_it_without_its_pixels(chunk: bytes, place: bytes) -> None:
    media = with_chunk(header_only_png(280, 140), chunk, place)  # whoever decodes it finds nothing
    assert inspect_image(media, 0, ImageSettings(), LIMITS) == (1, 20, 10)
    assert inspect_image(memoryview(header_only_png(280, 140)), 0, ImageSettings(), LIMITS) == (1, 10, 20)


def test_the_search_for_an_orientation_is_bounded() -> None:
    chunk = png_chunk(b"eXIf", exif_payload(6))
    few, many = (with_chunk(header_only_png(280, 140), png_chunk(b"tIME", b"") * n + chunk) for n in (1000, 70000))
    assert inspect_image(few, 0, ImageSettings(), LIMITS) == (1, 20, 10)
    assert inspect_image(many, 0, ImageSettings(), LIMITS) == (1, 10, 20)


@pytest.mark.parametrize(
    ("config", "low", "high"),
    [
        ({"min_pixels": 10, "max_pixels": 20}, 10, 20),
        ({"size": {"shortest_edge": 10, "longest_edge": 20}}, 10, 20),
        ({"size": {"min_pixels": 10, "max_pixels": 20}}, 10, 20),
        ({"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 10, "max_pixels": 20}, 10, 20),
        ({"size": {"shortest_edge": 10, "longest_edge": 20}, "min_pixels": None, "max_pixels": None}, 10, 20),
        ({}, 56 * 56, 28 * 28 * 1280),
    ],
)
def test_every_spelling_of_the_pixel_bounds(config: dict[str, Any], low: int, high: int) -> None:
    made = ImageSettings.from_config(config)
    assert (made.min_pixels, made.max_pixels) == (low, high)
    overridden = ImageSettings.from_config(config, min_pixels=5, max_pixels=6)
    assert (overridden.min_pixels, overridden.max_pixels) == (5, 6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_resize": False}, "do_resize=false"),
        ({"patch_size": 0}, "patch_size must be a positive integer"),
        ({"merge_size": "2"}, "merge_size must be a positive integer"),
        ({"min_pixels": 30, "max_pixels": 20}, "exceeds max_pixels"),
        ({"image_mean": [0.5]}, "must hold 3 numbers"),
        ({"image_std": [0.5, 0.5, 0.0]}, "must hold 3 numbers"),
    ],
)
def test_unusable_settings_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSettings.from_config(config)


def test_content_key_depends_on_everything_that_shapes_the_rows() -> None:
    base = ImageSettings()
    keys = {
        content_key(b"media", base, "model", "float32"),
        content_key(b"media.", base, "model", "float32"),
        content_key(b"media", ImageSettings(max_pixels=10_000), "model", "float32"),
        content_key(b"media", base, "model2", "float32"),
        content_key(b"media", base, "model", "bfloat16"),
        content_key(b"media", base, "mode", "lfloat32"),
    }
    assert len(keys) == 6
    assert content_key(memoryview(b"media"), base, "model", "float32") in keys


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_a_shortage_of_the_machine_is_not_the_image_s_fault(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    media = png(40, 40)
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(errors.OutOfResources, match="try again later"):
        prepare_image(media, 0, ImageSettings.from_config(SMALL), LIMITS)
