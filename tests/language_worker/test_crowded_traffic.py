"""The machine of `test_random_traffic.py` where pages are always short: sequences give way and come back, their KV
waits in host memory or is computed again, and windows slide. Then against planted bugs of these: each must be caught.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from language_worker import engine, page_keeper, prefix_cache, runner, swap_space
from language_worker.errors import EngineError
from language_worker.plan import SwapMoves
from tests.language_worker import test_random_traffic as random_traffic
from tests.language_worker.test_random_traffic import CONFIG, SAMPLING, STEMS, Traffic
from tests.profiles import IS_SOAK
from tests.tiny_models import make_qwen2_5_vl

SWAPPED = ("kv_pages_swapped_in_total", "kv_pages_swapped_out_total")
CROWDED = CONFIG | {
    "capacity": st.integers(20, 44),
    "max_num_seqs": st.sampled_from([3, 6]),
    "max_prefill_chunk": st.sampled_from([0, 7]),
    "num_drafts": st.sampled_from([0, 0, 3]),
    "prefix_cache": st.booleans(),
    "window": st.sampled_from([0, 0, 1, 5, 11]),
    "swap_tokens": st.sampled_from([0, 5, 30, 90, 90]),
}


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    random_traffic.FOLDER[:] = [make_qwen2_5_vl(tmp_path_factory.mktemp("toy"))]


class CrowdedTraffic(Traffic):
    """See the module."""

    reached: ClassVar[Counter[str]] = Counter()

    @initialize(**CROWDED)
    def start(self, **config: Any) -> None:
        self.begin(**config)

    def _look(self) -> None:
        scheduler, stats = self.engine.scheduler, self.engine.stats()
        self.reached["pages given back"] += any(seq.first_page for seq in scheduler.running)
        kept = [scheduler.pages.swap.find(seq.key) for seq in scheduler.waiting] if scheduler.pages.swap else []
        assert stats["kv_pages_swapped"] == sum(len(one.pages) for one in kept if one is not None)

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "engine"):
            self.reached.update({name: int(self.engine.stats()[name]) for name in SWAPPED})

    @rule(
        prompts=st.lists(
            st.tuples(st.sampled_from(STEMS), st.integers(1, 10), st.integers(0, 3)), min_size=2, max_size=4
        ),
        sampling=SAMPLING,
    )
    def submit_a_crowd(self, prompts: list[tuple[list[int], int, int]], sampling: Any) -> None:
        """Short prompts with long answers, which are admitted together and do not fit together."""
        for stem, cut, last in prompts:
            self._submit((*stem[:cut], last), replace(sampling, max_tokens=14, stop_token_ids=()), [])
        for _ in range(3):
            self._step()

    @precondition(lambda self: self.requests and any(seq.num_preemptions for seq in self.engine.scheduler.waiting))
    @rule()
    def cancel_one_that_gave_way(self) -> None:
        order = next(seq.key[0] for seq in self.engine.scheduler.waiting if seq.num_preemptions)
        name = self.engine._roster._by_order[order].request.request_id
        self.cancelled.add(name)
        self.engine.cancel(name)


def test_tokens_and_pages_are_right_where_pages_are_short() -> None:
    CrowdedTraffic.reached.clear()
    settings = random_traffic._settings(3000 if IS_SOAK else 60)
    run_state_machine_as_test(CrowdedTraffic, settings=settings)
    reached = {name: CrowdedTraffic.reached[name] for name in (*SWAPPED, "num_preemptions_total", "pages given back")}
    assert min(reached.values()) > 20, reached


# -- planted bugs -----------------------------------------------------------------------------------------------------


def _give_pages_back_too_early(patch: pytest.MonkeyPatch) -> None:
    """The oldest key of a window counts as out of it."""
    original = page_keeper.first_seen_page
    patch.setattr(page_keeper, "first_seen_page", lambda n, window, size: original(n + 2 * bool(window), window, size))


def _lend_what_was_given_back(patch: pytest.MonkeyPatch) -> None:
    """A sibling's first page counts as its prompt's first."""

    def lent(self: Any, seq: Any, sibling: Any) -> Any:
        gone, sibling.first_page = sibling.first_page, 0
        try:
            return original(self, seq, sibling)
        except IndexError:
            return page_keeper.NOTHING
        finally:
            sibling.first_page = gone

    original = page_keeper.PageKeeper._lent
    patch.setattr(page_keeper.PageKeeper, "_lent", lent)


def _hit_with_a_gap(patch: pytest.MonkeyPatch) -> None:
    """Of the pages that a query behind a prefix sees, the last is enough."""
    original = prefix_cache.first_seen_page
    patch.setattr(
        prefix_cache, "first_seen_page", lambda n, window, size: max(original(n, window, size), n // size - 1)
    )


def _count_positions_from_what_is_left(patch: pytest.MonkeyPatch) -> None:
    """New keys are written as if no page had been given back."""

    def slots(self: Any, seq: Any, position: int, end: int) -> list[int]:
        size, pages = self.cache.page_size, seq.pages
        return [pages[p // size % len(pages)] * size + p % size for p in range(position, end)]

    patch.setattr(runner.ModelRunner, "_slots", slots)


def _skip_swapping_out(patch: pytest.MonkeyPatch) -> None:
    original = runner.ModelRunner.swap_pages
    patch.setattr(runner.ModelRunner, "swap_pages", lambda self, moves: original(self, SwapMoves(ins=moves.ins)))


def _skip_swapping_in(patch: pytest.MonkeyPatch) -> None:
    original = runner.ModelRunner.swap_pages
    patch.setattr(runner.ModelRunner, "swap_pages", lambda self, moves: original(self, SwapMoves(outs=moves.outs)))


def _swap_out_late(patch: pytest.MonkeyPatch) -> None:
    """Pages leave for host memory when others have written to them."""

    def move_pages(self: Any, plan: Any) -> None:
        self.__dict__["late"], earlier = plan.swaps.outs, self.__dict__.get("late", ())
        original(self, replace(plan, swaps=SwapMoves(outs=earlier, ins=plan.swaps.ins)))

    original = engine.Engine._move_pages
    patch.setattr(engine.Engine, "_move_pages", move_pages)


def _swap_in_the_first_pages(patch: pytest.MonkeyPatch) -> None:
    """Where a sequence shares its first pages, the first that are kept are copied behind them."""

    def fetch(self: Any, key: Any, targets: Any) -> None:
        self._ins[key] = list(zip(self._swapped[key].pages, targets, strict=False))

    patch.setattr(swap_space.SwapSpace, "fetch", fetch)


def _keep_what_ended(patch: pytest.MonkeyPatch) -> None:
    """A sequence that ends while it waits leaves its pages in host memory."""
    patch.setattr(page_keeper.PageKeeper, "release", page_keeper.PageKeeper._release_pages)


def _swap_without_the_last_page(patch: pytest.MonkeyPatch) -> None:
    """A page that is not full is left behind."""

    def put(self: Any, key: Any, pages: Any, **values: Any) -> bool:
        return original(self, key, [*pages[:-1], *pages[:1]], **values)

    original = swap_space.SwapSpace.put
    patch.setattr(swap_space.SwapSpace, "put", put)


def _swapped_positions_from_zero(patch: pytest.MonkeyPatch) -> None:
    """What is kept of a sliding sequence counts as its beginning."""

    def put(self: Any, key: Any, pages: Any, *, first_page: int, num_tokens: int) -> bool:
        return original(self, key, pages, first_page=0, num_tokens=num_tokens)

    original = swap_space.SwapSpace.put
    patch.setattr(swap_space.SwapSpace, "put", put)


PLANTED = (
    _give_pages_back_too_early,
    _lend_what_was_given_back,
    _hit_with_a_gap,
    _count_positions_from_what_is_left,
    _skip_swapping_out,
    _skip_swapping_in,
    _swap_out_late,
    _swap_in_the_first_pages,
    _keep_what_ended,
    _swap_without_the_last_page,
    _swapped_positions_from_zero,
)


@pytest.mark.parametrize("plant", PLANTED, ids=[plant.__name__.strip("_") for plant in PLANTED])
def test_a_planted_bug_is_caught(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    settings = random_traffic._settings(1500, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises((AssertionError, EngineError, LookupError, ValueError)):
        run_state_machine_as_test(CrowdedTraffic, settings=settings)
