"""Decoding by filling in masks: token for token what the published loops give, whoever shares the steps."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from language_worker.canvas import BlockPlan, Canvas, Fill
from language_worker.diffusion_params import DiffusionParams
from language_worker.engine import Engine
from language_worker.errors import Cancelled, InvalidRequest, StepFailed
from language_worker.sampling_params import SamplingParams
from tests.language_worker.helpers import Result, drive, make_engine, prompt, request
from tests.oracles_llada import (
    Choose,
    Generated,
    LladaOracle,
    by_count,
    by_entropy,
    by_factor,
    by_threshold,
    generate,
    static_counts,
)
from tests.tiny_llada import CONFIG, END_ID, MASK_ID, NUM_TOKENS, TURN_ID, make_llada

NEVER = (MASK_ID, *range(NUM_TOKENS, CONFIG["vocab_size"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llada(tmp_path_factory.mktemp("llada"), seed=3)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> LladaOracle:
    return LladaOracle(folder)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return make_engine(folder, kv_cache_tokens=8192, page_size=8)


def sampling(length: int, **diffusion: Any) -> SamplingParams:
    return SamplingParams(max_tokens=length, temperature=0, ignore_eos=True, diffusion=DiffusionParams(**diffusion))


def expected(oracle: LladaOracle, ids: tuple[int, ...], length: int, params: DiffusionParams) -> Generated:
    block_length = params.block_length or min(32, length)
    num_blocks = -(-length // block_length)

    def choose(num_masks: int) -> Choose:
        if params.schedule == "threshold":
            return by_threshold(params.threshold)
        if params.schedule == "factor":
            return by_factor(params.factor)
        if params.schedule == "entropy":
            return by_entropy(params.entropy_bound)
        return by_count(num_masks, num_masks if params.steps is None else params.steps // num_blocks)

    ends = (END_ID, TURN_ID)
    return generate(
        oracle,
        ids,
        length,
        block_length=block_length,
        choose=choose,
        never=NEVER,
        suppress=ends if params.suppress_eos else (),
        defer=ends if params.defer_eos else (),
        cfg_scale=params.cfg_scale,
        kv_policy=params.kv_policy,
        refresh_interval=params.refresh_interval,
        vicinity=params.vicinity,
        sees_future=params.canvas == "full",
    )


def draw(rng: random.Random) -> tuple[int, DiffusionParams]:
    """An answer's length and settings under which the published loop is defined."""
    length = rng.choice([1, 6, 8, 12, 16, 24])
    block_length = rng.choice([b for b in (1, 2, 3, 4, 6, 8, 12, 16, 24) if length % b == 0])
    num_blocks = length // block_length
    values: dict[str, Any] = {"block_length": block_length, "kv_policy": rng.choice(["none", "prefix", "dual"])}
    values["schedule"] = rng.choice(["static", "static", "threshold", "factor", "entropy"])
    if values["schedule"] == "static" and rng.random() < 0.7:
        values["steps"] = num_blocks * rng.randint(1, block_length)
    values["threshold"] = rng.choice([0.05, 0.2, 0.5])
    values["factor"] = rng.choice([0.5, 1.2, 1.8])
    values["entropy_bound"] = rng.choice([0.5, 3.0, 9.0])
    values["cfg_scale"] = rng.choice([0.0, 0.0, 0.7, 2.0])
    values["canvas"] = rng.choice(["full", "full", "block"])
    if values["kv_policy"] != "none":
        values["refresh_interval"] = rng.choice([0, 0, 1, 2, 3])
    if values["kv_policy"] == "dual":
        values["vicinity"] = rng.choice([0, 0, 2, 5])
    values["suppress_eos"], values["defer_eos"] = rng.random() < 0.15, rng.random() < 0.15
    return length, DiffusionParams(**values)


