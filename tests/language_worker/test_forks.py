"""n and best_of: the prompt is computed once, its pages are shared, and nothing of it shows in the tokens."""

from pathlib import Path

import pytest
import torch

from language_worker.engine import Engine
from language_worker.errors import Cancelled
from language_worker.page_keeper import NOTHING, PageKeeper
from language_worker.page_pool import PagePool
from language_worker.request import Sequence
from language_worker.sampling_params import SamplingParams
from tests.language_worker.helpers import Media, Result, Results, drive, make_engine, prompt, request
from tests.tiny_tokenizer import TOKEN_IDS

PAD = TOKEN_IDS["<|image_pad|>"]
NEW = 12


def _sampling(n: int, **values) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=5, n=n, max_tokens=NEW, ignore_eos=True, **values)


def _count_tokens(engine: Engine) -> list[int]:
    """Query tokens of each step from now on."""
    counts, run = [], engine.runner.run

    def counted(plan):
        counts.append(plan.num_tokens)
        return run(plan)

    engine.runner.run = counted
    return counts


def _samples(result: Result, n: int) -> list[list[int]]:
    return [result.tokens(i) for i in range(n)]


def _unshared(folder: Path, asked, media=None) -> Results:
    """The same where samples never run side by side and each computes its prompt itself."""
    return drive(make_engine(folder, max_num_seqs=1), asked, media)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 70])
def test_the_prompt_is_computed_once_and_its_pages_are_shared(length: int, tiny: Path) -> None:
    """Lengths around the page's border (32), where nothing, one token, or nearly a page is copied."""
    engine, n = make_engine(tiny), 4
    counts, held = _count_tokens(engine), []
    asked = [request("a", prompt(length), _sampling(n))]
    results = drive(engine, asked, on_step=lambda: held.append(engine.stats()["kv_pages_referenced"]))
    assert counts == [length] + [n] * (NEW - 1)
    assert max(held) == length // 32 + n * (-(-(length + NEW - 1) // 32) - length // 32)
    assert held[-1] == 0
    alone = _unshared(tiny, asked)
    assert _samples(results["a"], n) == _samples(alone["a"], n)
    assert len(set(map(tuple, _samples(results["a"], n)))) == n
    assert results["a"].done is not None and results["a"].done.num_generated_tokens == n * NEW


@pytest.mark.parametrize("config", [{"num_pages": 20}, {"num_pages": 26}, {"num_pages": 40, "max_num_seqs": 3}])
def test_forks_in_tiny_pools_and_few_seats(config: dict, tiny: Path) -> None:
    """Preempted forks go on where they were, on a sibling's pages again where one still runs."""
    pages = config.pop("num_pages")
    asked = [request(f"r{i}", prompt(17 + 3 * i, seed=i), _sampling(3 + i % 3)) for i in range(5)]
    engine = make_engine(tiny, page_size=4, kv_cache_tokens=4 * pages, max_model_len=4 * 14, **config)
    tight, free = drive(engine, asked), _unshared(tiny, asked)
    for one in asked:
        n = one.sampling.n
        assert _samples(tight[one.request_id], n) == _samples(free[one.request_id], n)
    assert engine.stats()["kv_pages_referenced"] == 0
    if pages < 30:
        assert engine.stats()["num_preemptions_total"] > 0


def test_a_fork_outlives_the_sample_that_computed_the_prompt(tiny: Path) -> None:
    """Sample 0 ends with its first token; its page may be given away before the others have copied it."""
    asked = [request("a", prompt(18), _sampling(3))]
    first, *others = _samples(_unshared(tiny, asked)["a"], 3)
    assert all(first[0] not in tokens for tokens in others), "choose another seed: the others must go on"
    asked = [request("a", prompt(18), _sampling(3, stop_token_ids=(first[0],)))]
    engine = make_engine(tiny, page_size=4, kv_cache_tokens=4 * 24, max_model_len=40)
    crowd = [*asked, *(request(f"b{i}", prompt(9, seed=i), _sampling(1)) for i in range(4))]
    results = drive(engine, crowd)
    assert [results["a"].tokens(i) for i in range(3)] == [first[:1], *others]
    assert results["a"].last(0).finish_reason == "stop"


