"""SwapSpace: which pages of host memory keep the KV of preempted sequences, until they run again or end.

Bounded: a sequence that finds no room loses its KV and is computed again. What is to be copied out and in goes with the
plan that asks for it; pages that are copied in are free for later plans, not for this one. Pure: page ids and lengths,
no tensors.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from language_worker.page_pool import PagePool
from language_worker.plan import SwapMoves

Key = tuple[int, int]  # of a sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Swapped:
    """KV of a sequence's positions below `num_tokens`, from its page `first_page` on, in the host pages `pages`."""

    num_tokens: int
    first_page: int
    pages: tuple[int, ...]


class SwapSpace:
    """Of `num_pages` pages, as large as the cache's."""

    def __init__(self, num_pages: int) -> None:
        self._pool = PagePool(num_pages)
        self._swapped: dict[Key, Swapped] = {}
        self._outs: list[tuple[int, int]] = []
        self._ins: dict[Key, list[tuple[int, int]]] = {}

    @property
    def num_in_use(self) -> int:
        return self._pool.num_in_use

    def find(self, key: Key) -> Swapped | None:
        """What is kept of a sequence."""
        return self._swapped.get(key)

    def put(self, key: Key, pages: SequenceOf[int], *, first_page: int, num_tokens: int) -> bool:
        """Keep these pages of the cache, which hold the positions from `first_page` pages on; False if there is no
        room for them."""
        if not pages or len(pages) > self._pool.num_free:
            return False
        kept = self._pool.allocate(len(pages), key)
        self._swapped[key] = Swapped(num_tokens=num_tokens, first_page=first_page, pages=tuple(kept))
        self._outs += zip(pages, kept, strict=True)
        return True

    def fetch(self, key: Key, targets: SequenceOf[int]) -> None:
        """Copy the last pages that are kept of a sequence into these of the cache, and keep it no longer."""
        kept = self._swapped[key].pages
        self._ins[key] = list(zip(kept[len(kept) - len(targets) :], targets, strict=True))

    def drop(self, key: Key) -> None:
        """Keep nothing of a sequence; one that is not kept stays so."""
        if self._swapped.pop(key, None) is not None:
            self._ins.pop(key, None)
            self._pool.release(key)

    def take_moves(self) -> SwapMoves:
        """What became due since the last call."""
        moves = SwapMoves(outs=tuple(self._outs), ins=tuple(pair for pairs in self._ins.values() for pair in pairs))
        for key in list(self._ins):
            self.drop(key)
        self._outs, self._ins = [], {}
        return moves

    def check_invariants(self, waiting: SequenceOf[Key]) -> None:
        """Assert that the ledger agrees with itself, and that only waiting sequences are kept (tests; our own bugs)."""
        self._pool.check_invariants()
        assert set(self._swapped) <= set(waiting), "the KV of a sequence is kept that does not wait"
        assert all(self._pool.held_by(key) == kept.pages for key, kept in self._swapped.items()), "host pages differ"
        assert self._pool.num_in_use == sum(len(kept.pages) for kept in self._swapped.values()), "host pages leaked"
