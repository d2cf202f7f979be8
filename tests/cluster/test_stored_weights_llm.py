"""LLM on checkpoints stored quantised: text and images, both halves; transformers' answers on the same numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import LLM, SamplingParams
from cluster.__main__ import main
from embedding_worker.config import EmbedConfig
from embedding_worker.runner import VisionRunner
from tests.quantised_layouts import LANGUAGE, Scheme, quantise_folder
from tests.tiny_models import make_qwen2_5_vl, random_image, reference, reference_inputs
from tests.tiny_text_models import make_text_model
from transfer.checkpoint import CheckpointError

AWQ = Scheme(method="awq", sym=False)
SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_tokens": 2048}
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
TOWER = r"visual\.blocks\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.(?:gate|up|down)_proj)\.weight"
BEFORE, BEHIND = "<|im_start|>user\n", " What is it?<|im_end|>\n<|im_start|>assistant\n"
PLACED = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _expected(exact: Path, image: Any) -> list[int]:
    """Greedy tokens by transformers."""
    model, inputs = reference(exact), reference_inputs(exact, [BEFORE, image, BEHIND])
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]


def _answer(folder: Path, image: Any) -> list[int]:
    with LLM(model=str(folder), **SETTINGS) as llm:
        (output,) = llm.generate([{"prompt": f"{BEFORE}{PLACED}{BEHIND}", "images": [image]}], GREEDY)
    return output.outputs[0].token_ids


@pytest.mark.parametrize("scheme", [AWQ, Scheme(bits=4, desc_act=True)], ids=["awq", "gptq"])
def test_images_are_seen_beside_a_tower_in_full_precision(scheme: Scheme, tmp_path: Path) -> None:
    plain = make_qwen2_5_vl(tmp_path / "plain", seed=5)
    stored, exact = quantise_folder(plain, tmp_path, scheme, section={"modules_to_not_convert": ["visual"]})
    image = random_image(57, 90, seed=1)
    assert _answer(stored, image) == _expected(exact, image)


def test_a_tower_that_is_quantised_too_is_widened(tmp_path: Path) -> None:
    plain = make_qwen2_5_vl(tmp_path / "plain", seed=6)
    stored, exact = quantise_folder(plain, tmp_path, AWQ, names=f"{LANGUAGE}|{TOWER}")
    image = random_image(84, 84, seed=2)
    assert _answer(stored, image) == _expected(exact, image)
    halves = [VisionRunner.load(folder, EmbedConfig(dtype="float32", device="cpu")) for folder in (stored, exact)]
    assert VisionRunner.check(stored, EmbedConfig()) == VisionRunner.check(exact, EmbedConfig())
    patches, grids = torch.randn(16, 1176, generator=torch.Generator().manual_seed(0)), [(1, 4, 4)]
    rows, expected = (half._model.encode(patches, grids) for half in halves)
    assert torch.equal(rows, expected), "the same numbers"


@pytest.mark.parametrize("scheme", [AWQ, Scheme(bits=8), Scheme(sym=False, desc_act=True)])
def test_text_is_answered_as_by_the_numbers_in_full(scheme: Scheme, tmp_path: Path) -> None:
    stored, exact = quantise_folder(make_text_model(tmp_path / "plain", "qwen2", seed=7), tmp_path, scheme)
    answers = []
    for folder in (stored, exact):
        with LLM(model=str(folder), **SETTINGS) as llm:
            answers.append([output.outputs[0].token_ids for output in llm.generate(["Hello there", "What?"], GREEDY)])
    assert answers[0] == answers[1]


def test_other_methods_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_qwen2_5_vl(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantised by 'bitsandbytes', a layout that is not read"):
        LLM(model=str(folder), **SETTINGS)
    with pytest.raises(CheckpointError, match="quantised by 'bitsandbytes'"):
        VisionRunner.check(folder, EmbedConfig())
    assert main(["generate", "--model", str(folder), "--prompt", "Hello"]) == 2
    assert "quantised by 'bitsandbytes'" in capsys.readouterr().err
