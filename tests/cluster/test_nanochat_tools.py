"""The tool machine and nanochat's own interface, through `LLM`, on checkpoints that have learnt a script."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import LLM, SamplingParams
from cluster.errors import BadRequest, ChatTemplateError
from cluster.nanochat import NanoChatEngine
from language_worker.errors import InvalidRequest
from tests.tiny_nanochat import (
    NANO_IDS,
    make_native_nanochat,
    make_scripted_nanochat,
    nano_ranks,
)
from tests.tiny_text_models import make_text_model

SETTINGS: dict[str, Any] = {"device": "cpu", "num_threads": 1, "kv_cache_tokens": 4096, "page_size": 4}
BOS, START, END, ASSISTANT, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = (
    NANO_IDS[f"<|{name}|>"]
    for name in (
        "bos", "user_start", "assistant_end", "assistant_start", "python_start", "python_end", "output_start",
        "output_end",
    )
)  # fmt: skip


def _bytes(text: str) -> list[int]:
    return [nano_ranks()[char.encode()] for char in text]


def _chain(*paths: list[int]) -> dict[int, list[int]]:
    """Which tokens follow which in these paths; a token where paths part has several."""
    followers: dict[int, list[int]] = {}
    for path in paths:
        for token, follower in itertools.pairwise(path):
            if follower not in followers.setdefault(token, []):
                followers[token].append(follower)
    return followers


TOOL = [PYTHON, *_bytes("12+34"), PYTHON_END]
RESULT = [OUTPUT, *_bytes("46"), OUTPUT_END]
AFTER = [OUTPUT_END, *_bytes(" ok"), END]
PLAIN = [*_bytes("xyz-wv"), END]
SCRIPT = _chain([ASSISTANT, *TOOL], AFTER, [ASSISTANT, *PLAIN], [START, *TOOL], [*_bytes("Q"), *PLAIN])
ANSWERS = {"tool": [*TOOL, *RESULT, *AFTER[1:]], "plain": PLAIN}
MASKS = {"tool": [1] * len(TOOL) + [0] * len(RESULT) + [1] * (len(AFTER) - 1), "plain": [1] * len(PLAIN)}
SPELLED = {"tool": " ok", "plain": "xyz-wv"}


@pytest.fixture(scope="module", params=["autoregressive", "speculative"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    before = torch.get_num_threads()
    folder = make_scripted_nanochat(tmp_path_factory.mktemp("nano"), SCRIPT)
    with LLM(model=str(folder), decode_strategy=request.param, **SETTINGS) as llm:
        yield llm
    torch.set_num_threads(before)


def _kind(tokens: list[int]) -> str:
    return "tool" if tokens[0] == PYTHON else "plain"


def test_an_expressions_result_is_forced_into_the_output(llm: LLM) -> None:
    (answer,) = llm.generate([[BOS, START]], SamplingParams(temperature=0))
    (output,) = answer.outputs
    assert output.token_ids == ANSWERS["tool"] and output.mask == MASKS["tool"]
    assert output.text == " ok" and output.finish_reason == "stop"


def test_rows_use_the_tool_or_not_each_for_itself(llm: LLM) -> None:
    """Prompts and samples of both kinds run together; each is as it is alone."""
    params = SamplingParams(n=16, seed=3, temperature=1.0)
    prompts = [[BOS, ASSISTANT], [BOS, START], [BOS, *_bytes("Q")]]
    mixed, tool, plain = llm.generate(prompts, params)
    assert {_kind(output.token_ids) for output in mixed.outputs} == {"tool", "plain"}
    for answer in (mixed, tool, plain):
        for output in answer.outputs:
            kind = _kind(output.token_ids)
            assert (output.token_ids, output.mask, output.text) == (ANSWERS[kind], MASKS[kind], SPELLED[kind])
    assert all(_kind(output.token_ids) == "tool" for output in tool.outputs)
    alone = [llm.generate([prompt], params)[0] for prompt in prompts]
    assert [[o.token_ids for o in a.outputs] for a in alone] == [
        [o.token_ids for o in a.outputs] for a in (mixed, tool, plain)
    ]


def test_forced_tokens_count_and_are_cut_like_any_other(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=len(TOOL) + 2, logprobs=1)
    (answer,) = llm.generate([[BOS, START]], params)
    (output,) = answer.outputs
    assert output.token_ids == ANSWERS["tool"][: len(TOOL) + 2] and output.finish_reason == "length"
    assert output.mask == MASKS["tool"][: len(TOOL) + 2]
    assert output.logprobs is not None and [entry.token_id for entry in output.logprobs] == output.token_ids


@pytest.mark.parametrize("result", [[OUTPUT, *_bytes("46"), OUTPUT_END], [OUTPUT, *_bytes("99"), OUTPUT_END]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_go_through_an_expression_and_its_result(llm: LLM, result: list[int], temperature: float) -> None:
    """The prompt has the answer already, with a right or a wrong result, for who looks ahead to copy."""
    prompt = [BOS, START, *TOOL, *result, *AFTER[1:], BOS, START]
    before = llm.stats()["language-0"]["spec_decode_num_accepted_tokens_total"]
    for _ in range(2):
        (answer,) = llm.generate([prompt], SamplingParams(temperature=temperature, seed=1, n=2))
        for output in answer.outputs:
            assert (output.token_ids, output.mask, output.text) == (ANSWERS["tool"], MASKS["tool"], " ok")
    accepted = llm.stats()["language-0"]["spec_decode_num_accepted_tokens_total"] - before
    assert (accepted > 0) == (llm.config.language.decode_strategy == "speculative")


def test_the_best_of_several_keep_their_masks(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, n=2, best_of=6, seed=1)
    (answer,) = llm.generate([[BOS, START]], params)
    assert [output.mask for output in answer.outputs] == [MASKS["tool"]] * 2


@pytest.mark.parametrize("expression", ["5%3", "zy", "", "1/0"])
def test_what_has_no_result_forces_nothing(expression: str, tmp_path: Path) -> None:
    path = [START, PYTHON, *_bytes(expression), PYTHON_END, *_bytes("k"), END]
    with LLM(model=str(make_scripted_nanochat(tmp_path, _chain(path))), **SETTINGS) as llm:
        (answer,) = llm.generate([[BOS, START]], SamplingParams(temperature=0, max_tokens=30))
    assert answer.outputs[0].token_ids == path[1:] and answer.outputs[0].mask == [1] * (len(path) - 1)
    assert answer.outputs[0].text == "k"


def test_an_expression_counts_letters(tmp_path: Path) -> None:
    """Here it is one token, and an expression is what its tokens spell."""
    word = [PYTHON, nano_ranks()[b" 'strawberry'.count('r')"], PYTHON_END]
    script = _chain([START, *word], [OUTPUT_END, *_bytes("k"), END])
    with LLM(model=str(make_scripted_nanochat(tmp_path, script)), **SETTINGS) as llm:
        (answer,) = llm.generate([[BOS, START]], SamplingParams(temperature=0))
    (output,) = answer.outputs
    assert output.token_ids == [*word, OUTPUT, *_bytes("3"), OUTPUT_END, *_bytes("k"), END]
    assert output.mask == [1, 1, 1, 0, 0, 0, 1, 1]


# -- nanochat's own interface -----------------------------------------------------------------------------------------


def test_columns_hold_one_token_of_every_row(llm: LLM) -> None:
    engine = NanoChatEngine(llm)
    columns = list(engine.generate([BOS, ASSISTANT], num_samples=8, temperature=1.0, seed=5))
    assert all(len(tokens) == len(masks) == 8 for tokens, masks in columns)
    kinds = []
    for i in range(8):
        tokens, masks = [c[0][i] for c in columns], [c[1][i] for c in columns]
        kind = _kind(tokens)
        kinds.append(kind)
        length = len(ANSWERS[kind])
        assert tokens[:length] == ANSWERS[kind] and masks[:length] == MASKS[kind]
        assert set(tokens[length:]) <= {END} and set(masks[length:]) <= {0}
    assert set(kinds) == {"tool", "plain"}, "first tokens are drawn row by row"
    assert len(columns) == max(len(ANSWERS[kind]) for kind in kinds)


def test_a_batch_holds_prompt_and_answer_without_its_end(llm: LLM) -> None:
    engine, prompt = NanoChatEngine(llm), [BOS, ASSISTANT]
    rows, masks = engine.generate_batch(prompt, num_samples=8, temperature=1.0, seed=5)
    for row, mask in zip(rows, masks, strict=True):
        kind = _kind(row[2:])
        assert row == [*prompt, *ANSWERS[kind][:-1]] and mask == [0, 0, *MASKS[kind][:-1]]
    again, _ = engine.generate_batch(prompt, num_samples=8, temperature=1.0, seed=5)
    fewer, _ = engine.generate_batch(prompt, num_samples=3, temperature=1.0, seed=5)
    others = [engine.generate_batch(prompt, num_samples=8, seed=seed)[0] for seed in range(5)]
    assert again == rows and fewer == rows[:3] and any(other != rows for other in others)
    assert llm.stats()["language-0"]["kv_pages_referenced"] == 0


def test_temperature_zero_does_not_depend_on_the_seed_and_lengths_are_kept(llm: LLM) -> None:
    engine = NanoChatEngine(llm)
    greedy = [engine.generate_batch([BOS, START], 2, temperature=0.0, seed=seed) for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    assert len(list(engine.generate([BOS, START], max_tokens=3))) == 3
    assert list(engine.generate([BOS, START], max_tokens=0)) == []
    assert engine.generate_batch([BOS, START], max_tokens=2) == ([[BOS, START, *TOOL[:2]]], [[0, 0, 1, 1]])
    with pytest.raises(InvalidRequest, match="temperature"):
        engine.generate_batch([BOS], temperature=-1.0)


def test_the_prompt_is_computed_once_for_all_rows(tmp_path: Path) -> None:
    with LLM(model=str(make_native_nanochat(tmp_path, 4, sequence_len=200)), **SETTINGS) as llm:
        rows, _ = NanoChatEngine(llm).generate_batch(list(range(100)), num_samples=6, max_tokens=1, seed=0)
        assert llm.stats()["language-0"]["computed_tokens_total"] == 100
        assert len({row[-1] for row in rows}) > 1


def test_leaving_the_columns_early_frees_everything(llm: LLM) -> None:
    columns = NanoChatEngine(llm).generate([BOS, START], num_samples=3)
    next(columns)
    columns.close()  # type: ignore[attr-defined]
    llm.generate([[BOS, START]], SamplingParams(temperature=0))  # whoever was cancelled is gone after a step
    assert llm.stats()["language-0"]["kv_pages_referenced"] == 0


def test_a_conversation_is_rendered_with_the_mask_of_its_training(llm: LLM) -> None:
    engine, encode = NanoChatEngine(llm), llm.tokenizer.encode
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many? <|bos|>"},
        {"role": "assistant", "content": [
            {"type": "text", "text": "It is"},
            {"type": "python", "text": "1+1"},
            {"type": "python_output", "text": "2"},
        ]},
    ]  # fmt: skip
    prompt = [
        (BOS, 0), (START, 0), *((t, 0) for t in encode("Be brief.\n\nHow many? <|bos|>")),
        (NANO_IDS["<|user_end|>"], 0), (ASSISTANT, 0),
    ]  # fmt: skip
    answer = [
        *((t, 1) for t in encode("It is")), (PYTHON, 1), *((t, 1) for t in encode("1+1")), (PYTHON_END, 1),
        (OUTPUT, 0), *((t, 0) for t in encode("2")), (OUTPUT_END, 0), (END, 1),
    ]  # fmt: skip
    ids, mask = engine.render_conversation({"messages": messages})
    assert list(zip(ids, mask, strict=True)) == [*prompt, *answer]
    assert engine.render_conversation(messages, max_tokens=5) == (ids[:5], mask[:5])
    assert engine.render_for_completion(messages) == [token for token, _ in prompt]
    assert engine.render_for_completion(messages[:2]) == [token for token, _ in prompt]
    assert llm.chat(messages[:2], SamplingParams(max_tokens=1))[0].prompt_token_ids == [t for t, _ in prompt]


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "no messages",
        [{"role": "user"}],
        [{"role": "system", "content": "a"}],
        [{"role": "assistant", "content": "a"}, {"role": "user", "content": "a"}],
        [{"role": "user", "content": [{"type": "python", "text": "1"}]}],
        [USER, {"role": "assistant", "content": [{"type": "image"}]}, USER],
    ],
)
def test_conversations_that_nanochat_does_not_know_are_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(ChatTemplateError):
        NanoChatEngine(llm).render_for_completion(messages)


def test_other_models_are_refused(tmp_path: Path) -> None:
    with LLM(model=str(make_text_model(tmp_path, "qwen3")), **SETTINGS) as llm, pytest.raises(BadRequest, match="bos"):
        NanoChatEngine(llm)
