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
        self.pool, self.held = PagePool(SIZE), {owner: set() for owner in "abcd"}

    def free(self) -> set[int]:
        return set(range(SIZE)) - set().union(*self.held.values())

    @rule(owner=OWNERS, count=st.integers(0, SIZE + 1))
    def allocate(self, owner: str, count: int) -> None:
        if count > len(self.free()):
            with pytest.raises(PagesExhausted):
                self.pool.allocate(count, owner)
            return
        pages = self.pool.allocate(count, owner)
        assert len(set(pages)) == count and set(pages) <= self.free()
        self.held[owner] |= set(pages)

    @rule(owner=OWNERS, pages=st.lists(st.integers(-1, SIZE), max_size=3))
    def share(self, owner: str, pages: list[int]) -> None:
        in_use = set().union(*self.held.values())
        if not set(pages) <= in_use or len(set(pages)) != len(pages) or set(pages) & self.held[owner]:
            with pytest.raises(PageError):
                self.pool.share(pages, owner)
            return
        self.pool.share(pages, owner)
        self.held[owner] |= set(pages)

    @rule(owner=OWNERS)
    def release(self, owner: str) -> None:
        before = len(self.free())
        freed = self.pool.release(owner)
        self.held[owner] = set()
        assert freed == len(self.free()) - before

    @invariant()
    def agrees(self) -> None:
        self.pool.check_invariants()
        assert self.pool.num_free == len(self.free())
        assert all(set(self.pool.held_by(owner)) == pages for owner, pages in self.held.items())


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)


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