def test_tokens_and_forwards_are_the_published_loop_s(engine: Engine, oracle: LladaOracle) -> None:
    """160 settings, all of them under way together."""
    rng = random.Random(0)
    cases = {}
    for i in range(160):
        ids = prompt(rng.randint(1, 20), seed=i, vocab=250)
        cases[f"r{i}"] = (ids, *draw(rng))
    requests = [
        request(name, ids, SamplingParams(max_tokens=length, temperature=0, ignore_eos=True, diffusion=params))
        for name, (ids, length, params) in cases.items()
    ]
    results = drive(engine, requests)
    for name, (ids, length, params) in cases.items():
        wanted, got = expected(oracle, ids, length, params), results[name]
        assert got.error is None and got.done is not None, (name, got.error)
        assert got.tokens() == wanted.tokens, (name, params)
        assert got.done.num_forwards == len(wanted.forwards), (name, params)
        assert got.done.num_forwarded_tokens == sum(wanted.forwards), (name, params)
        assert MASK_ID not in got.tokens() and got.done.num_generated_tokens == length
        blocks = [len(chunk.token_ids) for chunk in got.chunks]
        assert blocks == [params.block_length] * (length // (params.block_length or 1))
    assert engine.scheduler.pool.num_in_use == 0


def test_alone_is_as_in_a_crowd(engine: Engine) -> None:
    rng = random.Random(1)
    requests = []
    for i in range(24):
        length, params = draw(rng)
        values = {"temperature": rng.choice([0.0, 0.7, 1.3]), "top_k": rng.choice([0, 5]), "seed": i}
        own = SamplingParams(max_tokens=length, diffusion=params, ignore_eos=True, **values)  # type: ignore[arg-type]
        requests.append(request(f"r{i}", prompt(5 + i, seed=i, vocab=250), own))
    together = drive(engine, requests)
    for one in requests:
        alone = drive(engine, [one])[one.request_id]
        assert alone.tokens() == together[one.request_id].tokens()


def test_static_counts_are_as_published() -> None:
    assert static_counts(10, 4) == [3, 3, 2, 2]
    canvas = Canvas((1,), 10, DiffusionParams(schedule="static", steps=4, block_length=10), mask_id=0)
    counts = []
    while canvas.open_positions():
        counts.append(canvas.quota())
        canvas.advance([Fill(position=p, token_id=5) for p in canvas.open_positions()[: counts[-1]]], 11)
    assert counts == [3, 3, 2, 2]


def test_steps_and_blocks_that_do_not_divide() -> None:
    """Published loops refuse them; here the last block is shorter and the first blocks take the steps left over."""
    plan = BlockPlan.of(DiffusionParams(schedule="static", steps=8, block_length=4), 10)
    assert plan.steps == (3, 3, 2) and plan.block_length == 4
    assert BlockPlan.of(DiffusionParams(block_length=4), 10).steps == (4, 4, 2)


def test_ragged_blocks_end_where_the_canvas_does(engine: Engine) -> None:
    result = drive(engine, [request("a", prompt(7, vocab=250), sampling(11, block_length=4))])["a"]
    assert [len(chunk.token_ids) for chunk in result.chunks] == [4, 4, 3]
    assert result.last().finish_reason == "length"


def test_an_end_of_text_ends_the_output_early(engine: Engine) -> None:
    """The visible tokens are those of the whole canvas, with fewer forwards."""
    params = DiffusionParams(schedule="static", block_length=8, kv_policy="none")
    bias = {END_ID: 3.0, TURN_ID: 3.0}
    values: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "diffusion": params, "logit_bias": bias}
    results = drive(
        engine,
        [
            request(f"{i} {ignore}", prompt(6, seed=i, vocab=250), SamplingParams(ignore_eos=ignore, **values))
            for i in range(20)
            for ignore in (True, False)
        ],
    )
    seen = 0
    for i in range(20):
        whole, short = (results[f"{i} {ignore}"] for ignore in (True, False))
        tokens = whole.tokens()
        ends = [p for p, token in enumerate(tokens) if token in (END_ID, TURN_ID)]
        assert short.tokens() == (tokens[: ends[0] + 1] if ends else tokens)
        assert short.done is not None and whole.done is not None
        assert short.done.num_forwards <= whole.done.num_forwards
        if ends and ends[0] < 16:
            seen += 1
            assert short.done.num_forwards < whole.done.num_forwards
            assert short.last().finish_reason == "stop"
    assert seen >= 3


