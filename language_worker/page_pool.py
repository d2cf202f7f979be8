"""PagePool: which sequence holds which page of the KV cache.

Owns the free list, reference counts and owners of page ids. Knows neither tensors nor tokens. A page may be held by
several owners (shared prefixes); it returns to the free list when the last one lets go. Every operation is all or
nothing: a refused one raises a typed error and changes nothing.
"""

import heapq
from collections import defaultdict
from collections.abc import Hashable, Iterable

from language_worker.errors import PageError, PageNotOwned, PagesExhausted

Owner = Hashable


class PagePool:
    """`num_pages` pages, ids 0..num_pages-1; the lowest free ids go first.

    So a lone sequence's pages are neighbours however earlier ones ended, and attention reads them in place: taking the
    most recently freed instead made every layer of every step gather its keys and values.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise PageError(f"a page pool needs at least one page, not {num_pages}")
        self.num_pages = num_pages
        self._free = list(range(num_pages))  # a heap
        self._refcount = [0] * num_pages
        self._held: dict[Owner, list[int]] = defaultdict(list)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        return self.num_pages - len(self._free)

    def num_holders(self, page: int) -> int:
        return self._refcount[page]

    def held_by(self, owner: Owner) -> tuple[int, ...]:
        """Pages of `owner` in the order it got them."""
        return tuple(self._held.get(owner, ()))

    def allocate(self, count: int, owner: Owner) -> list[int]:
        """Take `count` fresh pages for `owner`; PagesExhausted when fewer are free."""
        if count < 0:
            raise PageError(f"cannot allocate {count} pages for {owner!r}")
        if count > len(self._free):
            raise PagesExhausted(
                f"{owner!r} asked for {count} pages and {len(self._free)} of {self.num_pages} are free; preempt or wait"
            )
        if count == 0:
            return []
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._refcount[page] = 1
        self._held[owner].extend(pages)
        return pages

    def share(self, pages: Iterable[int], owner: Owner) -> None:
        """Let `owner` hold pages that others hold already."""
        taken = list(pages)
        for page in taken:
            if not 0 <= page < self.num_pages or self._refcount[page] == 0:
                raise PageNotOwned(f"page {page} is not in use; {owner!r} cannot share it")
        if len(set(taken)) != len(taken) or set(taken) & set(self._held.get(owner, ())):
            raise PageError(f"{owner!r} would hold a page twice")
        for page in taken:
            self._refcount[page] += 1
        if taken:
            self._held[owner].extend(taken)

    def release(self, owner: Owner) -> int:
        """Give back all pages of `owner`; returns how many became free. An owner without pages releases none."""
        freed = 0
        for page in self._held.pop(owner, []):
            freed += self._drop(page)
        return freed

    def _drop(self, page: int) -> int:
        self._refcount[page] -= 1
        if self._refcount[page]:
            return 0
        heapq.heappush(self._free, page)
        return 1

    def check_invariants(self) -> None:
        """Raise PageError if the ledger contradicts itself (for tests and idle checks)."""
        counted = [0] * self.num_pages
        for owner, pages in self._held.items():
            if not pages or len(set(pages)) != len(pages):
                raise PageError(f"{owner!r} holds {pages}: empty or duplicate entries")
            for page in pages:
                counted[page] += 1
        if counted != self._refcount:
            raise PageError("reference counts differ from what owners hold")
        if sorted(self._free) != [page for page in range(self.num_pages) if counted[page] == 0]:
            raise PageError("the free list is not exactly the pages that nobody holds")
