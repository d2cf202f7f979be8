"""A text-only checkpoint in `LLM`: one worker, no embedding half, and images refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cluster import LLM, SamplingParams
from cluster.errors import BadRequest
from tests.tiny_text_models import make_text_model

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
SETTINGS = {"dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_tokens": 4096}


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    before = torch.get_num_threads()
    folder = make_text_model(tmp_path_factory.mktemp(request.param), request.param)
    with LLM(model=str(folder), decode_strategy="speculative", **SETTINGS) as llm:
        yield llm
    torch.set_num_threads(before)


def test_text_is_answered_by_the_language_half_alone(llm: LLM) -> None:
    assert set(llm.stats()) == {"language-0"}
    (answer,) = llm.generate("Hello there", GREEDY)
    assert len(answer.outputs[0].token_ids) == 8
    logits = llm.logits(answer.prompt_token_ids)
    assert logits.shape[0] == len(answer.prompt_token_ids)
    assert int(logits[-1].argmax()) == answer.outputs[0].token_ids[0]


def test_a_prompt_asked_again_is_found_in_the_cache_and_samples_share_it(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=2, n=3, ignore_eos=True)
    first, again = (llm.generate("one two three " * 20, params)[0] for _ in range(2))
    assert [s.token_ids for s in first.outputs] == [s.token_ids for s in again.outputs]
    stats = llm.stats()["language-0"]
    assert stats["prefix_cache_hits_total"] >= 32 and stats["kv_pages_referenced"] == 0 < stats["kv_pages_cached"]


def test_images_are_refused(llm: LLM) -> None:
    with pytest.raises(BadRequest, match="image"):
        llm.generate({"prompt": "<|image_pad|>", "images": [b"x"]}, GREEDY)
