"""MiniMind through `LLM`: a folder with a `.pth` and the tokenizer is enough, in chat, streamed or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster import LLM, SamplingParams
from cluster.config import build_config
from cluster.errors import ConfigError
from tests.tiny_minimind import make_minimind, minimind_reference

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
SETTINGS = {"dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_tokens": 4096}


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("variant", "layout"), [("2", "pth"), ("3", "pth"), ("2-moe", "bin"), ("3-moe", "pth")])
def test_a_native_folder_is_served(variant: str, layout: str, tmp_path: Path) -> None:
    config = make_minimind(tmp_path, variant, layout, seed=3)
    messages = [{"role": "user", "content": "Hello there, what is this?"}]
    with LLM(model=str(tmp_path), **SETTINGS) as llm:
        (answer,) = llm.chat(messages, GREEDY)
        streamed = [token for chunk in llm.stream(messages, GREEDY) for token in chunk.token_ids]
        together = llm.generate([answer.prompt_token_ids, "other words", answer.prompt_token_ids[:5]], GREEDY)
    model = minimind_reference(variant, config, 3)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([answer.prompt_token_ids])
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    assert answer.outputs[0].token_ids == streamed == together[0].outputs[0].token_ids == out


def test_a_folder_without_any_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        build_config({"model": {"path": str(tmp_path)}}).resolve()
