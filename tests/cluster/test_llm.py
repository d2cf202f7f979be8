"""LLM on the shipped demo model: every form of prompt, the same answer in any company, nothing left over."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import pickle
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import cluster.demo
from cluster import LLM, RequestOutput, SamplingParams
from cluster.errors import BadRequest, ConfigError
from embedding_worker.errors import BadImage
from language_worker import delivery
from language_worker.errors import InvalidRequest, PromptTooLong
from tests.cluster.ledger import await_empty
from transfer.errors import EndpointClosed, RemoteFailure

DEMO = Path(cluster.demo.__file__).parent
MODEL = str(DEMO / "model")
IMAGES = DEMO / "images"
QUESTIONS = json.loads((IMAGES / "questions.json").read_text())
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
WARM = 8.0  # the demo model is so sure of its answers that below this samples are all alike
PLACED = "<|vision_start|><|image_pad|><|vision_end|>"

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_tokens": 8192}


@pytest.fixture(scope="module")
def shared() -> Iterator[LLM]:
    before = torch.get_num_threads()
    with LLM(model=MODEL, **SETTINGS) as llm:
        yield llm
    torch.set_num_threads(before)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    await_empty(shared)


def _image_prompt(file: str, question: str) -> dict[str, Any]:
    text = f"<|im_start|>user\n{PLACED}{question}<|im_end|>\n<|im_start|>assistant\n"
    return {"prompt": text, "images": [IMAGES / file]}


def _message(image: Any, question: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}


def _what(output: RequestOutput) -> list[tuple[str, list[int], str | None]]:
    return [(sample.text, sample.token_ids, sample.finish_reason) for sample in output.outputs]


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_the_shipped_questions_are_answered_right(llm: LLM) -> None:
    outputs = llm.chat([[_message(str(IMAGES / q["file"]), q["question"])] for q in QUESTIONS], GREEDY)
    assert [output.outputs[0].text for output in outputs] == [q["answer"] for q in QUESTIONS]
    for output in outputs:
        (sample,) = output.outputs
        assert (sample.finish_reason, sample.logprobs) == ("stop", None)
    told = [output for output in outputs if "rows" in output.hops]  # nobody waits for it where the prefix was there
    assert len(told) >= 3
    for output in told:
        assert output.num_prompt_tokens == len(output.prompt_token_ids) - 1 + output.hops["rows"]


def test_a_prompt_as_text_ids_or_map(llm: LLM) -> None:
    text = "How many digits?"
    (output,) = llm.generate(text, GREEDY)
    ids = output.prompt_token_ids
    assert 1 <= len(output.outputs[0].token_ids) <= 8
    forms: list[Any] = [text, ids, tuple(ids), {"prompt": text}, {"prompt_token_ids": ids, "images": []}]
    for form in forms:
        (again,) = llm.generate(form, GREEDY)
        assert (again.prompt_token_ids, _what(again)) == (ids, _what(output))
    assert [_what(again) for again in llm.generate(forms, GREEDY)] == [_what(output)] * len(forms)
    assert llm.generate([], GREEDY) == []


def test_every_form_of_an_image_gives_the_same_answer(llm: LLM) -> None:
    question = next(q for q in QUESTIONS if len(q["answer"]) > 1)
    path = IMAGES / question["file"]
    data = path.read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    with Image.open(io.BytesIO(data)) as picture:
        forms = [picture, data, path, str(path), url]
        chats = [llm.chat([_message(form, question["question"])], GREEDY)[0] for form in forms]
    by_url = {"type": "image_url", "image_url": {"url": url}}
    content = [by_url, {"type": "text", "text": question["question"]}]
    chats += llm.chat([{"role": "user", "content": content}], GREEDY)
    assert {output.outputs[0].text for output in chats} == {question["answer"]}
    assert len({tuple(output.outputs[0].token_ids) for output in chats}) == 1


def test_params_for_all_or_one_each(llm: LLM) -> None:
    prompts = ["Hello there", "What is this?"]
    short, long = (SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (2, 5))
    outputs = llm.generate(prompts, [short, long])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 5]
    assert _what(llm.generate(prompts, long)[1]) == _what(outputs[1])
    with pytest.raises(ValueError, match="1 sampling parameters were given for 2 prompts"):
        llm.generate(prompts, [short])
    with pytest.raises(ValueError, match="0 sampling parameters were given for 2 prompts"):
        llm.generate(prompts, [])
    assert len(llm.generate(prompts[:1])[0].outputs[0].token_ids) > 0, "the defaults"


@pytest.mark.parametrize("wrong", [{"max_tokens": 3}, [{"max_tokens": 3}], 3, "greedy"])
def test_params_of_another_kind_are_named(llm: LLM, wrong: Any) -> None:
    with pytest.raises(BadRequest, match="use SamplingParams"):
        llm.generate(["Hello"], wrong)
    with pytest.raises(BadRequest, match="use SamplingParams"):
        llm.chat([{"role": "user", "content": "Hello"}], wrong)
    with pytest.raises(BadRequest, match="use SamplingParams"):
        next(llm.stream("Hello", wrong))


def test_a_list_longer_than_what_may_wait_is_answered_whole() -> None:
    with LLM(model=MODEL, **SETTINGS, max_waiting=3, max_waiting_requests=2, max_num_seqs=2) as llm:
        image = _image_prompt(QUESTIONS[0]["file"], QUESTIONS[0]["question"])
        params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        outputs = llm.generate([[1, 2, 3], image] * 10, params)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [2] * 20


def test_stop_logprobs_and_prompt_logprobs(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    (output,) = llm.generate("How many digits are there?", params)
    (sample,) = output.outputs
    assert sample.logprobs is not None and output.prompt_logprobs is not None
    assert [entry.token_id for entry in sample.logprobs] == sample.token_ids
    assert len(output.prompt_logprobs) == output.num_prompt_tokens and output.prompt_logprobs[0] is None
    logprobs = torch.log_softmax(llm.logits(output.prompt_token_ids), -1)
    for position, entry in enumerate(output.prompt_logprobs[1:], 1):
        assert entry is not None and entry.token_id == output.prompt_token_ids[position]
        assert abs(entry.logprob - float(logprobs[position - 1, entry.token_id])) < 1e-4
    assert abs(sample.logprobs[0].logprob - float(logprobs[-1].max())) < 1e-4
    stop = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, stop_token_ids=[sample.token_ids[2]])
    (stopped,) = llm.generate("How many digits are there?", stop)
    first = sample.token_ids.index(sample.token_ids[2])
    assert stopped.outputs[0].token_ids[:first] == sample.token_ids[:first]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", sample.token_ids[2])


def test_long_prompt_logprobs_are_put_together_again(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=2)
    prompts = ["What number is this?", "Count the digits.", "a"]
    whole = [(output.prompt_logprobs, *_what(output)) for output in llm.generate(prompts, params)]
    monkeypatch.setattr(delivery, "PROMPT_LOGPROBS_PER_PART", 3)
    assert [(output.prompt_logprobs, *_what(output)) for output in llm.generate(prompts, params)] == whole


# -- one answer, whichever way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, WARM])
def test_stream_equals_generate(llm: LLM, temperature: float) -> None:
    params = SamplingParams(max_tokens=12, temperature=temperature, seed=11, ignore_eos=True)
    prompts: list[Any] = ["Tell me a number", _image_prompt(QUESTIONS[0]["file"], "What number is this?")]
    for prompt in prompts:
        (whole,) = llm.generate(prompt, params)
        chunks = list(llm.stream(prompt, params))
        assert len(chunks) > 1, "an answer of 12 tokens comes in pieces"
        assert [token for chunk in chunks for token in chunk.token_ids] == whole.outputs[0].token_ids
        assert "".join(chunk.text for chunk in chunks) == whole.outputs[0].text
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    messages = [_message(IMAGES / QUESTIONS[0]["file"], QUESTIONS[0]["question"])]
    assert "".join(chunk.text for chunk in llm.stream(messages, GREEDY)) == QUESTIONS[0]["answer"]


def test_a_seed_decides_the_answer_and_samples_differ(llm: LLM) -> None:
    def params(seed: int, n: int = 1) -> SamplingParams:
        return SamplingParams(max_tokens=16, temperature=WARM, seed=seed, n=n, ignore_eos=True)

    (one,) = llm.generate("Say something", params(5))
    assert _what(llm.generate("Say something", params(5))[0]) == _what(one)
    assert _what(llm.generate("Say something", params(6))[0]) != _what(one)
    (two,) = llm.generate("Say something", params(5, n=2))
    assert [sample.index for sample in two.outputs] == [0, 1]
    assert _what(two)[0] == _what(one)[0], "sample 0 draws from the seed whatever n is"
    assert two.outputs[0].token_ids != two.outputs[1].token_ids
    busy = llm.generate(["Say something"] + ["other traffic"] * 5, [params(5)] + [params(s) for s in range(5)])
    assert _what(busy[0]) == _what(one)


def _mixed(rng: random.Random, count: int) -> tuple[list[Any], list[SamplingParams]]:
    prompts: list[Any] = []
    params = []
    for i in range(count):
        files = [rng.choice(QUESTIONS)["file"] for _ in range(rng.choice([0, 0, 1, 1, 2, 3]))]
        text = "".join(f"{PLACED}picture {j}, " for j in range(len(files))) + f"question {i} of many?"
        prompts.append({"prompt": text, "images": [IMAGES / file for file in files]} if files else text)
        temperature = rng.choice([0.0, WARM])
        params.append(SamplingParams(max_tokens=rng.randint(1, 12), temperature=temperature, seed=i, ignore_eos=True))
    return prompts, params


def test_samples_of_an_image_prompt_and_the_best_of_them(llm: LLM) -> None:
    """Sample i of any n is the same; best_of keeps those with the highest mean log-probability, best first."""
    case = QUESTIONS[0]
    asked = _image_prompt(case["file"], case["question"])
    wanted = {"temperature": WARM, "seed": 3, "max_tokens": 6, "logprobs": 0, "ignore_eos": True}
    (many,) = llm.generate([asked], SamplingParams(n=6, **wanted))
    (few,) = llm.generate([asked], SamplingParams(n=2, **wanted))
    (best,) = llm.generate([asked], SamplingParams(n=2, best_of=6, **wanted))
    assert [s.token_ids for s in few.outputs] == [s.token_ids for s in many.outputs[:2]]
    assert len({tuple(s.token_ids) for s in many.outputs}) > 1
    ranked = sorted(many.outputs, key=lambda s: -sum(e.logprob for e in s.logprobs or ()))  # all of one length
    assert [s.token_ids for s in best.outputs] == [s.token_ids for s in ranked[:2]]
    assert [s.index for s in best.outputs] == [0, 1]


def test_64_mixed_requests_at_once_equal_one_by_one(shared: LLM) -> None:
    """With a receive pool of a few blocks, little input buffer and a cache that cannot hold a quarter of them."""
    prompts, params = _mixed(random.Random(7), 64)
    alone = [shared.generate(prompt, p)[0] for prompt, p in zip(prompts, params, strict=True)]
    tight = {
        "block_size": 4, "pool_tokens": 16, "default_allocate_tokens": 4, "input_buffer_tokens": 48, "page_size": 4,
        "kv_cache_tokens": 160, "max_model_len": 128, "cache_tokens": 0, "max_step_tokens": 64,
    }  # fmt: skip
    with LLM(model=MODEL, **{**SETTINGS, **tight}) as llm:
        together = llm.generate(prompts, params)
        await_empty(llm)
        stats = llm.stats()["language-0"]
    assert [_what(output) for output in together] == [_what(output) for output in alone]
    assert max(output.hops.get("grant_rounds", 0) for output in together) > 1, "the pool was never short"
    assert int(str(stats["num_preemptions_total"])) > 0, "the cache was never short"


# -- errors and leaving -----------------------------------------------------------------------------------------------


def test_wrong_prompts_fail_before_anything_runs(llm: LLM) -> None:
    done = llm.stats()["language-0"]["request_success_total"]
    wrong: list[Any] = [PLACED, {"prompt": "none", "images": [b"x"]}, {"text": "a"}, 3.5, None]
    for prompt in wrong:
        with pytest.raises(BadRequest):
            llm.generate(["fine", prompt], GREEDY)
    for nothing in (None, 3.5):
        with pytest.raises(BadRequest, match=r"NoneType|float"):
            llm.generate(nothing, GREEDY)  # type: ignore[arg-type]
        with pytest.raises(BadRequest, match=r"NoneType|float"):
            llm.chat(nothing, GREEDY)  # type: ignore[arg-type]
    with pytest.raises(BadRequest):
        llm.chat(["no messages"], GREEDY)  # type: ignore[arg-type]
    assert llm.stats()["language-0"]["request_success_total"] == done


@pytest.mark.parametrize(
    ("prompt", "params", "kind"),
    [
        ({"prompt": PLACED, "images": [b"no image at all"]}, GREEDY, BadImage),
        ([1] * 5000, GREEDY, PromptTooLong),
        ([10**6], GREEDY, InvalidRequest),
    ],
)
def test_what_a_worker_refuses_names_the_reason_and_spares_the_next(
    llm: LLM, prompt: Any, params: SamplingParams, kind: type[Exception]
) -> None:
    """It is an error of the worker's class, and what brought it."""
    with pytest.raises(kind) as caught:
        llm.generate(["fine", prompt, "fine too"], params)
    assert isinstance(caught.value, RemoteFailure) and caught.value.code == kind.__name__
    assert str(caught.value) == f"{kind.__name__}: {caught.value.message}"
    with pytest.raises(kind):
        next(llm.stream(prompt, params))
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is type(caught.value) and str(again) == str(caught.value)
    await_empty(llm)
    assert len(llm.generate(["fine", "fine too"], params)) == 2


