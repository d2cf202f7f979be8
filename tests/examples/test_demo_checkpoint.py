"""The shipped demo checkpoint is a sound Qwen2.5-VL folder, and right about every shipped picture.

The judge is `transformers` alone: strict loading, its own preprocessing, tokenizer, template and greedy search.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from examples.demo_accuracy import Asked, evaluation_set
from examples.digits import KINDS, QUESTIONS, is_right
from tests.profiles import IS_SOAK

DEMO = Path(__file__).parents[2] / "cluster" / "demo"
MODEL = DEMO / "model"
IMAGES = DEMO / "images"
NUM_FRESH = 30 if IS_SOAK else 10

transformers = pytest.importorskip("transformers")


@dataclass(frozen=True, kw_only=True, slots=True)
class Oracle:
    """The reference implementation of everything between a picture and its answer."""

    model: Any
    dtype: torch.dtype
    tokenizer: Any
    processor: Any
    loading: dict[str, Any]

    def reply(self, image: Image.Image | None, question: str) -> str:
        content = [{"type": "image"}] if image is not None else []
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs: dict[str, torch.Tensor] = {}
        if image is not None:
            inputs = dict(self.processor(images=[image], return_tensors="pt"))
            inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
            pads = int(inputs["image_grid_thw"].prod()) // 4
            text = text.replace("<|image_pad|>", "<|image_pad|>" * pads)
        input_ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        is_media = input_ids == self.model.config.image_token_id
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            mm_token_type_ids=is_media.long(),
            max_new_tokens=24,
            **inputs,
        )
        return str(self.tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    model, loading = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        MODEL, dtype=request.param, output_loading_info=True
    )
    return Oracle(
        model=model.eval(),
        dtype=request.param,
        tokenizer=transformers.AutoTokenizer.from_pretrained(MODEL),
        processor=transformers.Qwen2VLImageProcessorPil.from_pretrained(MODEL),
        loading=loading,
    )


def shipped() -> list[dict[str, str]]:
    entries: list[dict[str, str]] = json.loads((IMAGES / "questions.json").read_text(encoding="utf-8"))
    return entries


def test_it_loads_strictly(oracle: Oracle) -> None:
    assert {name: keys for name, keys in oracle.loading.items() if keys} == {}


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.glob("*.safetensors")) <= 8_000_000


@pytest.mark.parametrize("entry", shipped(), ids=lambda entry: f"{entry['file']}-{entry['answer']}")
def test_it_is_right_about_the_shipped_pictures(oracle: Oracle, entry: dict[str, str]) -> None:
    with Image.open(IMAGES / entry["file"]) as image:
        reply = oracle.reply(image.convert("RGB"), entry["question"])
    assert is_right(reply, entry["answer"])


def test_the_shipped_questions_cover_every_kind_and_count() -> None:
    entries = shipped()
    assert len(entries) >= 6
    asked = {entry["question"] for entry in entries}
    assert all(asked & set(QUESTIONS[kind]) for kind in KINDS)
    sizes = {len(entry["answer"]) for entry in entries if entry["question"] in QUESTIONS["number"]}
    assert sizes == {1, 2, 3, 4, 5}


def test_it_reads_fresh_held_out_pictures(oracle: Oracle) -> None:
    asked = evaluation_set(NUM_FRESH)
    right = [item for item in asked if is_right(_reply_to(oracle, item), item.expected)]
    assert len(right) >= 0.9 * NUM_FRESH


def test_it_answers_without_a_picture_and_stops(oracle: Oracle) -> None:
    reply = oracle.reply(None, "Hello!")
    assert 0 < len(reply) < 80
    assert reply.endswith(".")


def _reply_to(oracle: Oracle, item: Asked) -> str:
    return oracle.reply(item.composition.image, item.question)