def test_min_tokens_holds_the_end_back_by_position(engine: Engine) -> None:
    params = SamplingParams(
        max_tokens=16,
        temperature=0,
        min_tokens=9,
        logit_bias={TURN_ID: 50.0},
        diffusion=DiffusionParams(block_length=4),
    )
    result = drive(engine, [request("a", prompt(5, vocab=250), params)])["a"]
    assert len(result.tokens()) == 10 and result.tokens().index(TURN_ID) == 9


@pytest.mark.parametrize(
    "choice", [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5, "top_k": 9}]
)
def test_logits_that_are_not_finite_fail_their_request_alone(
    choice: dict[str, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=8, **choice, seed=1, diffusion=DiffusionParams(block_length=4))
    asked = [request("good", prompt(5, vocab=250), params), request("bad", prompt(10, 1, vocab=250), params)]
    healthy = drive(engine, asked)["good"].tokens()
    forward = engine.runner.model.forward

    def poison(inputs: Any, caches: Any) -> torch.Tensor:
        logits = forward(inputs, caches)
        if {14, 18} & set(inputs.attention.kv_lens):  # the second's first block, or all of it
            logits[-1] = torch.nan
        return logits

    monkeypatch.setattr(engine.runner.model, "forward", poison)
    results = drive(engine, asked)
    assert type(results["bad"].error) is StepFailed and "not finite" in str(results["bad"].error)
    assert results["good"].error is None and results["good"].tokens() == healthy


def test_rules_on_ids_hold_at_every_position(engine: Engine) -> None:
    allowed = [40, 50, 60]
    params = SamplingParams(
        max_tokens=12, temperature=1.0, seed=1, allowed_token_ids=allowed, banned_token_ids=[50], ignore_eos=True
    )
    result = drive(engine, [request("a", prompt(5, vocab=250), params)])["a"]
    assert set(result.tokens()) <= {40, 60} and len(result.tokens()) == 12


def test_samples_differ_and_repeat_with_the_seed(engine: Engine) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5, seed=7, n=3, ignore_eos=True)
    first, second = (drive(engine, [request("a", prompt(9, vocab=250), params)])["a"] for _ in range(2))
    outputs = [tuple(first.tokens(i)) for i in range(3)]
    assert len(set(outputs)) == 3 and outputs == [tuple(second.tokens(i)) for i in range(3)]
    assert first.done is not None and first.done.num_generated_tokens == 36


def test_best_of_keeps_the_likeliest(engine: Engine) -> None:
    params = SamplingParams(max_tokens=8, temperature=1.5, seed=7, n=1, best_of=4, ignore_eos=True, logprobs=2)
    every = drive(engine, [request("a", prompt(9, vocab=250), SamplingParams(
        max_tokens=8, temperature=1.5, seed=7, n=4, ignore_eos=True, logprobs=0))])["a"]  # fmt: skip
    best = drive(engine, [request("a", prompt(9, vocab=250), params)])["a"]

    def mean(result: Result, index: int) -> float:
        return sum(e.logprob for c in result.chunks if c.index == index for e in c.logprobs or ())

    assert best.tokens() == every.tokens(max(range(4), key=lambda i: mean(every, i)))
    assert all(len(entry.top) == 2 for chunk in best.chunks for entry in chunk.logprobs or ())


def test_random_remasking_takes_as_many_as_the_schedule_says(engine: Engine) -> None:
    values: dict[str, Any] = {"schedule": "static", "block_length": 10, "steps": 4, "remasking": "random"}
    runs = [
        drive(engine, [request("a", prompt(9, vocab=250), SamplingParams(
            max_tokens=10, temperature=0, seed=seed, ignore_eos=True,
            diffusion=DiffusionParams(**values, show_steps=True)))])["a"]
        for seed in (1, 1, 2)
    ]  # fmt: skip
    shown = [[c.preview for c in run.chunks if c.preview is not None] for run in runs]
    assert [sum(token is None for token in step or ()) for step in shown[0]] == [7, 4, 2, 0]
    assert shown[0] == shown[1] != shown[2]


def test_steps_are_shown_as_they_fill_the_block(engine: Engine) -> None:
    params = sampling(12, block_length=6, schedule="static", show_steps=True)
    result = drive(engine, [request("a", prompt(9, vocab=250), params)])["a"]
    plain = drive(engine, [request("a", prompt(9, vocab=250), sampling(12, block_length=6, schedule="static"))])["a"]
    assert result.tokens() == plain.tokens()
    previews = [chunk.preview for chunk in result.chunks if chunk.preview is not None]
    assert [sum(t is not None for t in step) for step in previews] == [1, 2, 3, 4, 5, 6] * 2
    assert list(previews[5]) + list(previews[11]) == result.tokens()


