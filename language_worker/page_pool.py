"""PagePool: which sequence holds which page of the KV cache.

Owns the free list, reference counts, owners, and the pages that are kept for their content. Knows neither tensors nor
tokens. A page may be held by several owners (shared prefixes). When the last one lets go it is idle if somebody asked
to keep it, else free; idle pages are given away when free ones run out, the one that was let go longest ago first.
Every operation is all or nothing: a refused one raises a typed error and changes nothing.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable

from language_worker.errors import PageError, PageNotOwned, PagesExhausted

Owner = Hashable
EVICTION_BATCH = 16  # idle pages given away at once at most, so that neighbours stay neighbours


class PagePool:
    """`num_pages` pages, ids 0..num_pages-1; the lowest free ids go first.

    So a lone sequence's pages are neighbours however earlier ones ended, and attention reads them in place: taking the
    most recently freed instead made every layer of every step gather its keys and values. `on_evict` hears of each
    kept page that is given away.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], None] = lambda page: None) -> None:
        if num_pages < 1:
            raise PageError(f"a page pool needs at least one page, not {num_pages}")
        self.num_pages = num_pages
        self.on_evict = on_evict
        self._free = list(range(num_pages))  # a heap
        self._refcount = [0] * num_pages
        self._held: dict[Owner, list[int]] = defaultdict(list)
        self._kept: set[int] = set()
        self._idle: dict[int, None] = {}  # kept pages that nobody holds, let go longest ago first

    @property
    def num_free(self) -> int:
        """Pages that can be allocated, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_in_use(self) -> int:
        return self.num_pages - self.num_free

    def num_holders(self, page: int) -> int:
        return self._refcount[page]

    def is_kept(self, page: int) -> bool:
        return page in self._kept

    def held_by(self, owner: Owner) -> tuple[int, ...]:
        """Pages of `owner` in the order it got them."""
        return tuple(self._held.get(owner, ()))

    def allocate(self, count: int, owner: Owner) -> list[int]:
        """Take `count` fresh pages for `owner`; PagesExhausted when fewer are free."""
        if count < 0:
            raise PageError(f"cannot allocate {count} pages for {owner!r}")
        if count > self.num_free:
            raise PagesExhausted(
                f"{owner!r} asked for {count} pages and {self.num_free} of {self.num_pages} are free; preempt or wait"
            )
        if count == 0:
            return []
        if count > len(self._free):
            self._evict(count - len(self._free))
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._refcount[page] = 1
        self._held[owner].extend(pages)
        return pages

    def share(self, pages: Iterable[int], owner: Owner) -> None:
        """Let `owner` hold pages that others hold already, or that are idle."""
        taken = list(pages)
        for page in taken:
            if not 0 <= page < self.num_pages or not (self._refcount[page] or page in self._idle):
                raise PageNotOwned(f"page {page} is not in use; {owner!r} cannot share it")
        if len(set(taken)) != len(taken) or set(taken) & set(self._held.get(owner, ())):
            raise PageError(f"{owner!r} would hold a page twice")
        for page in taken:
            self._idle.pop(page, None)
            self._refcount[page] += 1
        if taken:
            self._held[owner].extend(taken)

    def keep(self, page: int) -> None:
        """Keep the content of a page that somebody holds for as long as the pool can spare the page."""
        if not self._refcount[page]:
            raise PageNotOwned(f"page {page} is not in use and cannot be kept")
        self._kept.add(page)

    def release(self, owner: Owner) -> int:
        """Give back all pages of `owner`; returns how many can be allocated now that could not before.

        The last of them become idle first: who continues a prefix needs its beginning.
        """
        freed = 0
        for page in reversed(self._held.pop(owner, [])):
            freed += self._drop(page)
        return freed

    def release_first(self, owner: Owner, count: int) -> None:
        """Give back the `count` pages that `owner` got first; PageNotOwned when it holds fewer."""
        held = self._held.get(owner, [])
        if count > len(held):
            raise PageNotOwned(f"{owner!r} holds {len(held)} pages and cannot give {count} back")
        for page in reversed(held[:count]):
            self._drop(page)
        del held[:count]
        if not held:
            self._held.pop(owner, None)

    def _drop(self, page: int) -> int:
        self._refcount[page] -= 1
        if self._refcount[page]:
            return 0
        if page in self._kept:
            self._idle[page] = None
        else:
            heapq.heappush(self._free, page)
        return 1

    def _evict(self, count: int) -> None:
        """Free at least `count` idle pages."""
        for page in list(self._idle)[: max(count, min(EVICTION_BATCH, self.num_pages // 16))]:
            del self._idle[page]
            self._kept.discard(page)
            heapq.heappush(self._free, page)
            self.on_evict(page)

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
        nobodys = [page for page in range(self.num_pages) if counted[page] == 0]
        if sorted([*self._free, *self._idle]) != nobodys:
            raise PageError("the free and idle pages are not exactly those that nobody holds")
        if set(self._idle) != self._kept.intersection(nobodys):
            raise PageError("idle pages are not exactly the kept ones that nobody holds")
