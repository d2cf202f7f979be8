"""The page ledger against a model of it, and refusals that change nothing."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from language_worker.errors import PageError, PagesExhausted
from language_worker.page_pool import PagePool

SIZE = 8
OWNERS = st.sampled_from("abcd")


class Ledger(RuleBasedStateMachine):
    """held: owner -> set of pages, kept independently."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.held = PagePool(SIZE), {owner: [] for owner in "abcd"}
        self.kept: set[int] = set()  # pages to keep, held or not
        self.idle: list[int] = []  # kept pages that nobody holds, let go longest ago first
        self.pool.on_evict = self.evicted

    def evicted(self, page: int) -> None:
        assert page == self.idle.pop(0), "not the one that was let go longest ago"
        self.kept.remove(page)

    def in_use(self) -> set[int]:
        return set().union(*self.held.values())

    def free(self) -> set[int]:
        return set(range(SIZE)) - self.in_use()

    @rule(owner=OWNERS, count=st.integers(0, SIZE + 1))
    def allocate(self, owner: str, count: int) -> None:
        if count > len(self.free()):
            with pytest.raises(PagesExhausted):
                self.pool.allocate(count, owner)
            return
        before, num_idle = self.free(), len(self.idle)
        pages = self.pool.allocate(count, owner)
        assert len(set(pages)) == count and set(pages) <= before
        assert not set(pages) & set(self.idle), "given away unnoticed"
        assert num_idle - len(self.idle) <= max(0, count - (len(before) - num_idle)), "evicted without need"
        self.held[owner] += pages

    @rule(owner=OWNERS, pages=st.lists(st.integers(-1, SIZE), max_size=3))
    def share(self, owner: str, pages: list[int]) -> None:
        there = self.in_use() | set(self.idle)
        if not set(pages) <= there or len(set(pages)) != len(pages) or set(pages) & set(self.held[owner]):
            with pytest.raises(PageError):
                self.pool.share(pages, owner)
            return
        self.pool.share(pages, owner)
        self.idle = [page for page in self.idle if page not in pages]
        self.held[owner] += pages

    @rule(page=st.integers(0, SIZE - 1))
    def keep(self, page: int) -> None:
        if page not in self.in_use():
            with pytest.raises(PageError):
                self.pool.keep(page)
            return
        self.pool.keep(page)
        self.kept.add(page)

    @rule(owner=OWNERS)
    def release(self, owner: str) -> None:
        before = len(self.free())
        freed = self.pool.release(owner)
        pages, self.held[owner] = self.held[owner], []
        self.idle += [page for page in reversed(pages) if page in self.kept - self.in_use()]
        assert freed == len(self.free()) - before

    @invariant()
    def agrees(self) -> None:
        self.pool.check_invariants()
        assert self.pool.num_free == len(self.free())
        assert self.pool.num_idle == len(self.idle)
        assert all(list(self.pool.held_by(owner)) == pages for owner, pages in self.held.items())


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=150, stateful_step_count=30, deadline=None, derandomize=True)


def test_the_lowest_free_pages_go_first_however_they_were_freed() -> None:
    pool = PagePool(6)
    assert pool.allocate(3, "a") == [0, 1, 2]
    assert pool.allocate(2, "b") == [3, 4]
    pool.release("a")
    assert pool.allocate(2, "c") == [0, 1]
    pool.release("b")
    pool.release("c")
    assert pool.allocate(6, "d") == [0, 1, 2, 3, 4, 5], "a lone sequence's pages are neighbours"


def test_check_invariants_notices_a_contradiction() -> None:
    pool = PagePool(3)
    pool.allocate(1, "a")
    pool._free.append(0)
    with pytest.raises(PageError):
        pool.check_invariants()
