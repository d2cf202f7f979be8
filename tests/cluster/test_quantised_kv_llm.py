"""Keys and values in 8 bits on the shipped model, which has been trained: its answers, and how sure it is of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import cluster.demo
from cluster import LLM, SamplingParams

DEMO = Path(cluster.demo.__file__).parent
QUESTIONS = json.loads((DEMO / "images" / "questions.json").read_text())
TEMPLATE = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n{}"
SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_tokens": 8192}


def _prompts(answers: list[str]) -> list[dict[str, Any]]:
    return [
        {"prompt": TEMPLATE.format(entry["question"], answer), "images": [Image.open(DEMO / "images" / entry["file"])]}
        for entry, answer in zip(QUESTIONS, answers, strict=True)
    ]


def _answers_and_perplexity(kind: str, told: list[str] | None) -> tuple[list[str], float]:
    """Greedy answers, and the perplexity of `told` (None: of these answers) after their questions."""
    with LLM(model=str(DEMO / "model"), **SETTINGS, kv_cache_dtype=kind) as llm:
        outputs = llm.generate(_prompts([""] * len(QUESTIONS)), SamplingParams(max_tokens=24, temperature=0.0))
        texts = [output.outputs[0].text for output in outputs]
        read = llm.generate(
            _prompts(texts if told is None else told), SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        )
    known = [
        entry.logprob
        for before, after in zip(outputs, read, strict=True)
        for entry in (after.prompt_logprobs or [])[before.num_prompt_tokens :]
        if entry is not None
    ]
    assert len(known) >= len(QUESTIONS)
    return texts, math.exp(-sum(known) / len(known))


def test_answers_stay_the_same_and_as_sure() -> None:
    texts, full = _answers_and_perplexity("auto", None)
    for kind in ("int8", "fp8"):
        answers, perplexity = _answers_and_perplexity(kind, texts)
        assert answers == texts
        assert perplexity == pytest.approx(full, rel=0.01)
