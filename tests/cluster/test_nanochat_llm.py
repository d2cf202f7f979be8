"""nanochat's own layout in `LLM`: prompts, conversations, and which model of a folder is taken."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import LLM, SamplingParams
from cluster.cli.doctor import findings
from cluster.config import load_config
from cluster.errors import ChatTemplateError, ConfigError
from tests.tiny_nanochat import NANO_IDS, make_native_nanochat

SETTINGS: dict[str, Any] = {"device": "cpu", "num_threads": 1, "kv_cache_tokens": 4096, "max_model_len": 400}
BOS, USER, USER_END, ASSISTANT, ASSISTANT_END = (
    NANO_IDS[f"<|{name}|>"] for name in ("bos", "user_start", "user_end", "assistant_start", "assistant_end")
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    before = torch.get_num_threads()
    folder = make_native_nanochat(tmp_path_factory.mktemp("nano"), 4)
    with LLM(model=str(folder), **SETTINGS) as llm:
        yield llm
    torch.set_num_threads(before)


def test_a_text_begins_as_documents_did(llm: LLM) -> None:
    (answer,) = llm.generate("Hello there", SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
    assert answer.prompt_token_ids == [BOS, *llm.tokenizer.encode("Hello there")]
    assert len(answer.outputs[0].token_ids) == 5


def test_a_conversation_is_rendered_as_nanochat_does(llm: LLM) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello <|bos|>"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": [{"type": "text", "text": "again"}]},
    ]
    (answer,) = llm.chat(messages, SamplingParams(max_tokens=1))
    encode = llm.tokenizer.encode
    assert answer.prompt_token_ids == [
        BOS, USER, *encode("Be brief.\n\nHello <|bos|>"), USER_END, ASSISTANT, *encode("hello"), ASSISTANT_END,
        USER, *encode("again"), USER_END, ASSISTANT,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "roles", [["assistant"], ["user", "user"], ["system"], ["user", "system"], ["system", "assistant"]]
)
def test_turns_that_nanochat_was_not_trained_on_are_refused(llm: LLM, roles: list[str]) -> None:
    with pytest.raises(ChatTemplateError, match="user"):
        llm.chat([{"role": role, "content": "x"} for role in roles], SamplingParams(max_tokens=1))


def test_the_deepest_model_of_a_folder_is_taken(tmp_path: Path) -> None:
    folder = make_native_nanochat(tmp_path, 4)
    for name in ("d12", "d3", "other"):
        os.makedirs(folder.parent / name)
        os.link(folder / "model_000007.pt", folder.parent / name / "model_000007.pt")
    config = load_config(overrides={"model.path": str(folder.parent)}).resolve()
    assert config.model.path == str(folder.parent / "d12") and config.model.served_model_name == "d12"
    assert load_config(overrides={"model.path": str(folder)}).resolve().model.path == str(folder)
    with pytest.raises(ConfigError, match="model folder"):
        load_config(overrides={"model.path": str(tmp_path)}).resolve()


def test_doctor_finds_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    folder = make_native_nanochat(tmp_path, 4)
    config = load_config(overrides={"model.path": str(folder.parent), "gateway.port": 0})
    told = [finding for finding in findings(config) if str(folder) in finding.what]
    assert [finding.verdict for finding in told] == ["ok"] * 4
    (tmp_path / "tokenizer" / "tokenizer.pkl").unlink()
    told = [finding for finding in findings(config) if finding.verdict == "bad"]
    assert any("tokenizer" in finding.what for finding in told)
