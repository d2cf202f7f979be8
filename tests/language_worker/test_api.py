"""Strict values at the border: ranges, types, and exact round trips through plain maps."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from language_worker.api import GenerateRequest, TokenChunk, TokenLogprob
from language_worker.config import EngineConfig
from language_worker.errors import InvalidRequest
from language_worker.sampling_params import SamplingParams

BAD = [
    *(("max_tokens", v) for v in (0, -1, 1.0, True, "5", 2**31, 10**5000)),
    *(("n", v) for v in (0, 129, None, 1.5)),
    *(("seed", v) for v in (2**64, -(2**63) - 1, 1.0, "x")),
    *(("temperature", v) for v in (-0.1, math.nan, math.inf, "1", None, True, 101, 10**400)),
    *(("top_p", v) for v in (0, 0.0, 1.1, -1, None)),
    *(("top_k", v) for v in (-2, 1.5, None, 2**31, 2**63, 10**30)),
    *(("min_p", v) for v in (-0.1, 1.1)),
    *((name, v) for name in ("presence_penalty", "frequency_penalty") for v in (-2.1, 2.1, math.nan)),
    *(("repetition_penalty", v) for v in (0, -1, 1e-40, 0.0099, math.inf)),
    *(("logit_bias", v) for v in ([1], {-1: 0.0}, {"1": 0.0}, {1: 101.0}, {1: "x"}, {True: 1.0}, {2**31: 1.0}, None)),
    *(("stop", v) for v in ("", [""], [1], None, ["x"] * 17, "x" * 1001, {"a": 1}, b"x")),
    *(("stop_token_ids", v) for v in ([-1], [1.0], "12", None, [1] * 257, 5, [2**31], [10**30])),
    *((name, v) for name in ("allowed_token_ids", "banned_token_ids") for v in ([-1], ["1"], 5, "12", [0] * 32769)),
    *(("allowed_token_ids", v) for v in ([], ())),
    *(("banned_token_ids", v) for v in (None,)),
    *(("best_of", v) for v in (0, 129, 1.0)),
    *(("min_tokens", v) for v in (-1, None, 1.0, 2**31, 10**30)),
    *(("ignore_eos", v) for v in (1, "true", None)),
    *((name, v) for name in ("logprobs", "prompt_logprobs") for v in (-1, 21, True, 1.0)),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: "huge" if value == 10**5000 else repr(value)[:30])
def test_bad_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=name):
        SamplingParams(**{name: value})


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens"):
        SamplingParams(max_tokens=3, min_tokens=4)


PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(5, 100),
    n=st.integers(1, 4),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    temperature=st.floats(0, 2),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(-1, 50),
    logit_bias=st.dictionaries(st.integers(0, 99), st.floats(-100, 100), max_size=3),
    stop=st.lists(st.text(min_size=1, max_size=3), max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    allowed_token_ids=st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=3).map(tuple),
    banned_token_ids=st.lists(st.integers(100, 199), max_size=3).map(tuple),
    best_of=st.none() | st.integers(4, 9),
    min_tokens=st.integers(0, 5),
    logprobs=st.none() | st.integers(0, 20),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(params=PARAMS)
def test_bodies_round_trip_through_json(params: SamplingParams) -> None:
    back = SamplingParams.from_body(json.loads(json.dumps(params.to_body())))
    assert back.to_body() == params.to_body()


def test_from_body_is_strict() -> None:
    for body in ({"temperatur": 1.0}, {"logit_bias": [1, 2]}, {"logit_bias": 5}, {"max_tokens": "3"}):
        with pytest.raises(InvalidRequest):
            SamplingParams.from_body(body)
    with pytest.raises(InvalidRequest, match="map"):
        SamplingParams.from_body([])  # type: ignore[arg-type]


GOOD = {"request_id": "a", "prompt_token_ids": [1, 2], "num_media": 0, "sampling": {}, "ticket": None}


@pytest.mark.parametrize(
    "change",
    [
        {"request_id": ""},
        {"request_id": 5},
        {"request_id": "x" * 257},
        {"prompt_token_ids": []},
        {"prompt_token_ids": [1, "2"]},
        {"prompt_token_ids": [-1]},
        {"prompt_token_ids": [True]},
        {"prompt_token_ids": "12"},
        {"prompt_token_ids": None},
        {"num_media": -1},
        {"return_logits": 1},
        {"deadline_ms": -5},
        {"deadline_ms": 1.5},
        {"deadline_ms": 2**63 - 1},
        {"sampling": {"x": 1}},
        {"sampling": [1]},
        {"surprise": 1},
    ],
    ids=str,
)
def test_bad_requests_are_refused(change: dict) -> None:
    GenerateRequest.from_body(GOOD)
    with pytest.raises(InvalidRequest):
        GenerateRequest.from_body(GOOD | change)


def test_missing_fields_are_named() -> None:
    with pytest.raises(InvalidRequest, match="prompt_token_ids"):
        GenerateRequest.from_body({"request_id": "a"})


def test_chunk_round_trip() -> None:
    entry = TokenLogprob(token_id=4, logprob=-0.5, rank=1, top=((4, -0.5), (2, -1.5)))
    for chunk in (
        TokenChunk(request_id="a", index=1, token_ids=(4,), text="x", num_prompt_tokens=7),
        TokenChunk(
            request_id="a",
            index=0,
            token_ids=(4,),
            text="",
            finish_reason="stop",
            stop_reason="end",
            logprobs=(entry,),
            num_prompt_tokens=7,
            prompt_logprobs=(None, entry),
        ),
    ):
        body = json.loads(json.dumps(chunk.to_body()))
        assert TokenChunk.from_body("a", body, num_prompt_tokens=7) == chunk


@pytest.mark.parametrize(
    "values",
    [
        {"dtype": "int8"},
        {"page_size": 0},
        {"max_num_seqs": 0},
        {"max_step_tokens": 10, "max_num_seqs": 11},
        {"gpu_memory_fraction": 0},
        {"max_model_len": -1},
        {"num_threads": True},
    ],
    ids=str,
)
def test_bad_engine_configs_are_refused_by_name(values: dict) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(values))):
        EngineConfig(**values)
