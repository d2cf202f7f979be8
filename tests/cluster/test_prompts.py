"""What a script may hand over as a prompt, and what becomes of it; with the shipped demo model's tokenizer."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

import cluster.demo
from cluster.errors import BadRequest, ChatTemplateError, InvalidImageUrl
from cluster.model_info import ModelInfo
from cluster.prompts import image_bytes, is_conversation, is_single_prompt, request_from_messages, request_from_prompt
from language_worker.sampling_params import SamplingParams

DEMO = Path(cluster.demo.__file__).parent
PARAMS = SamplingParams(max_tokens=3)
PLACED = "<|vision_start|><|image_pad|><|vision_end|>"
PNG = (DEMO / "images" / "two.png").read_bytes()


@pytest.fixture(scope="module")
def info() -> ModelInfo:
    return ModelInfo.load(DEMO / "model")


@pytest.fixture(scope="module")
def oracle() -> Any:
    return AutoTokenizer.from_pretrained(DEMO / "model")


@pytest.mark.parametrize(
    ("value", "is_single", "is_chat"),
    [
        ("text", True, False),
        ("", True, False),
        ([1, 2], True, False),
        ((1, 2), True, False),
        ({"prompt": "a"}, True, False),
        (b"bytes", True, False),
        ([], False, False),
        (["a", "b"], False, False),
        ([[1], [2]], False, False),
        ([True, False], False, False),
        ([{"prompt": "a"}], False, False),
        ([{"role": "user", "content": "a"}], False, True),
        ([[{"role": "user", "content": "a"}]], False, False),
    ],
)
def test_one_or_many(value: Any, is_single: bool, is_chat: bool) -> None:
    assert (is_single_prompt(value), is_conversation(value)) == (is_single, is_chat)


@pytest.mark.parametrize(
    "text", ["Hello, world 12!", f"{PLACED}What number is it?", "<|im_start|>user\nhi<|im_end|>\n"]
)
def test_text_is_tokenised_as_the_reference_does(info: ModelInfo, oracle: Any, text: str) -> None:
    images = [PNG] * text.count("<|image_pad|>")
    expected = tuple(oracle(text)["input_ids"])
    request = request_from_prompt(info, {"prompt": text, "images": images}, PARAMS)
    assert request.prompt_token_ids == expected and request.media == tuple(images)
    assert (request.sampling, request.return_logits) == (PARAMS, False)
    for ids in (list(expected), expected):
        again = request_from_prompt(
            info, {"prompt_token_ids": ids, "images": tuple(images)}, PARAMS, return_logits=True
        )
        assert (again.prompt_token_ids, again.return_logits) == (expected, True)
        assert again.request_id != request.request_id
    if not images:
        assert request_from_prompt(info, text, PARAMS).prompt_token_ids == expected
        assert request_from_prompt(info, list(expected), PARAMS).prompt_token_ids == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (7, "not int"),
        (None, "not NoneType"),
        (b"abc", "not bytes"),
        ([1, "a"], "not list"),
        ([1.0], "not list"),
        ([True], "not list"),
        ({}, "has one of `prompt` and `prompt_token_ids`"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "has one of"),
        ({"prompt": "a", "image": b"x"}, "has one of"),
        ({"prompt": b"a"}, "not bytes"),
        ({"prompt": "a", "images": b"png"}, "`images` is a list of images, not bytes"),
        ({"prompt": "a", "images": "cat.png"}, "`images` is a list of images, not str"),
        ({"prompt": "a", "images": None}, "`images` is a list of images, not NoneType"),
        ({"prompt": "a", "images": Image.new("RGB", (8, 8))}, "`images` is a list of images, not Image"),
        ({"prompt": "a", "images": [b"x"]}, "0 image placeholders and 1 images"),
        ({"prompt": PLACED}, "1 image placeholders and 0 images"),
        (PLACED, "1 image placeholders and 0 images"),
        ({"prompt": PLACED * 2, "images": [b"x"]}, "2 image placeholders and 1 images"),
        ({"prompt": PLACED, "images": [3]}, "an image is a PIL image, bytes, a path or a data URL, not int"),
    ],
)
def test_what_is_no_prompt_is_refused(info: ModelInfo, prompt: Any, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        request_from_prompt(info, prompt, PARAMS)


def test_every_form_of_an_image_gives_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(PNG)
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    for form in (PNG, bytearray(PNG), memoryview(PNG), path, str(path), url, {"url": url}, {"url": str(path)}):
        assert image_bytes(form) == PNG, type(form)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I", "I;16", "CMYK", "YCbCr", "HSV", "LAB", "F"])
def test_pil_images_of_every_mode_arrive_with_the_pixels_that_pil_makes_of_them(mode: str) -> None:
    pixels = np.random.default_rng(3).integers(0, 255, (9, 7, 3), np.uint8)
    image = Image.fromarray(pixels, "RGB")
    image = Image.new(mode, image.size, 99) if mode in ("LAB", "I;16") else image.convert(mode)
    with Image.open(io.BytesIO(image_bytes(image))) as arrived:
        assert arrived.size == (7, 9)
        if mode in ("RGB", "RGBA", "L", "LA", "P", "1"):
            assert np.array_equal(np.asarray(arrived.convert("RGBA")), np.asarray(image.convert("RGBA")))
        elif mode != "I;16":
            assert np.array_equal(np.asarray(arrived), np.asarray(image.convert("RGB")))


def test_images_that_are_not_there_or_malformed() -> None:
    with pytest.raises(BadRequest, match=r"cannot read the image no such file\.png: No such file"):
        image_bytes("no such file.png")
    with pytest.raises(InvalidImageUrl):
        image_bytes("data:image/png;base64,@@@")
    with pytest.raises(BadRequest, match=r"cannot read the image .*null"):
        image_bytes("no\0file.png")
    with pytest.raises(BadRequest, match="cannot read the image aaaa") as caught:  # base64 that is no data URL, say
        image_bytes("a" * 100_000)
    assert len(str(caught.value)) < 300


def test_pil_images_that_cannot_be_read() -> None:
    closed = Image.new("RGB", (2, 2))
    closed.close()
    cut_short = Image.open(io.BytesIO(PNG[: len(PNG) // 2]))
    for image in (Image.new("RGB", (0, 5)), closed, cut_short):
        with pytest.raises(BadRequest, match=r"cannot read an image of size \("):
            image_bytes(image)


def test_a_conversation_is_rendered_as_the_reference_does(info: ModelInfo, oracle: Any) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": PNG}, {"type": "text", "text": "What number?"}]},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
    ]
    request = request_from_messages(info, messages, PARAMS)
    text = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert request.prompt_token_ids == tuple(oracle(text)["input_ids"])
    assert request.media == (PNG,)


@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_null_content_is_as_no_content_and_only_calls_do_without(info: ModelInfo, content: dict[str, Any]) -> None:
    for role in ("system", "user", "assistant", "tool"):
        with pytest.raises(BadRequest, match=rf"messages\[1\]\.content is required in a {role} message"):
            request_from_messages(info, [{"role": "user", "content": "a"}, {"role": role, **content}], PARAMS)
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call], **content}]
    plain = [messages[0], {**messages[1], "content": ""}]
    wanted = request_from_messages(info, plain, PARAMS).prompt_token_ids
    assert request_from_messages(info, messages, PARAMS).prompt_token_ids == wanted


def test_images_of_a_conversation_come_in_prompt_order(info: ModelInfo) -> None:
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": b"1"}]},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "image", "image": b"3"}],
        },
    ]
    assert request_from_messages(info, messages, PARAMS).media == (b"1", PNG, b"3")


def test_special_tokens_in_a_user_s_message_stay_text(info: ModelInfo) -> None:
    request = request_from_messages(info, [{"role": "user", "content": f"{PLACED}<|im_end|>"}], PARAMS)
    assert info.image_token_id not in request.prompt_token_ids
    assert request.media == ()


def test_a_model_without_a_chat_template(info: ModelInfo) -> None:
    bare = ModelInfo(tokenizer=info.tokenizer, chat_template=None, image_token_id=None)
    with pytest.raises(ChatTemplateError, match=r"use generate\(\)"):
        request_from_messages(bare, [{"role": "user", "content": "a"}], PARAMS)
    with pytest.raises(BadRequest, match="0 image placeholders and 1 images"):
        request_from_prompt(bare, {"prompt": PLACED, "images": [PNG]}, PARAMS)
