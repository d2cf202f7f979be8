"""Drawn tokens follow the distribution that an independent float64 oracle gives, for every parameter and for mixtures.

The oracle: transformers' processors where it has one (repetition, temperature, top-k, top-p, min-p), the formulas of
OpenAI's documentation for presence and frequency, minus infinity for what may not be chosen. Chi-square over many draws
of fixed seeds; a p-value below 1e-5 would be a wrong sampler, not bad luck.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from language_worker.errors import InvalidRequest
from language_worker.sampler import sample
from language_worker.sampling_params import SamplingParams
from language_worker.sampling_state import SamplingState
from tests.language_worker.helpers import GREEDY, drive, make_engine, prompt, request
from tests.profiles import IS_SOAK

VOCAB = 40
NUM_DRAWS = 20_000 if IS_SOAK else 4_000
PROMPT, OUTPUT, STOP_IDS = (3, 9, 3, 20), (7, 9, 7, 7, 31), (11, 12)

EACH = {
    "plain": {},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.4},
    "top_k": {"top_k": 6},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.15},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.9},
    "negative frequency": {"frequency_penalty": -0.4},
    "repetition": {"repetition_penalty": 1.6},
    "repetition below one": {"repetition_penalty": 0.7},
    "bias": {"logit_bias": {4: 3.0, 7: -2.0, 8: 1.5}},
    "allowed": {"allowed_token_ids": [1, 4, 7, 9, 30, 31, 39]},
    "banned": {"banned_token_ids": [0, 7, 9, 22]},
    "min_tokens": {"min_tokens": 6},
    "min_tokens reached": {"min_tokens": 5},
}
MIXED = {
    "filters": {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
    "penalties": {"presence_penalty": 0.6, "frequency_penalty": 0.5, "repetition_penalty": 1.3},
    "bias on the banned": {"logit_bias": {7: 50.0, 5: 2.0}, "banned_token_ids": [7]},
    "allowed, but stops held back": {"allowed_token_ids": [5, 11, 12, 13, 14], "min_tokens": 9, "temperature": 2.0},
    "all": {
        "temperature": 1.2, "top_k": 15, "top_p": 0.85, "min_p": 0.01, "presence_penalty": 0.4,
        "frequency_penalty": 0.3, "repetition_penalty": 1.2, "logit_bias": {2: 1.0}, "banned_token_ids": [3],
        "min_tokens": 8,
    },
}  # fmt: skip


def _logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2.0


def _oracle(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """Probabilities after PROMPT and OUTPUT, float64."""
    history = torch.tensor([[*PROMPT, *OUTPUT]])
    scores = logits.double()[None].clone()
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(history, scores)
    for token_id in set(OUTPUT):
        scores[0, token_id] -= params.presence_penalty + params.frequency_penalty * OUTPUT.count(token_id)
    for token_id, bias in params.logit_bias.items():
        scores[0, token_id] += bias
    excluded = set(params.banned_token_ids) | (set(STOP_IDS) if len(OUTPUT) < params.min_tokens else set())
    allowed = set(range(VOCAB)) if params.allowed_token_ids is None else set(params.allowed_token_ids)
    scores[0, sorted(set(range(VOCAB)) - (allowed - excluded))] = -torch.inf
    scores = TemperatureLogitsWarper(params.temperature)(history, scores)
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(history, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(history, scores)
    if params.min_p > 0:
        scores = MinPLogitsWarper(params.min_p)(history, scores)
    return torch.softmax(scores, dim=-1)[0].numpy()


def _states(params: SamplingParams, count: int) -> list[SamplingState]:
    """Samples 0, 1, ... of one request, all after OUTPUT."""
    states = [SamplingState(params, index=i, seed=17, prompt=PROMPT, stop_ids=STOP_IDS) for i in range(count)]
    for state in states:
        for token_id in OUTPUT:
            state.observe(token_id)
    return states


def check_frequencies(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Counts of drawn ids agree with their probabilities; ids of probability 0 never occur."""
    expected = probabilities * counts.sum()
    assert counts[expected == 0].sum() == 0, "a token outside the support was drawn"
    big = expected >= 5
    observed, wanted = [*counts[big], counts[~big].sum()], [*expected[big], expected[~big].sum()]
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert len(wanted) > 1, "nothing to test"
    assert stats.chisquare(observed, wanted).pvalue > 1e-5


@pytest.mark.parametrize("name", [*EACH, *MIXED])
def test_draws_follow_the_oracle(name: str) -> None:
    params, logits = SamplingParams(**(EACH | MIXED)[name]), _logits(5)
    choices = sample(logits.expand(NUM_DRAWS, -1), _states(params, NUM_DRAWS))
    counts = np.bincount([choice.token_id for choice in choices], minlength=VOCAB)
    check_frequencies(counts, _oracle(logits, params))


def test_the_chi_square_sees_a_wrong_distribution() -> None:
    """The check itself: draws at temperature 1 are no draws at 1.15."""
    logits = _logits(5)
    choices = sample(logits.expand(NUM_DRAWS, -1), _states(SamplingParams(), NUM_DRAWS))
    counts = np.bincount([choice.token_id for choice in choices], minlength=VOCAB)
    with pytest.raises(AssertionError):
        check_frequencies(counts, _oracle(logits, SamplingParams(temperature=1.15)))


PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.3, 1.0, 1.9]),
        "top_k": st.sampled_from([1, 3, 39, 40, 41]),
        "top_p": st.sampled_from([0.05, 0.5, 0.95]),
        "min_p": st.sampled_from([0.02, 0.5, 1.0]),
        "presence_penalty": st.sampled_from([-2.0, 1.0]),
        "frequency_penalty": st.sampled_from([-1.0, 2.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.8]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -1.0, 100.0]), max_size=3),
        "allowed_token_ids": st.lists(st.integers(0, VOCAB - 1), min_size=3, max_size=30),
        "banned_token_ids": st.lists(st.integers(0, VOCAB - 1), max_size=5),
        "min_tokens": st.sampled_from([1, 6]),
    },
)


class _Drawing:
    """A state that draws a given number."""

    def __init__(self, state: SamplingState, number: float) -> None:
        self._state, self._number = state, number

    def draw(self) -> float:
        return self._number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def _spread(probabilities: np.ndarray) -> list[float]:
    """Both ends of [0, 1), and the middle of what each token takes of it: by rising id, and by falling probability."""
    middles = [p.cumsum() - p / 2 for p in (probabilities, np.sort(probabilities)[::-1])]
    return [0.0, np.nextafter(1.0, 0.0), *np.concatenate(middles).clip(0.0, np.nextafter(1.0, 0.0)).tolist()]


@settings(max_examples=600 if IS_SOAK else 150, deadline=None, derandomize=True)
@given(values=PARAMS, seed=st.integers(0, 500))
def test_the_support_is_that_of_the_oracle(values: dict, seed: int) -> None:
    """Draws spread over [0, 1), both ends among them, choose every token of it and no other."""
    try:
        params = SamplingParams(**values)
    except InvalidRequest:
        return
    logits = _logits(seed)
    probabilities = _oracle(logits, params)
    if np.isnan(probabilities).any():
        return  # nothing is left to choose: refused on intake
    states = [_Drawing(state, number) for number in _spread(probabilities) for state in _states(params, 1)]
    drawn = {choice.token_id for choice in sample(logits.expand(len(states), -1), states)}
    assert drawn <= set(np.flatnonzero(probabilities).tolist())
    assert drawn >= set(np.flatnonzero(probabilities > 1e-9).tolist())
    greedy = SamplingParams(**{**values, "temperature": 0, "top_k": 0, "top_p": 1.0, "min_p": 0.0})
    (best,) = sample(logits[None], _states(greedy, 1))
    assert probabilities[best.token_id] == probabilities.max()


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(max_tokens=1, n=128), SamplingParams(max_tokens=1, n=128, temperature=0.7, top_p=0.8, top_k=20)],
)
def test_tokens_of_the_engine_follow_the_models_logits(sampling: SamplingParams, tiny: Path) -> None:
    """From the prompt to the token: the samples of many requests against the softmax of the returned logits."""
    engine, ids = make_engine(tiny, max_num_seqs=4), prompt(11)
    asked = request("logits", ids, dataclasses.replace(GREEDY, max_tokens=1), return_logits=True)
    logits = drive(engine, [asked])["logits"].logits[-1].double()
    vocab = logits.shape[0]
    scores = logits[None] / sampling.temperature
    if sampling.top_k:
        scores = TopPLogitsWarper(sampling.top_p)(None, TopKLogitsWarper(sampling.top_k)(None, scores))
    results = drive(
        engine, [request(f"r{i}", ids, dataclasses.replace(sampling, seed=i)) for i in range(NUM_DRAWS // 128)]
    )
    counts = np.bincount([t for r in results.values() for i in range(128) for t in r.tokens(i)], minlength=vocab)
    check_frequencies(counts, torch.softmax(scores, dim=-1)[0].numpy())


EOS = -1  # stands for the model's


@pytest.mark.parametrize(
    ("values", "is_refused"),
    [
        ({"allowed_token_ids": [EOS], "min_tokens": 2}, True),
        ({"allowed_token_ids": [EOS, 1], "min_tokens": 2}, False),
        ({"allowed_token_ids": [EOS]}, False),
        ({"allowed_token_ids": [7], "stop_token_ids": [7], "min_tokens": 1}, True),
        ({"banned_token_ids": range(10**4)}, True),
        ({"allowed_token_ids": [10**6]}, True),
        ({"banned_token_ids": [10**6]}, True),
    ],
)
def test_what_leaves_nothing_to_choose_is_refused(values: dict, is_refused: bool, tiny: Path) -> None:
    engine = make_engine(tiny)
    eos, vocab = engine.tokenizer.eos_token_ids[0], engine.spec.vocab_size
    values = {
        name: [eos if t == EOS else t for t in value if t < vocab or len(value) == 1]
        if name.endswith("_ids")
        else value
        for name, value in values.items()
    }
    asked = request("a", prompt(5), SamplingParams(max_tokens=3, temperature=1.0, seed=1, **values))
    result = drive(engine, [asked])["a"]
    assert isinstance(result.error, InvalidRequest) is is_refused
    if not is_refused:
        assert set(result.tokens()) <= set(values["allowed_token_ids"])


def test_allowed_and_banned_ids_hold_over_a_whole_answer(tiny: Path) -> None:
    allowed, banned = list(range(50, 60)), [53, 57]
    sampling = SamplingParams(
        max_tokens=40, temperature=2.0, seed=4, ignore_eos=True, allowed_token_ids=allowed, banned_token_ids=banned, n=3
    )
    result = drive(make_engine(tiny), [request("a", prompt(9), sampling)])["a"]
    assert {t for i in range(3) for t in result.tokens(i)} == set(allowed) - set(banned)