def test_leaving_a_stream_early_gives_everything_back(llm: LLM) -> None:
    params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    prompts: list[Any] = ["count for me", _image_prompt(QUESTIONS[0]["file"], "What is it?")]
    for prompt in prompts:
        for num_taken in (1, 3):
            with contextlib.closing(llm.stream(prompt, params)) as stream:  # type: ignore[type-var]
                for _, _chunk in zip(range(num_taken), stream, strict=False):
                    pass
            await_empty(llm)
    unstarted = llm.stream("never asked for", params)
    del unstarted


def test_settings_and_folders_that_cannot_be_used(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with pytest.raises(ConfigError, match="unknown setting blok_size"):
        LLM(model=MODEL, blok_size=16)
    with pytest.raises(ConfigError, match=r"transfer\.block_size"):
        LLM(model=MODEL, block_size=0)
    with pytest.raises(ConfigError, match=r"model\.dtype"):
        LLM(model=MODEL, dtype="float8")
    with pytest.raises(ConfigError, match="none does not exist; point --model"):
        LLM(model=str(tmp_path / "none"))
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(MODEL).iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(Exception, match="safetensors") as caught:
        LLM(model=str(broken), **SETTINGS)
    assert type(caught.value).__name__ == "CheckpointError"
    assert set(threading.enumerate()) <= before, "a failed construction leaves no thread"


def test_close_twice_and_use_after_close() -> None:
    before = set(threading.enumerate())
    llm = LLM(model=MODEL, **SETTINGS)
    with llm as same:
        assert same is llm
        assert len(llm.generate("Hi", GREEDY)) == 1
    llm.close()
    llm.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(EndpointClosed):
        llm.generate("Hi", GREEDY)


def test_two_at_once_do_not_meet(llm: LLM) -> None:
    with LLM(model=MODEL, **SETTINGS) as other:
        assert _what(other.generate("Hello", GREEDY)[0]) == _what(llm.generate("Hello", GREEDY)[0])
