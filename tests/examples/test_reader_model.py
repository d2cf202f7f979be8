"""The shipped LLaDA-V: small, right about glyphs it never saw, as right in few forwards, and what its training made."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from cluster import LLM, DiffusionParams, SamplingParams
from cluster.demo import DIFFUSION_MODEL_DIR, READER_MODEL_DIR
from cluster.prompts import image_bytes
from embedding_worker.config import EmbedConfig
from embedding_worker.preprocess import ImageLimits, prepare_image
from embedding_worker.runner import VisionRunner
from examples.augment import draw_batch
from examples.demo_accuracy import evaluation_set
from examples.digits import CELL, HEIGHT, draw, load_glyphs
from examples.reader import (
    BEFORE,
    FEATURES,
    IMAGE,
    PATCH,
    SIDE,
    encode,
    kept_rows,
    prompt_ids,
    squares,
    token_id,
    tokenizer,
)
from examples.reader_accuracy import measure
from examples.reader_model import Reader, Tower, num_rows, save
from examples.sums import MASK
from tests.oracles_llada import by_threshold, generate
from tests.profiles import IS_SOAK
from tests.tiny_llada_v import UNSPOKEN, read_llada_v

SETTINGS = {"dtype": "float32", "device": "cpu", "num_threads": 1}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_both_diffusion_models_are_small() -> None:
    folders = (DIFFUSION_MODEL_DIR, READER_MODEL_DIR)
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 8_000_000


def test_it_reads_glyphs_that_it_never_saw() -> None:
    """As well in few forwards as with one token each."""
    asked = evaluation_set(500 if IS_SOAK else 60, first_seed=3_000_000)
    with LLM(model=str(READER_MODEL_DIR), **SETTINGS) as llm:
        slow = measure(llm, asked, DiffusionParams(schedule="static", kv_policy="none"))
        fast = measure(llm, asked, DiffusionParams())
    assert fast["all"] >= 0.93 and fast["all"] >= slow["all"] - 0.02
    assert slow["tokens_per_forward"] <= 1.0 and fast["tokens_per_forward"] > 2 * slow["tokens_per_forward"]


def test_training_shows_it_no_glyph_that_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither phase's pictures change when the ink of all held-out glyphs does."""
    glyphs = load_glyphs()
    before = draw_batch(numpy.random.default_rng(0), 64).pixels
    ink = glyphs.ink.copy()
    ink[glyphs.held_out] = 1.0
    monkeypatch.setattr("examples.augment.load_glyphs", lambda: dataclasses.replace(glyphs, ink=ink))
    assert torch.equal(draw_batch(numpy.random.default_rng(0), 64).pixels, before)
    ink[glyphs.train] = 1.0
    assert not torch.equal(draw_batch(numpy.random.default_rng(0), 64).pixels, before)


@pytest.mark.parametrize("kv_policy", ["dual", "none"])
def test_answers_are_those_of_the_reference(kv_policy: Any, tmp_path: Path) -> None:
    """Rows of transformers' tower and squares, tokens of the published loop in float64."""
    reference = read_llada_v(READER_MODEL_DIR, tmp_path / "text")
    vocabulary = range(
        tokenizer().get_vocab_size(), json.loads((READER_MODEL_DIR / "config.json").read_text())["vocab_size"]
    )
    never = (token_id(MASK), *map(token_id, UNSPOKEN), *vocabulary)
    params = SamplingParams(
        max_tokens=8, temperature=0.0, ignore_eos=True, diffusion=DiffusionParams(kv_policy=kv_policy)
    )
    with LLM(model=str(READER_MODEL_DIR), **SETTINGS) as llm:
        for item in evaluation_set(100 if IS_SOAK else 8, first_seed=4_000_000):
            image = item.composition.image
            content = [{"type": "image", "image": image}, {"type": "text", "text": item.question}]
            (answer,) = llm.chat([{"role": "user", "content": content}], params)
            oracle, prompt = reference.oracle(answer.prompt_token_ids, [image], token_id(IMAGE))
            assert prompt[: len(encode(BEFORE))] == list(encode(BEFORE))
            rule = by_threshold(0.9)
            found = generate(
                oracle, prompt, 8, block_length=8, choose=lambda _, rule=rule: rule, never=never, kv_policy=kv_policy
            )
            assert answer.outputs[0].token_ids == found.tokens


def test_what_is_trained_is_what_is_served(tmp_path: Path) -> None:
    """The training code's rows and logits on the folder it writes, for pictures of every width."""
    torch.manual_seed(0)
    reader = Reader(Tower()).requires_grad_(False)
    for parameter in reader.parameters():
        parameter.copy_(parameter.to(torch.bfloat16).float())
    save(reader, tmp_path)
    runner = VisionRunner.load(tmp_path, EmbedConfig(device="cpu", dtype="float32"))
    limits = ImageLimits(max_bytes=1 << 20, max_pixels=1 << 20)
    widths = set()
    with LLM(model=str(tmp_path), **SETTINGS) as llm:
        for seed in random.Random(0).sample(range(1000), 12):
            image = draw(seed, "train").image
            if image.width in widths:
                continue
            widths.add(image.width)
            prepared = prepare_image(image_bytes(image), 0, runner.settings, limits)
            patches = prepared.patches.view(2, FEATURES, FEATURES, 3, PATCH, PATCH)
            squeezed, fitted = reader.tower(patches.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, SIDE, SIDE))
            rows = reader.arranged(squeezed[None], fitted[None], [image.width])
            torch.testing.assert_close(runner.encode([prepared])[0], rows, atol=1e-4, rtol=1e-4)
            ids = torch.tensor([prompt_ids("Read the number.", num_rows(image.width))])
            logits = reader.text.logits(reader.hidden(ids, torch.ones_like(ids, dtype=torch.bool), rows))[0]
            content = [{"type": "image", "image": image}, {"type": "text", "text": "Read the number."}]
            served = llm.logits([{"role": "user", "content": content}])
            torch.testing.assert_close(served, logits, atol=1e-3, rtol=1e-3)
    assert len(widths) >= 3


def test_squares_of_training_are_those_of_the_server() -> None:
    """Within what two ways of resizing round differently."""
    pictures = draw_batch(numpy.random.default_rng(3), 12)
    runner_settings = VisionRunner.load(READER_MODEL_DIR, EmbedConfig(device="cpu", dtype="float32")).settings
    limits = ImageLimits(max_bytes=1 << 20, max_pixels=1 << 20)
    ours = torch.stack(squares(pictures), dim=1)
    for row in range(12):
        width = int(pictures.cells_wide[row]) * CELL
        pixels = pictures.pixels[row, :, :, :width].permute(1, 2, 0).to(torch.uint8).numpy()
        prepared = prepare_image(image_bytes(Image.fromarray(pixels)), 0, runner_settings, limits)
        theirs = prepared.patches.view(2, FEATURES, FEATURES, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        assert (ours[row] - theirs.reshape(2, 3, SIDE, SIDE)).abs().max() < 4 / 127.5
        assert kept_rows(width) == runner_settings.tiling.kept(HEIGHT, width)[0]  # type: ignore[union-attr]
