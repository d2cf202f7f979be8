"""Sampling against transformers' logits processors, against the exact distribution, and against itself in a crowd."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from language_worker.sampler import best_tokens, filter_weights, sample, token_logprob
from language_worker.sampling_params import SamplingParams
from language_worker.sampling_state import SamplingState, uniform_draw
from tests.profiles import IS_SOAK

VOCAB = 50


def _state(params: SamplingParams, *, index=0, seed=0, prompt=(), stop_ids=(), position=0, output=()) -> SamplingState:
    state = SamplingState(params, index=index, seed=seed, prompt=prompt, stop_ids=stop_ids)
    for token_id in output:
        state.observe(token_id)
    state.num_generated += position
    return state


def _logits(seed: int, rows: int = 1, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


FILTERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.3, 0.7, 1.0, 1.9]),
        "top_k": st.sampled_from([0, 1, 2, 7, 49, 50, 80]),
        "top_p": st.sampled_from([0.05, 0.3, 0.8, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    }
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(values=FILTERS, seed=st.integers(0, 1000))
def test_kept_set_and_probabilities_equal_transformers(values: dict, seed: int) -> None:
    params, logits = SamplingParams(**values), _logits(seed).double()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    expected = torch.softmax(warpers(torch.zeros(1, 0, dtype=torch.long), logits.clone()), dim=-1)[0]
    weights = torch.exp((logits - logits.max()) / params.temperature)
    kept, order = filter_weights(weights, [params])
    ours = torch.zeros(VOCAB, dtype=torch.float64).scatter_add_(0, order[0], kept[0] / kept.sum())
    assert set(ours.nonzero().flatten().tolist()) == set(expected.nonzero().flatten().tolist())
    torch.testing.assert_close(ours, expected)


def _kept_by_a_full_sort(weights: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    """id -> weight of what the filters leave, in the order of falling weight and rising id."""
    values = weights.tolist()
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))[: params.top_k if params.top_k > 0 else None]
    total, before, kept = math.fsum(values[i] for i in ranked), 0.0, {}
    for i in ranked:
        if params.top_p < 1 and before >= params.top_p * total:
            break
        before += values[i]
        kept[i] = values[i]
    return {i: w for i, w in kept.items() if w >= params.min_p * values[ranked[0]]}


@settings(max_examples=400 if IS_SOAK else 40, deadline=None, derandomize=True)
@given(
    crowd=st.lists(
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.3, 1.0, 1.9]),
            top_k=st.sampled_from([0, 1, 7, 300, 700, 2999]),
            top_p=st.sampled_from([0.05, 0.5, 0.95, 0.999, 1.0]),
            min_p=st.sampled_from([0.0, 0.001, 0.3, 1.0]),
        ),
        min_size=1,
        max_size=5,
    ),
    scale=st.sampled_from([0.01, 1.0, 6.0, 40.0]),
    has_ties=st.booleans(),
    seed=st.integers(0, 1000),
)
@example(crowd=[SamplingParams(top_p=0.05, min_p=0.3)], scale=1.0, has_ties=False, seed=1)  # top-p counts all mass
def test_what_need_not_be_sorted_is_what_a_full_sort_rejects(
    crowd: list[SamplingParams], scale: float, has_ties: bool, seed: int
) -> None:
    """In a vocabulary so large that most of it is left out before the sort."""
    logits = torch.randn(len(crowd), 3000, generator=torch.Generator().manual_seed(seed)).double() * scale
    logits = logits.round() if has_ties else logits
    temperatures = torch.tensor([p.temperature for p in crowd], dtype=torch.float64)
    weights = torch.exp((logits - logits.amax(-1, keepdim=True)) / temperatures[:, None])
    kept, order = filter_weights(weights, crowd)
    for r, params in enumerate(crowd):
        expected = _kept_by_a_full_sort(weights[r], params)
        count = len(expected)
        assert dict(zip(order[r, :count].tolist(), kept[r, :count].tolist(), strict=True)) == expected
        assert order[r, :count].tolist() == list(expected), "falling weights, equal ones by rising id"
        assert not kept[r, count:].any()
        alone, alone_order = filter_weights(weights[r : r + 1], [params])
        assert torch.equal(alone[0, :count], kept[r, :count]) and torch.equal(alone_order[0, :count], order[r, :count])


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_draws_follow_the_distribution(values: dict) -> None:
    """Chi-square over 20,000 positions of one seed; p below 1e-4 would be a wrong sampler, not bad luck."""
    params, logits = SamplingParams(**values), _logits(3)
    n = 20_000
    states = [_state(params, seed=11, position=i) for i in range(n)]
    tokens = torch.tensor([c.token_id for c in sample(logits.expand(n, -1), states)])
    counts = tokens.bincount(minlength=VOCAB).double()
    weights = torch.exp(logits.double() / params.temperature)
    kept, order = filter_weights(weights, [params])
    expected = torch.zeros(VOCAB, dtype=torch.float64).scatter_add_(0, order[0], kept[0] / kept.sum()) * n
    assert counts[expected == 0].sum() == 0, "a rejected token was drawn"
    big = expected >= 5
    observed = [*counts[big].tolist(), counts[~big].sum().item()]
    wanted = [*expected[big].tolist(), expected[~big].sum().item()]
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert len(wanted) > 2 and stats.chisquare(observed, wanted).pvalue > 1e-4


def test_uniform_draws_are_uniform_and_independent_of_each_argument() -> None:
    for draws in (
        [uniform_draw(s, 0, 0) for s in range(4000)],
        [uniform_draw(5, i, 0) for i in range(4000)],
        [uniform_draw(5, 0, p) for p in range(4000)],
    ):
        assert stats.kstest(draws, "uniform").pvalue > 1e-3
        assert abs(stats.pearsonr(draws[:-1], draws[1:]).statistic) < 0.06
    assert uniform_draw(1, 2, 3) == uniform_draw(1, 2, 3) != uniform_draw(1, 3, 2)
    assert uniform_draw(-1, 0, 0) == uniform_draw(2**64 - 1, 0, 0)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_k=st.sampled_from([0, 4]),
    top_p=st.sampled_from([0.6, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, 0.8]),
    min_tokens=st.sampled_from([0, 5]),
    logprobs=st.sampled_from([None, 0, 3]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(params=st.lists(PARAMS, min_size=1, max_size=6), seed=st.integers(0, 99))
def test_a_row_does_not_depend_on_the_others(params: list[SamplingParams], seed: int) -> None:
    logits = _logits(seed, rows=len(params))
    before = logits.clone()

    def state(i: int) -> SamplingState:
        return _state(params[i], index=i, seed=seed + i, prompt=(1, 2), stop_ids=(0,), output=(3, 4, 3))

    together = sample(logits, [state(i) for i in range(len(params))])
    assert torch.equal(logits, before), "the input logits were modified"
    assert together == [sample(logits[i : i + 1], [state(i)])[0] for i in range(len(params))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lowest_id(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 1000, dtype=dtype)
    logits[0, [17, 400, 999]] = 2.0
    logits[1, [998, 999]] = 1.0
    assert best_tokens(logits) == [17, 998, 0]
    penalized = SamplingParams(temperature=0, presence_penalty=1.0)
    assert [c.token_id for c in sample(logits, [_state(penalized)] * 3)] == [17, 998, 0]
    kept, order = filter_weights(torch.ones(1, 10, dtype=torch.float64), [SamplingParams(top_k=3)])
    assert order[0, : int((kept > 0).sum())].tolist() == [0, 1, 2]


@pytest.mark.parametrize("temperature", [1e-9, 1e-3])
def test_tiny_temperatures_stay_finite_and_pick_the_best(temperature: float) -> None:
    logits = _logits(1)
    states = [_state(SamplingParams(temperature=temperature), position=i) for i in range(20)]
    assert {c.token_id for c in sample(logits.expand(20, -1), states)} == {int(logits.argmax())}


def test_repetition_penalty_equals_transformers() -> None:
    logits, prompt, output = _logits(5), (3, 9, 3), (7, 9)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[*prompt, *output]]), logits.clone())
    params = SamplingParams(temperature=0, repetition_penalty=1.7)
    (choice,) = sample(logits, [_state(params, prompt=prompt, output=output)])
    assert choice.token_id == int(expected.argmax())
    best = int(logits.argmax())
    (moved,) = sample(logits, [_state(SamplingParams(temperature=0, repetition_penalty=99.0), prompt=(best,))])
    assert moved.token_id != best


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 4], logits[0, 6], logits[0, 8] = 3.0, 2.5, 2.2

    def pick(prompt=(), output=(), **values) -> int:
        state = _state(SamplingParams(temperature=0, **values), prompt=prompt, output=output)
        return sample(logits, [state])[0].token_id

    assert pick(prompt=(4, 4), presence_penalty=2.0, frequency_penalty=2.0) == 4
    assert pick(output=(4,), presence_penalty=0.6) == 6
    assert pick(output=(4, 4, 4), presence_penalty=0.4) == 4
    assert pick(output=(4, 4, 4), frequency_penalty=0.2) == 6
    assert pick(output=(4, 6), presence_penalty=1.0) == 8


def test_logit_bias_and_min_tokens() -> None:
    logits = _logits(2)
    best = int(logits.argmax())
    (choice,) = sample(logits, [_state(SamplingParams(temperature=0, logit_bias={7: 100.0}))])
    assert choice.token_id == 7
    (choice,) = sample(logits, [_state(SamplingParams(temperature=0, logit_bias={best: -100.0}))])
    assert choice.token_id != best
    early = SamplingParams(temperature=0, min_tokens=2)
    assert sample(logits, [_state(early, stop_ids=(best,), output=(1,))])[0].token_id != best
    assert sample(logits, [_state(early, stop_ids=(best,), output=(1, 1))])[0].token_id == best


def test_token_logprob() -> None:
    row = _logits(9)[0]
    expected = torch.log_softmax(row, -1)
    token = int(expected.argsort(descending=True)[4])
    entry = token_logprob(row, token, 3)
    assert entry.logprob == pytest.approx(expected[token].item()) and entry.rank == 5
    assert [t for t, _ in entry.top] == expected.topk(3).indices.tolist()
    assert token_logprob(row, token, 0).top == ()


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = _logits(4)
    params = SamplingParams(temperature=0.2, logit_bias={5: 50.0}, logprobs=1, top_k=3)
    (choice,) = sample(logits, [_state(params)])
    assert choice.token_id == 5 and choice.logprob is not None
    assert choice.logprob.logprob == pytest.approx(torch.log_softmax(logits[0], -1)[5].item())


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.5, "min_tokens": 3},
        {"temperature": 1.0},
        {"temperature": 5.0, "top_k": 20},
        {"temperature": 2.0, "top_p": 0.9, "logit_bias": {45: 100.0, 49: 100.0}},
        {"temperature": 0, "logprobs": 3},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_pad_the_vocabulary_are_never_chosen(values: dict, dtype: torch.dtype) -> None:
    logits = _logits(8, rows=40).to(dtype)
    logits[:, 44:] += 50.0
    before = logits.clone()
    states = [_state(SamplingParams(**values), seed=i, prompt=(46,), stop_ids=(47,)) for i in range(40)]
    choices = sample(logits, states, num_token_ids=44)
    assert all(choice.token_id < 44 for choice in choices)
    assert torch.equal(logits, before)
    free = [_state(SamplingParams(**values), seed=i, prompt=(46,), stop_ids=(47,)) for i in range(40)]
    assert all(choice.token_id >= 44 for choice in sample(logits, free)), "without the bound they always win"
    if params_logprobs := values.get("logprobs"):
        for choice in choices:
            assert (
                choice.logprob is not None and choice.logprob.rank == 1 and len(choice.logprob.top) == params_logprobs
            )
            assert all(token_id < 44 for token_id, _ in choice.logprob.top)


def test_the_bound_changes_nothing_where_the_padding_cannot_win() -> None:
    logits = _logits(9, rows=30)
    logits[:, 44:] = -1e9
    for values in ({"temperature": 0.0}, {"temperature": 1.3}, {"temperature": 0.8, "top_p": 0.9}):
        bounded = sample(logits, [_state(SamplingParams(**values), seed=i) for i in range(30)], num_token_ids=44)
        assert bounded == sample(logits, [_state(SamplingParams(**values), seed=i) for i in range(30)])