def test_refresh_every_step_is_no_cache(engine: Engine) -> None:
    for policy in ("prefix", "dual"):
        for seed in range(6):
            ids = prompt(11, seed=seed, vocab=250)
            cached = sampling(24, block_length=8, schedule="static", kv_policy=policy, refresh_interval=1)
            plain = sampling(24, block_length=8, schedule="static", kv_policy="none")
            results = drive(engine, [request("a", ids, cached), request("b", ids, plain)])
            assert results["a"].tokens() == results["b"].tokens()


def test_the_first_step_of_every_block_needs_no_cache(engine: Engine) -> None:
    """With one step a block, the cached policies compute what the one without computes, position for position."""
    for seed in range(6):
        ids = prompt(11, seed=seed, vocab=250)
        results = {
            policy: drive(engine, [request("a", ids, sampling(24, block_length=8, schedule="static", steps=3,
                                                              kv_policy=policy))])["a"]
            for policy in ("none", "prefix", "dual")
        }  # fmt: skip
        assert len({tuple(result.tokens()) for result in results.values()}) == 1
        forwarded = [result.done.num_forwarded_tokens for result in results.values() if result.done is not None]
        assert forwarded == [3 * (11 + 24)] * 3


def test_hierarchical_takes_leaders_of_runs() -> None:
    from language_worker.decode.transfer_rules import select_hierarchical

    params = DiffusionParams(schedule="hierarchical", threshold=0.9, low_threshold=0.4)
    confidence, positions = [0.3, 0.5, 0.2, 0.95, 0.39, 0.1], [4, 5, 6, 9, 11, 12]
    assert select_hierarchical(confidence, positions, params) == [1, 3]
    assert select_hierarchical([0.1, 0.2], [3, 4], params) == [1]  # the best of all, however unsure


def test_hierarchical_fills_the_canvas_in_fewer_steps(engine: Engine) -> None:
    params = sampling(16, block_length=16, schedule="hierarchical", threshold=0.9, low_threshold=0.0)
    result = drive(engine, [request("a", prompt(9, vocab=250), params)])["a"]
    assert len(result.tokens()) == 16 and result.done is not None
    assert result.done.num_forwards <= 8  # a leader in every run of masks


def test_cancelling_gives_everything_back(engine: Engine) -> None:
    engine.submit(request("a", prompt(9, vocab=250), sampling(64, block_length=8, schedule="static")))
    for _ in range(20):
        engine.step()
    assert engine.scheduler.pool.num_in_use > 0
    engine.cancel("a")
    report = engine.step()
    assert isinstance(report.outputs[-1].error, Cancelled)  # type: ignore[union-attr]
    assert engine.scheduler.pool.num_in_use == 0 and not engine.scheduler.running


def test_a_full_cache_makes_requests_wait_their_turn(folder: Path) -> None:
    """Pages for the whole canvas are taken at the start, guidance taking twice; nobody is preempted."""
    small = make_engine(folder, kv_cache_tokens=96, page_size=8, max_model_len=48)
    requests = [
        request(f"r{i}", prompt(10, seed=i, vocab=250), sampling(20, block_length=5, cfg_scale=0.5 * (i % 2)))
        for i in range(6)
    ]
    together = drive(small, requests)
    assert all(result.done is not None and result.done.num_preemptions == 0 for result in together.values())
    roomy = make_engine(folder, kv_cache_tokens=8192)
    assert {n: r.tokens() for n, r in drive(roomy, requests).items()} == {n: r.tokens() for n, r in together.items()}


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"diffusion": {"block_length": 9}, "max_tokens": 8}, "block_length is 9 and the answer has 8"),
        ({"diffusion": {"schedule": "static", "steps": 1, "block_length": 4}, "max_tokens": 8}, "steps is 1 for 2"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"max_tokens": 400, "diffusion": {"cfg_scale": 1.0}}, "max_step_tokens|kv_cache_tokens"),
    ],
)
def test_what_has_no_meaning_is_refused(folder: Path, params: dict[str, Any], named: str) -> None:
    engine = make_engine(folder, max_model_len=500, max_step_tokens=500, kv_cache_tokens=2048)
    if "diffusion" in params:
        params = params | {"diffusion": DiffusionParams(**params["diffusion"])}
    result = drive(engine, [request("a", prompt(9, vocab=250), SamplingParams(**params))])["a"]
    assert isinstance(result.error, InvalidRequest)
    with pytest.raises(InvalidRequest, match=named):
        raise result.error


