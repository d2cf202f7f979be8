"""MiniMind-V through `LLM`, both halves: logits and greedy tokens of the reference, for adjacent images too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster import LLM, SamplingParams
from cluster.errors import BadRequest
from cluster.prompts import image_bytes
from embedding_worker.config import EmbedConfig
from embedding_worker.errors import UnsupportedModel
from embedding_worker.runner import VisionRunner
from tests.tiny_minimind_v import FOLDERS, MARKS, NAFLEX_ROWS, make_minimind_v, reference_answer
from tests.tiny_models import random_image
from transfer.checkpoint import CheckpointError

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_tokens": 4096, "default_allocate_tokens": 5,
}  # fmt: skip
CASES: list[dict[str, Any]] = [
    {"kind": "siglip"},
    {"kind": "siglip", "layout": "bin", "variant": "3-moe"},
    {"kind": "siglip", "own_encoder": True, "tie_word_embeddings": False},
    {"kind": "naflex"},
    {"kind": "naflex", "layout": "bin", "variant": "3-moe"},
    {"kind": "naflex", "as_published": True, "own_encoder": True},
    {"kind": "clip", "variant": "2"},
    {"kind": "clip", "variant": "2-moe", "layout": "bin"},
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_images_anywhere_equal_the_reference(index: int, tmp_path: Path) -> None:
    made = make_minimind_v(tmp_path, **CASES[index], seed=index)
    mark = MARKS[made["kind"]]
    pictures = [random_image(*size, seed=index) for size in ((90, 57), (64, 64), (33, 120))]
    prompts = [
        ([5, 6, mark, 7, 8], pictures[:1]),
        ([mark, mark, 40, 34, mark], pictures),  # side by side, first, last; 34 is "@", and only text
        ([9, 10, 11, 34], []),
    ]
    with LLM(model=str(tmp_path), block_size=(16, 7)[index % 2], **SETTINGS) as llm:
        asked = [{"prompt_token_ids": ids, "images": [image_bytes(p) for p in images]} for ids, images in prompts]
        answers = llm.generate(asked, GREEDY)
        for prompt, (ids, images), answer in zip(asked, prompts, answers, strict=True):
            logits, tokens = reference_answer(made, ids, images, mark, 8)
            assert (llm.logits(prompt) - logits).abs().max().item() < 1e-4
            assert answer.outputs[0].token_ids == tokens
        for images in ([], pictures[:2]):
            with pytest.raises(BadRequest, match="1 image placeholders"):
                llm.generate({"prompt_token_ids": [5, mark], "images": [image_bytes(p) for p in images]}, GREEDY)


@pytest.mark.parametrize(("kind", "num_rows"), [("siglip", 16), ("naflex", NAFLEX_ROWS), ("clip", 49)])
def test_chat_puts_images_into_a_template_that_takes_text(kind: str, num_rows: int, tmp_path: Path) -> None:
    """Several turns with images, one of them two side by side; what a client spells as the placeholder stays text."""
    made = make_minimind_v(tmp_path, kind, seed=3)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    path.write_text(json.dumps(config))
    pictures = [random_image(60 + i, 40, seed=i) for i in range(3)]
    images = [{"type": "image", "image": picture} for picture in pictures]
    messages = [
        {"role": "user", "content": [images[0], {"type": "text", "text": "<|image_pad|> a@b.c <|endoftext|>"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [images[1], images[2], {"type": "text", "text": "And these?"}]},
    ]
    with LLM(model=str(tmp_path), **SETTINGS) as llm:
        (answer,) = llm.chat(messages, GREEDY)
    ids = answer.prompt_token_ids
    mark = MARKS[kind]
    assert ids.count(mark) == 3
    assert answer.num_prompt_tokens == len(ids) - 3 + 3 * num_rows
    _, tokens = reference_answer(made, ids, pictures, mark, 8)
    assert answer.outputs[0].token_ids == tokens


@pytest.mark.parametrize(("kind", "num_of_projector"), [("siglip", 6), ("naflex", 4)])
def test_every_tensor_of_the_vision_half_is_needed(kind: str, num_of_projector: int, tmp_path: Path) -> None:
    make_minimind_v(tmp_path, kind)
    config = EmbedConfig(device="cpu", dtype="float32")
    file = next((tmp_path / FOLDERS[kind]).glob("*.safetensors"))
    stored = load_file(file)
    for name in stored:
        save_file({key: value for key, value in stored.items() if key != name}, file)
        if ".head." in name:
            VisionRunner.check(tmp_path, config)
            continue
        with pytest.raises(CheckpointError) as caught:
            VisionRunner.load(tmp_path, config)
        assert any(name.removeprefix("vision_model.") in problem for problem in caught.value.problems)
    save_file({name.removeprefix("vision_model."): value for name, value in stored.items()}, file)
    assert VisionRunner.check(tmp_path, config) == len(stored) - 1 + num_of_projector
    (weights,) = tmp_path.glob("*.pth")
    tensors = torch.load(weights, weights_only=True)
    for name in [name for name in tensors if name.startswith("vision_proj")]:
        torch.save({key: value for key, value in tensors.items() if key != name}, weights)
        with pytest.raises((CheckpointError, UnsupportedModel), match=r"missing|no projector"):
            VisionRunner.load(tmp_path, config)


def test_an_encoder_of_another_layout_is_named(tmp_path: Path) -> None:
    config = EmbedConfig(device="cpu", dtype="float32")
    for kind, other, message in (
        ("siglip", "naflex", "is SigLIP 2 NaFlex, and the projector is not the one made for it"),
        ("naflex", "siglip", r"is not SigLIP 2 NaFlex, which the projector \(mlp.0 and mlp.2\) needs"),
        ("naflex", "clip", r"is not SigLIP 2 NaFlex, which the projector \(mlp.0 and mlp.2\) needs"),
    ):
        folder, stranger = tmp_path / f"{kind}-{other}", tmp_path / f"of-{kind}-{other}"
        make_minimind_v(folder, kind)
        make_minimind_v(stranger, other)
        shutil.rmtree(folder / FOLDERS[kind])
        with pytest.raises(UnsupportedModel, match="holds 0 folders with a vision encoder"):
            VisionRunner.load(folder, config)
        shutil.copytree(stranger / FOLDERS[other], folder / FOLDERS[other])
        with pytest.raises(UnsupportedModel, match=message):
            VisionRunner.check(folder, config)
