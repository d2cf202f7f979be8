"""Softmax statistics, cuts and Gumbel-max draws against oracles that walk through the vocabulary."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dispatch import Path, forced
from kernels.philox import gumbel, philox
from kernels.sampling import Cut, filter_cut, gumbel_max, keep_mask, softmax_statistics, token_logprobs
from tests import oracles_sampling as oracles
from tests.kernels.paths import PATHS
from tests.profiles import IS_SOAK
from tests.tolerances import assert_matches

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_SEED = 2**63 - 1


def _logits(seed: int, rows: int, vocab: int, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """A view with strides, NaN around it, rounded so that ties occur, some -inf."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(rows, vocab, generator=generator) * scale * 4).round() / 4
    values[torch.rand(rows, vocab, generator=generator) < 0.1] = -math.inf
    around = torch.full((rows, vocab + 7), math.nan, dtype=dtype)
    around[:, 3 : 3 + vocab] = values
    return around[:, 3 : 3 + vocab]


def _column(values: list[float] | list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64 if isinstance(values[0], int) else torch.float32)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=200 if IS_SOAK else 25, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 3, 70]),
    vocab=st.sampled_from([1, 2, 5, 33, 2048, 2049, 9001]),
    scale=st.sampled_from([0.01, 1.0, 8.0, 2000.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_softmax_statistics(rows: int, vocab: int, scale: float, dtype: torch.dtype, seed: int, path: Path) -> None:
    rows = rows if vocab < 100 else min(rows, 2)
    logits = _logits(seed, rows, vocab, dtype, scale)
    with forced(path):
        found = softmax_statistics(logits)
    for r in range(rows):
        maximum, argmax, lse, confidence, entropy = oracles.softmax_statistics(logits[r])
        assert (float(found.maximum[r]), int(found.argmax[r])) == (maximum, argmax)
        actual = torch.stack([found.log_sum_exp[r], found.confidence[r], found.entropy[r]])
        if maximum == -math.inf:
            assert actual.tolist() == [-math.inf, 0.0, 0.0]
        else:
            assert_matches(actual, torch.tensor([lse, confidence, entropy], dtype=torch.float64), reduced=16)
            logprob = token_logprobs(logits[r : r + 1], found.argmax[r : r + 1], found.log_sum_exp[r : r + 1])
            assert_matches(logprob, torch.tensor([maximum - lse], dtype=torch.float64), reduced=max(1, int(scale)) ** 2)


@pytest.mark.parametrize("path", PATHS)
def test_statistics_of_rows_of_minus_infinity_of_lowest_numbers_and_of_no_rows(path: Path) -> None:
    logits = torch.full((3, 5000), -math.inf)
    logits[1, 4000] = -2.0
    logits[2] = torch.finfo(torch.float32).min
    logits[2, 7] = 3.0
    with forced(path):
        found = softmax_statistics(logits)
        assert softmax_statistics(logits[:0]).entropy.shape == (0,)
    assert found.maximum.tolist() == [-math.inf, -2.0, 3.0]
    assert found.argmax.tolist() == [0, 4000, 7]
    assert found.log_sum_exp.tolist() == [-math.inf, -2.0, 3.0]
    assert found.confidence.tolist() == [0.0, 1.0, 1.0]
    assert found.entropy.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=300 if IS_SOAK else 40, deadline=None, derandomize=True)
@given(
    vocab=st.sampled_from([1, 2, 7, 64, 1000, 2500]),
    settings_=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.3, 1.0, 5.0]),
            st.sampled_from([-1, 0, 1, 2, 5, 40, 10_000]),
            st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
            st.sampled_from([0.0, 0.02, 0.5, 1.0]),
        ),
        min_size=1,
        max_size=4,
    ),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_cuts_keep_what_sorting_keeps(
    vocab: int, settings_: list[tuple[float, int, float, float]], dtype: torch.dtype, seed: int, path: Path
) -> None:
    logits = _logits(seed, len(settings_), vocab, dtype, 2.0)
    temperature, top_k, top_p, min_p = (_column(list(column)) for column in zip(*settings_, strict=True))
    with forced(path):
        cut = filter_cut(logits, temperature, top_k, top_p, min_p)
    kept = keep_mask(logits, cut)
    for r, row_settings in enumerate(settings_):
        actual = set(kept[r].nonzero()[:, 0].tolist())
        assert oracles.kept_ids(logits[r], *row_settings, slack=-1e-5) <= actual
        assert actual <= oracles.kept_ids(logits[r], *row_settings, slack=1e-5)


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_its_published_words(key: int, counter: tuple[int, ...], words: tuple[int, ...]) -> None:
    found = philox(torch.tensor(key), tuple(torch.tensor(word) for word in counter))  # type: ignore[arg-type]
    assert tuple(int(word) for word in found) == words
    assert oracles.philox((key & oracles.WORD, (key >> 32) & oracles.WORD), counter) == words  # type: ignore[arg-type]


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=200 if IS_SOAK else 30, deadline=None, derandomize=True)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.5, 1.0, 3.0]),
            st.integers(-LARGEST_SEED, LARGEST_SEED),
            st.integers(0, 3),
            st.integers(0, 2**33),
        ),
        min_size=1,
        max_size=4,
    ),
    vocab=st.sampled_from([1, 2, 5, 257, 2048, 5003]),
    is_cut=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_gumbel_max_takes_the_highest_perturbed_logit(
    rows: list[tuple[float, int, int, int]], vocab: int, is_cut: bool, dtype: torch.dtype, seed: int, path: Path
) -> None:
    logits = _logits(seed, len(rows), vocab, dtype, 2.0)
    temperature, seeds, samples, positions = (_column(list(column)) for column in zip(*rows, strict=True))
    off = torch.zeros(len(rows))
    cut = filter_cut(logits, temperature, torch.full((len(rows),), 20), off + 0.9, off) if is_cut else None
    with forced(path):
        ids = gumbel_max(logits, temperature, seeds, samples, positions, cut)
        alone = [
            gumbel_max(logits[r : r + 1], temperature[r : r + 1], seeds[r : r + 1], samples[r : r + 1],
                       positions[r : r + 1], None if cut is None else Cut(
                           threshold=cut.threshold[r : r + 1], last_tie=cut.last_tie[r : r + 1]))
            for r in range(len(rows))
        ]  # fmt: skip
    assert torch.equal(torch.cat(alone), ids)
    for r, (heat, key, sample, position) in enumerate(rows):
        allowed = range(vocab) if cut is None else keep_mask(logits, cut)[r].nonzero()[:, 0].tolist()
        scores = {i: float(logits[r, i]) + heat * oracles.gumbel(key, position, sample, i) for i in allowed}
        best = max(scores.values(), default=-math.inf)
        chosen = int(ids[r])
        if best == -math.inf:
            assert chosen == 0
        else:
            assert scores[chosen] >= best - 1e-4 * max(1.0, abs(best))
        if heat == 0:
            assert chosen == int(logits[r].float().argmax())