def test_masks_in_the_prompt_are_refused(engine: Engine) -> None:
    result = drive(engine, [request("a", (1, MASK_ID), sampling(4))])["a"]
    assert isinstance(result.error, InvalidRequest) and "mask token" in result.error.message


@pytest.mark.parametrize(
    ("allowed", "suppress_eos"),
    [((MASK_ID,), False), ((END_ID, TURN_ID), True), ((MASK_ID, END_ID), True), ((MASK_ID, NUM_TOKENS), False)],
)
def test_a_request_that_leaves_nothing_to_choose_is_refused(
    engine: Engine, allowed: tuple[int, ...], suppress_eos: bool
) -> None:
    """Masks are never chosen, nor is the end of text where it is suppressed: with no other id allowed none is left."""

    def answer(*more: int) -> Result:
        params = replace(sampling(4, suppress_eos=suppress_eos), allowed_token_ids=(*allowed, *more))
        return drive(engine, [request("a", prompt(9, vocab=250), params)])["a"]

    refused = answer()
    assert isinstance(refused.error, InvalidRequest) and "no token to choose" in refused.error.message
    assert answer(7).tokens() == [7] * 4


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"schedule": "sorted"}, "schedule is 'sorted'; use one of static, threshold"),
        ({"threshold": 1.5}, "threshold is 1.5; use a number from 0 to 1"),
        ({"block_length": 0}, "block_length is 0"),
        ({"block_length": True}, "block_length is True"),
        ({"steps": 4}, "steps belongs to schedule 'static'"),
        ({"remasking": "random"}, "needs schedule 'static'"),
        ({"kv_policy": "none", "refresh_interval": 2}, "refresh_interval belongs"),
        ({"kv_policy": "prefix", "vicinity": 2}, "vicinity belongs"),
        ({"suppress_eos": 1}, "suppress_eos is 1; use true or false"),
        ({"cfg_scale": float("nan")}, "cfg_scale is nan"),
    ],
)
def test_parameters_are_checked(values: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        DiffusionParams(**values)
    with pytest.raises(InvalidRequest, match=named):
        SamplingParams.from_body({"diffusion": values})


def test_parameters_survive_the_wire() -> None:
    params = SamplingParams(max_tokens=5, diffusion=DiffusionParams(schedule="static", steps=3, canvas="block"))
    assert SamplingParams.from_body(params.to_body()).diffusion == params.diffusion
    with pytest.raises(InvalidRequest, match="unknown fields: speed"):
        SamplingParams.from_body({"diffusion": {"speed": 3}})


def test_draws_follow_the_softmax(folder: Path, oracle: LladaOracle) -> None:
    """One mask, 1500 seeds at temperature 0.8: how often each token comes, against the float64 distribution."""
    import torch

    ids, temperature, num_draws = prompt(6, seed=4, vocab=250), 0.8, 1500
    logits = oracle(torch.tensor([*ids, MASK_ID]))[-1]
    logits[list(NEVER)] = -torch.inf
    probability = (logits / temperature).softmax(-1)
    engine = make_engine(folder, kv_cache_tokens=8192, max_waiting=num_draws)
    values: dict[str, Any] = {"max_tokens": 1, "temperature": temperature, "ignore_eos": True}
    results = drive(engine, [request(f"r{i}", ids, SamplingParams(seed=i, **values)) for i in range(num_draws)])
    counts = torch.zeros_like(probability)
    for result in results.values():
        counts[result.tokens()[0]] += 1
    common = probability * num_draws >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([probability[common], probability[~common].sum()[None]]) * num_draws
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    degrees = len(wanted) - 1
    assert degrees >= 5
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5  # about one chance in 10,000; the seeds are fixed