def test_samples_of_a_prompt_with_media_share_it(tiny: Path) -> None:
    media = {"a": Media(grids=[(1, 4, 6)], rows=torch.randn(6, 64, generator=torch.Generator().manual_seed(0)))}
    asked = [request("a", (*prompt(9), PAD, *prompt(5, seed=1)), _sampling(3), num_media=1)]
    engine = make_engine(tiny, page_size=4, min_partial_chunk=1)
    counts = _count_tokens(engine)
    results = drive(engine, asked, media)
    assert counts == [9, 11] + [3] * (NEW - 1)
    assert _samples(results["a"], 3) == _samples(_unshared(tiny, asked, media)["a"], 3)
    assert engine.stats()["input_buffer_rows_reserved"] == 0


@pytest.mark.parametrize("after", range(1, 7))
def test_cancelling_ends_all_samples(after: int, tiny: Path) -> None:
    engine = make_engine(tiny, page_size=4, max_num_seqs=3, max_prefill_chunk=8)
    engine.submit(request("a", prompt(18), _sampling(5)))
    engine.submit(request("b", prompt(7), _sampling(2)))
    results = Results()
    for _ in range(after):
        results.take(engine.step())
        engine.scheduler.check_invariants()
    engine.cancel("a")
    idle = 0
    while idle < 2:
        report = engine.step()
        results.take(report)
        engine.scheduler.check_invariants()
        idle = 0 if report.did_run else idle + 1
    assert isinstance(results["a"].error, Cancelled)
    assert results["b"].done is not None
    assert engine.stats()["kv_pages_referenced"] == engine.stats()["num_requests_waiting"] == 0


@pytest.mark.parametrize("logprobs", [None, 2])
def test_best_of_returns_the_most_likely_samples_best_first(logprobs: int | None, tiny: Path) -> None:
    """Against all samples with their log-probabilities, ranked here."""
    everything = drive(make_engine(tiny), [request("a", prompt(20), _sampling(6, logprobs=2))])["a"]
    chunks = [[c for c in everything.chunks if c.index == i] for i in range(6)]
    means = [sum(c.logprobs[0].logprob for c in own) / len(own) for own in chunks]
    ranked = sorted(range(6), key=lambda i: -means[i])[:2]
    best = drive(make_engine(tiny), [request("a", prompt(20), _sampling(2, best_of=6, logprobs=logprobs))])["a"]
    assert {c.index for c in best.chunks} == {0, 1}
    for index, i in enumerate(ranked):
        assert best.tokens(index) == everything.tokens(i)
        assert best.text(index) == everything.text(i)
        assert best.last(index).finish_reason == "length"
        shown = [entry for c in best.chunks if c.index == index for entry in c.logprobs or ()]
        assert shown == ([] if logprobs is None else [c.logprobs[0] for c in chunks[i]])
    assert best.done is not None and best.done.num_generated_tokens == 6 * NEW


def test_best_of_hands_out_long_answers_in_bounded_parts(tiny: Path) -> None:
    sampling = SamplingParams(temperature=1.0, seed=1, n=1, best_of=2, max_tokens=150, ignore_eos=True)
    result = drive(make_engine(tiny), [request("a", prompt(5), sampling)])["a"]
    assert [len(c.token_ids) for c in result.chunks] == [64, 64, 22]
    assert [c.finish_reason for c in result.chunks] == [None, None, "length"]


def test_samples_that_find_no_seat_recompute_or_borrow_but_agree(tiny: Path) -> None:
    asked = [request("a", prompt(33), _sampling(8))]
    free = _unshared(tiny, asked)
    for seats in (2, 3, 7):
        engine = make_engine(tiny, max_num_seqs=seats, page_size=4)
        assert _samples(drive(engine, asked)["a"], 8) == _samples(free["a"], 8)


def test_a_copy_for_a_fork_that_ended_is_not_made() -> None:
    """Its page belongs to somebody else by then, who may have had it filled already."""
    keeper = PageKeeper(PagePool(5), page_size=4)
    donor, *forks = (Sequence(key=(0, i), prompt=range(6), max_len=9) for i in range(3))
    keeper.start(donor, NOTHING, 7)
    donor.kv_len = 6
    for fork in forks:
        fork.tokens.append(1)
        keeper.start(fork, keeper.find_prefix(fork, [donor]), 8)
    keeper.release(forks[0])
    assert keeper.take_copies() == ((donor.pages[1], forks[1].pages[1]),)
