"""Drafts change the number of steps and nothing else: the same tokens, text, log-probabilities and distribution."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from language_worker.config import EngineConfig
from language_worker.decode import create_strategy
from language_worker.decode.drafts import learn
from language_worker.decode.prompt_lookup import NGRAM_SIZES, DraftIndex
from language_worker.errors import InvalidRequest
from language_worker.plan import Window
from language_worker.request import Sequence
from language_worker.sampling_params import SamplingParams
from language_worker.sampling_state import SamplingState
from language_worker.step_logits import StepLogits
from language_worker.verification import choose
from tests.language_worker.helpers import Results, drive, make_engine, prompt, request
from tests.language_worker.test_sampling_distribution import NUM_DRAWS, check_frequencies
from tests.language_worker.toy import naive, toy_engine

# -- where drafts come from -------------------------------------------------------------------------------------------


def test_a_draft_is_what_followed_last_time() -> None:
    index = DraftIndex(8)
    assert index.propose([1, 2, 3, 4, 9, 9, 1, 2, 3, 5, 9, 9, 1, 2, 3], 3) == (5, 9, 9), "the latest occurrence"
    assert DraftIndex(8).propose([1, 2, 3, 4, 7, 2, 3, 6, 1, 2, 3], 1) == (4,), "the longest n-gram first"
    assert DraftIndex(8).propose([1, 2, 3, 4, 5], 4) == ()
    assert DraftIndex(8).propose([7], 4) == DraftIndex(8).propose([], 4) == ()


def test_a_period_is_continued_beyond_its_end() -> None:
    assert DraftIndex(8).propose([5, 1, 2, 3, 1, 2, 3], 8) == (1, 2, 3, 1, 2, 3, 1, 2)
    assert DraftIndex(8).propose([4, 4, 4], 5) == (4, 4, 4, 4, 4)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(tokens=st.lists(st.integers(0, 3), max_size=40), cuts=st.lists(st.integers(0, 40), max_size=5))
def test_an_index_that_grows_is_that_of_the_whole(tokens: list[int], cuts: list[int]) -> None:
    """Against a search from the end, whatever was asked before."""
    index = DraftIndex(5)
    for cut in sorted(cuts):
        index.propose(tokens[:cut], 5)
    expected: tuple[int, ...] = ()
    for size in NGRAM_SIZES:
        ends = [e for e in range(size, len(tokens)) if tokens[e - size : e] == tokens[-size:]]
        if len(tokens) > size and ends:
            expected = tuple(tokens[ends[-1] + i % (len(tokens) - ends[-1])] for i in range(5))
            break
    assert index.propose(tokens, 5) == expected


def test_the_number_of_drafts_follows_their_success() -> None:
    index, text = DraftIndex(8), [4] * 9
    learn(index, 8, 0, 8)
    assert len(index.propose(text, 8)) == 1
    learn(index, 1, 1, 8)
    assert len(index.propose(text, 8)) == 3
    for _ in range(5):
        learn(index, 3, 3, 8)
    assert len(index.propose(text, 20)) == 8


# -- what becomes of them ---------------------------------------------------------------------------------------------


def _step(logits: torch.Tensor, drafts: tuple[int, ...]) -> StepLogits:
    seq = Sequence(key=(0, 0), prompt=[1, 2], max_len=20)
    window = Window(seq=seq, start=1, length=1 + len(drafts), num_final=1, samples=True, drafts=drafts)
    return StepLogits(logits=logits, sampling=(window,), sample_rows=[0], prompt_slices=())


@pytest.mark.parametrize("values", [{}, {"temperature": 0.6, "top_p": 0.9}, {"presence_penalty": 1.5, "top_k": 6}])
def test_the_distribution_is_preserved(values: dict) -> None:
    """First tokens follow the first row; second ones, behind a right draft, the second row."""
    generator = torch.Generator().manual_seed(3)
    logits, params = torch.randn(3, 12, generator=generator) * 1.5, SamplingParams(seed=1, **values)
    draft = int(logits[0].argmax())
    firsts, seconds = [], []
    for i in range(NUM_DRAWS):
        state = SamplingState(params, index=i, seed=7, prompt=(), stop_ids=())
        (((first, *rest),),) = choose(_step(logits, (draft, 5)), [[state]])
        firsts.append(first.token_id)
        assert bool(rest) is (first.token_id == draft) and len(rest) <= 2
        assert len(rest) < 2 or rest[0].token_id == 5
        seconds += [choice.token_id for choice in rest[:1]]
    expected = [_probabilities(logits[0], params, ()), _probabilities(logits[1], params, (draft,))]
    check_frequencies(np.bincount(firsts, minlength=12), expected[0])
    check_frequencies(np.bincount(seconds, minlength=12), expected[1])
    assert abs(len(seconds) / NUM_DRAWS - expected[0][draft]) < 0.03


def _probabilities(row: torch.Tensor, params: SamplingParams, seen: tuple[int, ...]) -> np.ndarray:
    scores = row.double().numpy().copy()
    scores[list(seen)] -= params.presence_penalty
    scores /= params.temperature
    order = np.argsort(-scores)
    weights = np.exp(scores - scores.max())
    if params.top_k:
        weights[order[params.top_k :]] = 0
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= params.top_p * weights.sum()]] = 0
    return weights / weights.sum()


REPETITIVE = [(*prompt(7, seed=i), *prompt(6, seed=90) * 4, *prompt(2, seed=90)) for i in range(6)]
KINDS = [
    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, repetition_penalty=1.2, logprobs=2),
    SamplingParams(temperature=0.8, top_p=0.9, seed=2, n=2, max_tokens=33, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=3, max_tokens=25, frequency_penalty=0.3, min_tokens=10, logprobs=0),
    SamplingParams(temperature=0, max_tokens=50, logit_bias={7: 3.0, 9: 3.0}, stop="e", ignore_eos=True),
    SamplingParams(temperature=0.3, max_tokens=21, seed=9, n=2, best_of=3, ignore_eos=True, prompt_logprobs=1),
]


def _shown(results: Results) -> dict[str, list[tuple]]:
    return {
        name: [
            (
                result.tokens(i),
                result.text(i),
                result.last(i).finish_reason,
                result.last(i).stop_reason,
                [(e.token_id, e.rank) for c in result.chunks if c.index == i for e in c.logprobs or ()],
            )
            for i in range(1 + max(c.index for c in result.chunks))
        ]
        for name, result in results.items()
    }


@pytest.mark.parametrize(
    "config", [{}, {"page_size": 4, "kv_cache_tokens": 160, "max_model_len": 100, "max_num_seqs": 3}]
)
def test_output_is_identical(config: dict, tiny: Path) -> None:
    """Greedy and seeded, with penalties, stops amid accepted drafts, samples, best_of; also preempted."""
    asked = [request(f"r{i}", REPETITIVE[i % 6], kind) for i, kind in enumerate(KINDS * 2)]
    plain = drive(make_engine(tiny), asked)
    engine = make_engine(tiny, decode_strategy="speculative", **config)
    drafted = drive(engine, asked)
    assert _shown(drafted) == _shown(plain)
    stats = engine.stats()
    assert stats["spec_decode_num_draft_tokens_total"] >= stats["spec_decode_num_accepted_tokens_total"] > 20
    assert stats["kv_pages_referenced"] == 0
    for name, result in drafted.items():
        assert result.done.num_generated_tokens == plain[name].done.num_generated_tokens
    if config:
        assert stats["num_preemptions_total"] > 0


def test_fewer_steps_where_text_repeats_itself(tiny: Path) -> None:
    counts = {}
    for strategy in ("autoregressive", "speculative"):
        engine, counts[strategy] = make_engine(tiny, decode_strategy=strategy), []
        run = engine.runner.run
        engine.runner.run = lambda plan, run=run, own=counts[strategy]: own.append(1) or run(plan)
        sampling = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logit_bias={7: 50.0})
        drive(engine, [request("a", prompt(5), sampling)])
    assert len(counts["autoregressive"]) == 60
    assert len(counts["speculative"]) <= 16, "up to nine tokens a step"


@pytest.mark.parametrize("seed", range(4))
def test_drafts_leave_room_for_prefills_and_take_pages_from_nobody(seed: int, tiny: Path) -> None:
    """On the toy: tiny step budgets and pools; every answer is the naive decoder's and every prompt is begun."""
    rng = random.Random(seed)
    sampling = SamplingParams(temperature=0, seed=0, max_tokens=24, ignore_eos=True)
    asked = [
        request(f"r{i}", [rng.randrange(4) for _ in range(20)], dataclasses.replace(sampling, seed=i)) for i in range(8)
    ]
    engine = toy_engine(tiny, num_pages=24, strategy=create_strategy("speculative"), max_step_tokens=6, page_size=4)
    widths = []

    def look() -> None:
        widths.append(sum(seq.missing > 1 for seq in engine.scheduler.running))

    results = drive(engine, asked, on_step=look)
    for one in asked:
        assert results[one.request_id].tokens() == naive(one)[0]
    assert engine.stats()["spec_decode_num_accepted_tokens_total"] > 5 and any(widths)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"decode_strategy": "magic"}, "decode_strategy"),
        ({"num_draft_tokens": 0}, "num_draft_tokens"),
        ({"num_draft_tokens": 16}, "num_draft_tokens"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(values: dict, word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        EngineConfig(**values)