@pytest.mark.parametrize("path", PATHS)
def test_of_equal_logits_the_id_with_the_highest_noise_is_drawn(path: Path) -> None:
    """Every row another seed, sample and position, one beyond 32 bits; the vocabulary takes several blocks."""
    seeds, samples, positions = [3, -1, 2**62 + 5, -(2**63)], [0, 1, 2, 7], [0, 9, 2**32 + 1, 12345]
    vocab = 5003
    noise = [
        [oracles.gumbel(seed, position, sample, i) for i in range(vocab)]
        for seed, sample, position in zip(seeds, samples, positions, strict=True)
    ]
    expected = [max(range(vocab), key=row.__getitem__) for row in noise]
    with forced(path):
        ids = gumbel_max(torch.zeros(4, vocab), torch.ones(4), _column(seeds), _column(samples), _column(positions))
    assert ids.tolist() == expected
    assert len({i % 4 for i in expected}) > 1


@pytest.mark.parametrize("path", PATHS)
def test_ties_take_the_lowest_id_across_blocks_and_rising_logits_are_weighed_anew(path: Path) -> None:
    logits = torch.stack([torch.zeros(9001), torch.linspace(-5, 5, 9001)])
    with forced(path):
        found = softmax_statistics(logits)
        half = filter_cut(torch.zeros(1, 4), torch.ones(1), torch.tensor([0]), torch.tensor([0.5]), torch.zeros(1))
    assert found.argmax.tolist() == [0, 9000]
    expected = [oracles.softmax_statistics(row)[4] for row in logits]
    assert_matches(found.entropy, torch.tensor(expected, dtype=torch.float64), reduced=16)
    assert keep_mask(torch.zeros(1, 4), half).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(("path", "draws"), [("torch", 20_000), ("triton", 400)])
def test_draws_follow_the_softmax(path: Path, draws: int) -> None:
    """Chi-square over draws of one row of 6; with 5 degrees of freedom the 1e-4 quantile is 25.7."""
    row = torch.randn(6, generator=torch.Generator().manual_seed(5))
    temperature = 1.7
    expected = torch.softmax(row.double() / temperature, 0) * draws
    with forced(path):
        ids = gumbel_max(
            row.expand(draws, 6),
            torch.full((draws,), temperature),
            torch.full((draws,), 11),
            torch.zeros(draws, dtype=torch.int64),
            torch.arange(draws),
        )
    counts = torch.bincount(ids, minlength=6).double()
    assert float(((counts - expected) ** 2 / expected).sum()) < 25.7


def test_noise_is_the_oracles() -> None:
    random_numbers = random.Random(3)
    for _ in range(200):
        seed, position = random_numbers.getrandbits(64) - 2**63, random_numbers.getrandbits(31)
        sample, token_id = random_numbers.randrange(8), random_numbers.randrange(200_000)
        actual = gumbel(*(torch.tensor(value) for value in (seed, position, sample, token_id)))
        assert math.isclose(float(actual), oracles.gumbel(seed, position, sample, token_id), rel_tol=2e-5, abs_tol=1e-5)


def test_shapes_that_do_not_fit_are_refused() -> None:
    logits, one = torch.zeros(2, 5), torch.ones(1)
    with pytest.raises(ValueError, match="with a vocabulary"):
        softmax_statistics(torch.zeros(2, 0))
    with pytest.raises(ValueError, match="temperature needs one value per row, 2 in all"):
        filter_cut(logits, one, one.long(), one, one)
    with pytest.raises(ValueError, match="seeds needs one value per row"):
        gumbel_max(logits, torch.ones(2), one.long(), one.long(), one.long())
