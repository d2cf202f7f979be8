"""The prefix cache: what names a page, who is given away first, and that no token shows whether there was a hit."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from language_worker.engine import Engine
from language_worker.errors import MediaMismatch
from language_worker.page_pool import PagePool
from language_worker.prefix_cache import PrefixCache
from language_worker.request import MediaSpan, Sequence
from language_worker.sampling_params import SamplingParams
from tests.language_worker.helpers import GREEDY, Media, Results, drive, make_engine, prompt, request
from tests.tiny_tokenizer import TOKEN_IDS

PAD = TOKEN_IDS["<|image_pad|>"]
SIZE = 4


def _cache(num_pages: int = 16, root: bytes = b"root") -> PrefixCache:
    return PrefixCache(PagePool(num_pages), SIZE, root)


def _seq(tokens, order: int = 0, spans=()) -> Sequence:
    return Sequence(key=(order, 0), prompt=tokens, max_len=len(tokens) + 8, media_spans=spans)


def _names(tokens, spans=(), root: bytes = b"root") -> list[bytes]:
    seq = _seq(tokens, spans=spans)
    _cache(root=root)._name_pages(seq, len(tokens) // SIZE)
    return seq.page_names


def _span(start: int, end: int, key: bytes | None) -> MediaSpan:
    return MediaSpan(start=start, end=end, key=key)


# -- names ------------------------------------------------------------------------------------------------------------


def test_a_name_covers_the_whole_prefix_and_the_root() -> None:
    base = _names(range(12))
    assert len(set(base)) == 3
    assert _names(range(12)) == base
    for changed in range(12):
        other = [99 if i == changed else i for i in range(12)]
        assert [a == b for a, b in zip(_names(other), base, strict=True)] == [i < changed // SIZE for i in range(3)]
    assert not set(_names(range(12), root=b"another model")) & set(base)


def test_a_name_covers_the_media_of_its_positions() -> None:
    tokens = [7] * 12
    base = _names(tokens, (_span(5, 7, b"x"),))
    assert _names(tokens)[0] == base[0], "nothing of it lies in the first page"
    for other in (
        (_span(5, 7, b"y"),),
        (_span(6, 8, b"x"),),
        (_span(5, 8, b"x"),),
        (_span(5, 6, b"x"), _span(6, 7, b"x")),
    ):
        changed = _names(tokens, other)
        assert changed[0] == base[0] and changed[1] != base[1] and changed[2] != base[2]
    assert _names(tokens, (_span(3, 9, b"x"),))[2] != _names(tokens, (_span(3, 9, b"y"),))[2]


def test_media_without_a_key_end_the_chain() -> None:
    assert len(_names(range(16), (_span(9, 10, None),))) == 2
    assert len(_names(range(16), (_span(2, 3, b"x"), _span(4, 5, None)))) == 1


def test_the_last_token_is_never_found() -> None:
    cache = _cache()
    first = _seq(range(8), order=1)
    first.pages = cache._pool.allocate(2, first.key)
    cache.record(first, 0, 2)
    assert cache.find(_seq(range(8))) == (0,)
    assert cache.find(_seq(range(9))) == (0, 1)
    assert cache.find(_seq([*range(7), 99, 1])) == (0,)


def test_of_equal_pages_the_first_stays() -> None:
    cache = _cache()
    for order in (1, 2):
        seq = _seq(range(8), order=order)
        seq.pages = cache._pool.allocate(2, seq.key)
        cache.record(seq, 0, 2)
        cache.check_invariants()
    assert cache.find(_seq(range(9))) == (0, 1)
    assert cache._pool.release((2, 0)) == 2 and cache._pool.num_idle == 0


def test_the_longest_unused_are_given_away_first_and_the_end_of_a_prefix_before_its_beginning() -> None:
    pool = PagePool(6)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    for owner in "abc":
        for page in pool.allocate(2, owner):
            pool.keep(page)
    for owner in "bac":
        pool.release(owner)
    pool.share([2], "again")
    pool.release("again")
    assert pool.allocate(2, "new") == [1, 3] and evicted == [3, 1]
    assert pool.allocate(3, "more") == [0, 4, 5] and evicted == [3, 1, 0, 5, 4]
    pool.check_invariants()


# -- engines ----------------------------------------------------------------------------------------------------------


def _uncached(folder: Path, asked, media=None) -> Results:
    return drive(make_engine(folder, prefix_cache=False), asked, media)


def _window_starts(engine: Engine) -> list[int]:
    """Where each prefill window begins from now on."""
    starts, run = [], engine.runner.run

    def noted(plan):
        starts.extend(w.start for w in plan.windows if w.start < w.seq.prompt_len)
        return run(plan)

    engine.runner.run = noted
    return starts


def test_a_hit_skips_the_prefix_and_changes_nothing(tiny: Path) -> None:
    engine, common = make_engine(tiny, page_size=8), prompt(50)
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=9, ignore_eos=True, logprobs=3)
    asked = [
        request(f"r{i}", (*common[:length], *prompt(4, seed=i)), sampling) for i, length in enumerate([50, 50, 33, 7])
    ]
    plain, starts = _uncached(tiny, asked), _window_starts(engine)
    cached = []
    for one in asked:
        result = drive(engine, [one])[one.request_id]
        assert result.tokens() == plain[one.request_id].tokens()
        for ours, theirs in zip(result.chunks, plain[one.request_id].chunks, strict=True):
            assert ours.logprobs[0].logprob == pytest.approx(theirs.logprobs[0].logprob, abs=1e-5)
        cached.append([c.num_cached_tokens for c in result.chunks])
    assert starts == [0, 48, 32, 0]
    assert [counts[0] for counts in cached] == [0, 48, 32, 0] and not any(any(counts[1:]) for counts in cached)
    stats = engine.stats()
    assert stats["prefix_cache_hits_total"] == 80
    assert stats["prefix_cache_queries_total"] == 54 + 54 + 37 + 11
    assert stats["kv_pages_referenced"] == 0 and stats["kv_pages_cached"] > 0
    off = make_engine(tiny, prefix_cache=False)
    drive(off, asked)
    assert off.stats()["kv_pages_cached"] == off.stats()["prefix_cache_queries_total"] == 0


def test_the_next_turn_finds_the_last_answer_too(tiny: Path) -> None:
    engine, first = make_engine(tiny, page_size=4), prompt(10)
    answer = drive(engine, [request("a", first)])["a"].tokens()
    starts = _window_starts(engine)
    asked = [request("b", (*first, *answer, *prompt(3, seed=9)))]
    assert drive(engine, asked)["b"].tokens() == _uncached(tiny, asked)["b"].tokens()
    assert starts == [20], "21 of the 22 tokens were computed; of these, five pages of four are full"


def test_prompt_logits_are_computed_whole(tiny: Path) -> None:
    engine, ids = make_engine(tiny, page_size=4), prompt(30)
    drive(engine, [request("a", ids)])
    again = drive(engine, [request("b", ids, return_logits=True)])["b"]
    assert again.logits is not None
    torch.testing.assert_close(again.logits, _uncached(tiny, [request("b", ids, return_logits=True)])["b"].logits)


class KeyedMedia(Media):
    """Media whose items are announced with content keys."""

    keys: tuple[str, ...] = ()

    def items(self):
        return [{**item, "content_key": key} for item, key in zip(super().items(), self.keys, strict=True)]


def _media(seed: int, *keys: str) -> KeyedMedia:
    rows = torch.randn(14, 64, generator=torch.Generator().manual_seed(seed))
    media = KeyedMedia(grids=[(1, 4, 6), (1, 8, 4)], rows=rows)
    media.keys = keys
    return media


IDS = (*prompt(6), PAD, *prompt(3, seed=1), PAD, *prompt(6, seed=2))  # media at 6..11 and 15..22, 29 tokens


@pytest.mark.parametrize(
    ("keys", "start"),
    [(("p", "q"), 28), (("p", "z"), 12), (("z", "q"), 4), (("", "q"), 4), (("p", ""), 12), (("q", "p"), 4)],
)
def test_media_are_found_by_their_content_key(keys: tuple[str, str], start: int, tiny: Path) -> None:
    """Rows differ where keys differ; a chain ends in the page before the first other, or unknown, item."""
    engine, first = make_engine(tiny, page_size=4), _media(1, "p", "q")
    drive(engine, [request("a", IDS, num_media=2)], {"a": first})
    second = _media(1, *keys)
    if keys[0] != "p":
        second.rows[:6] += 1
    if keys[1] != "q":
        second.rows[6:] += 1
    starts, asked = _window_starts(engine), [request("b", IDS, num_media=2)]
    result = drive(engine, asked, {"b": second})["b"]
    assert starts[0] == start
    assert result.tokens() == _uncached(tiny, asked, {"b": second})["b"].tokens()


def test_a_grid_is_part_of_the_content(tiny: Path) -> None:
    engine = make_engine(tiny, page_size=4)
    ids = (*prompt(4), PAD, *prompt(6, seed=2))
    for name, grid in (("a", (1, 4, 6)), ("b", (1, 6, 4))):
        media = KeyedMedia(grids=[grid], rows=torch.randn(6, 64, generator=torch.Generator().manual_seed(0)))
        media.keys = ("same",)
        asked = [request(name, ids, num_media=1)]
        starts = _window_starts(engine)
        assert (
            drive(engine, asked, {name: media})[name].tokens() == _uncached(tiny, asked, {name: media})[name].tokens()
        )
    assert starts[0] == 4


def test_an_answer_on_cached_media_needs_no_rows(tiny: Path) -> None:
    engine, media = make_engine(tiny, page_size=4), _media(1, "p", "q")
    expected = drive(engine, [request("a", IDS, num_media=2)], {"a": media})["a"].tokens()
    engine.submit(request("b", IDS, num_media=2))
    engine.announce("b", 14, media.items())
    results = Results()
    while not results.get("b") or results["b"].done is None:
        report = engine.step()
        results.take(report)
        assert report.did_run, "it waits for rows that it does not need"
    assert results["b"].tokens() == expected
    assert engine.stats()["input_buffer_rows_reserved"] == 0


@pytest.mark.parametrize("is_preempted", [False, True])
def test_media_that_come_anew_after_the_answer_began_do_not_begin_it_again(is_preempted: bool, tiny: Path) -> None:
    engine, media = make_engine(tiny, page_size=4, kv_cache_tokens=64, max_model_len=64), _media(1, "p", "q")
    expected = drive(engine, [request("a", IDS, num_media=2)], {"a": media})["a"].tokens()
    engine.submit(request("b", IDS, num_media=2))
    engine.announce("b", 14, media.items())
    results = Results()
    for _ in range(3):
        results.take(engine.step())
    assert len(results["b"].tokens()) == 3, "from cached pages"
    engine.forget_media("b")
    if is_preempted:  # and its pages go to others, so that the rows are needed after all
        engine.scheduler._preempt(engine.scheduler.running[0])
        engine.scheduler.pool.allocate(engine.scheduler.pool.num_free, (99, 0))
        engine.scheduler.pool.release((99, 0))
    assert not results.take(engine.step())
    engine.announce("b", 14, media.items())
    assert results.take(engine.step()) == ["b"], "admitted again"
    engine.media_buffer("b").write(0, media.rows)
    while results["b"].done is None:
        results.take(engine.step())
        engine.scheduler.check_invariants()
    assert results["b"].tokens() == expected
    assert engine.stats()["input_buffer_rows_reserved"] == engine.stats()["kv_pages_referenced"] == 0


@pytest.mark.parametrize("preempted", ["never", "before", "after"])
@pytest.mark.parametrize("keys", [("z", "q"), ("p", "z"), ("", "q")])
def test_media_that_come_anew_under_other_keys_answer_no_other_request(
    keys: tuple[str, str], preempted: str, tiny: Path
) -> None:
    """One that was answering recomputes from the new rows: never under the names of the old ones."""
    engine, old, new = make_engine(tiny, page_size=4), _media(1, "p", "q"), _media(1, *keys)
    is_new = [row >= 6 if keys[0] == "p" else row < 6 for row in range(14)]
    new.rows[is_new] = _media(2).rows[is_new]
    asked = [request("b", IDS, num_media=2)]
    of_old, of_new = (_uncached(tiny, asked, {"b": media})["b"].tokens() for media in (old, new))
    assert of_old != of_new
    drive(engine, [request("a", IDS, num_media=2)], {"a": old})
    engine.submit(asked[0])
    engine.announce("b", 14, old.items())
    results = Results()
    for _ in range(3):
        results.take(engine.step())
    engine.forget_media("b")
    for moment in ("before", "after"):
        if preempted == moment:
            engine.scheduler._preempt(engine.scheduler.running[0])
            engine.scheduler.pool.allocate(engine.scheduler.pool.num_free, (99, 0))
            engine.scheduler.pool.release((99, 0))
        if moment == "before":
            results.take(engine.step())
            engine.announce("b", 14, new.items())
            assert results.take(engine.step()) == ["b"]
    num_said = len(results["b"].tokens())
    engine.media_buffer("b").write(0, new.rows)
    while results["b"].done is None:
        results.take(engine.step())
        engine.scheduler.check_invariants()
    if preempted == "never":
        assert results["b"].tokens() == of_old
    else:
        longer = dataclasses.replace(GREEDY, max_tokens=GREEDY.max_tokens - num_said)
        rest = _uncached(tiny, [request("b", (*IDS, *of_old[:num_said]), longer, num_media=2)], {"b": new})["b"]
        assert results["b"].tokens() == of_old[:num_said] + rest.tokens(), "what was said, and the new rows' rest"
    for name, media, expected in (("c", old, of_old), ("d", new, of_new), ("e", old, of_old)):
        assert drive(engine, [request(name, IDS, num_media=2)], {name: media})[name].tokens() == expected, name


def test_media_that_come_anew_in_other_sizes_fail_an_answer_that_began(tiny: Path) -> None:
    engine, media = make_engine(tiny, page_size=4), _media(1, "p", "q")
    drive(engine, [request("a", IDS, num_media=2)], {"a": media})
    engine.submit(request("b", IDS, num_media=2))
    engine.announce("b", 14, media.items())
    results = Results()
    results.take(engine.step())
    engine.forget_media("b")
    media.grids = [(1, 8, 4), (1, 4, 6)]
    engine.announce("b", 14, media.items())
    results.take(engine.step())
    assert isinstance(results["b"].error, MediaMismatch) and "other sizes" in str(results["b"].error)


def test_rows_that_are_still_needed_are_waited_for(tiny: Path) -> None:
    engine, media = make_engine(tiny, page_size=4, min_partial_chunk=1), _media(1, "p", "q")
    drive(engine, [request("a", IDS, num_media=2)], {"a": media})
    other = _media(1, "p", "new")
    other.rows[6:] += 1
    engine.submit(request("b", IDS, num_media=2))
    engine.announce("b", 14, other.items())
    results, progress = Results(), []
    for _ in range(3):
        results.take(engine.step())
        progress.append(engine.scheduler.running[0].kv_len)
    assert progress == [15, 15, 15], "found to 12, computed to the first missing row"
    buffer = engine.media_buffer("b")
    assert buffer is not None
    buffer.write(0, other.rows)
    while results["b"].done is None if "b" in results else True:
        results.take(engine.step())
    asked = [request("b", IDS, num_media=2)]
    assert results["b"].tokens() == _uncached(tiny, asked, {"b": other})["b"].tokens()


@pytest.mark.parametrize("seed", range(6))
def test_crowds_of_common_prefixes_in_tiny_pools(seed: int, tiny: Path) -> None:
    """Hits, evictions, preemptions and forks at once."""
    rng = random.Random(seed)
    stems = [prompt(rng.randrange(8, 40), seed=100 + i) for i in range(3)]
    asked = []
    for i in range(16):
        stem = rng.choice(stems)
        sampling = dataclasses.replace(GREEDY, temperature=rng.choice([0, 1.0]), seed=i, n=rng.choice([1, 1, 3]))
        asked.append(
            request(f"r{i}", (*stem[: rng.randrange(1, len(stem))], *prompt(rng.randrange(1, 4), seed=i)), sampling)
        )
    engine = make_engine(
        tiny,
        page_size=4,
        kv_cache_tokens=4 * 22,
        max_model_len=64,
        max_prefill_chunk=rng.choice([0, 5]),
        max_num_seqs=6,
    )
    free, tight = _uncached(tiny, asked), drive(engine, asked)
    for one in asked:
        for index in range(one.sampling.n):
            assert tight[one.request_id].tokens(index) == free[one.request_id].tokens(index), one.request_id
    stats = engine.stats()
    assert stats["prefix_cache_hits_total"] > 0 and stats["num_preemptions_total"] > 0
    assert stats["kv_pages_referenced"] == 0
