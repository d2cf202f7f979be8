"""PageKeeper: where a sequence's KV comes from: siblings, the prefix cache, another engine, host memory where it waited
while the sequence was preempted, or pages yet to be filled.

Full pages are shared: their KV is final and nobody writes to them. The page that a fork writes to next is copied when
the fork begins (its next step would write to it anyway); the copies of one plan are handed to the runner, which makes
them before it runs; so are imports, of KV that another engine computed, as far as no page has it. Pure: page ids and
lengths, no tensors.

Recurrent state goes the same ways, but stands for one position only: a sibling that has gone on lends nothing.

    donor    | page 3 | page 7 | page 9 (head: prompt, tail: the donor's own tokens) |
    fork     | page 3 | page 7 | page 4 (copied from 9, its tail overwritten)        |

Where every layer of the model slides over `window` keys, pages that fell out of it are given back as their sequence
goes on (`trim`), and a prefix is as good without them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from language_worker.page_pool import PagePool
from language_worker.plan import KVImport, SwapMoves
from language_worker.prefix_cache import PrefixCache, first_seen_page
from language_worker.request import Sequence
from language_worker.state_slots import StateSlots
from language_worker.swap_space import Swapped, SwapSpace


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """KV that is there already: `pages` can be shared whole; of `partial` (None: of none) the head can be copied.

    num_tokens: leading positions that are covered. num_cached: those of them that the prefix cache has. is_imported:
    what is not in `pages` was computed elsewhere and is at hand. first_page: pages before it are lacking, and seen by
    no query behind the prefix. is_swapped: what is not in `pages` lies in host memory. donor: whose recurrent state
    stands at `num_tokens`.
    """

    pages: tuple[int, ...] = ()
    first_page: int = 0
    partial: int | None = None
    num_tokens: int = 0
    num_cached: int = 0
    is_imported: bool = False
    is_swapped: bool = False
    donor: Sequence | None = None


NOTHING = Prefix()
NO_MOVES = SwapMoves()


class PageKeeper:
    """Pages of one scheduler's sequences, and their recurrent states where they have any (`states`). `cache`: None to
    keep nothing that no sequence holds. window: how many of its last keys a query sees in whichever layer (0: all).
    swap: where the KV of preempted sequences is kept, if it is. Neither cache nor swap keep state."""

    def __init__(
        self,
        pool: PagePool,
        page_size: int,
        cache: PrefixCache | None = None,
        *,
        window: int = 0,
        swap: SwapSpace | None = None,
        states: StateSlots | None = None,
    ) -> None:
        assert states is None or (cache is None and swap is None), "a page without the state behind it is of no use"
        self.pool = pool
        self.window = window
        self.swap = swap
        self.cache = cache
        self.states = states
        self.page_size = page_size
        self._copies: dict[int, int] = {}  # target -> source, until they are taken
        self._imports: dict[tuple[int, int], KVImport] = {}  # by sequence, until they are taken
        self._restored: dict[tuple[int, int], tuple[Sequence, int]] = {}  # and from which position on, until it is done

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def find_prefix(self, seq: Sequence, siblings: Iterable[Sequence]) -> Prefix:
        """The longest prefix of a waiting sequence that need not be computed; its last token always must be."""
        kept = None if self.swap is None else self.swap.find(seq.key)
        if seq.wants_prompt_logits:  # those of the positions that are kept were handed out before
            return NOTHING if kept is None else self._swapped(kept, NOTHING)
        cached = self._cached(seq)
        found = [cached, *(self._lent(seq, sibling) for sibling in siblings)]
        if seq.imported is not None and seq.imported.num_tokens > cached.num_tokens:
            found.append(replace(cached, num_tokens=seq.imported.num_tokens, is_imported=True))
        if kept is not None and kept.num_tokens > cached.num_tokens:
            found.append(self._swapped(kept, cached))
        return max(found, key=_length)

    def _cached(self, seq: Sequence) -> Prefix:
        if self.cache is None:
            return NOTHING
        if self.window and not seq.is_exported:
            first, pages = self.cache.find_tail(seq, self.window)
        else:
            first, pages = 0, self.cache.find(seq)
        num_tokens = (first + len(pages)) * self.page_size
        return Prefix(pages=pages, first_page=first, num_tokens=num_tokens, num_cached=num_tokens)

    def _lent(self, seq: Sequence, sibling: Sequence) -> Prefix:
        """What a running sample of the same prompt has of it, if that is still all that is needed."""
        length = min(sibling.kv_len, seq.prompt_len, len(seq.tokens) - 1)
        if self.states is not None and sibling.kv_len != length:
            return NOTHING
        gone, first = sibling.first_page, self.first_seen_page(length)
        if gone > first:
            return NOTHING
        num_full, rest = divmod(length, self.page_size)
        return Prefix(
            pages=tuple(sibling.pages[first - gone : num_full - gone]),
            first_page=first,
            partial=sibling.pages[num_full - gone] if rest else None,
            num_tokens=length,
            donor=None if self.states is None else sibling,
        )

    def _swapped(self, kept: Swapped, cached: Prefix) -> Prefix:
        """What is kept in host memory; of its first pages those that the cache has are shared instead."""
        first = kept.first_page
        pages = cached.pages[first - cached.first_page :] if cached.first_page <= first else ()
        num_cached = len(pages) * self.page_size
        return Prefix(pages=pages, first_page=first, num_tokens=kept.num_tokens, num_cached=num_cached, is_swapped=True)

    def first_seen_page(self, num_tokens: int) -> int:
        """The first page that is still needed when the KV of so many tokens is final."""
        return first_seen_page(num_tokens, self.window, self.page_size)

    def can_start(self, prefix: Prefix, num_tokens: int) -> bool:
        """Whether `start` with these arguments would succeed."""
        num_idle = sum(not self.pool.num_holders(page) for page in prefix.pages)
        return self._num_fresh(prefix, num_tokens) + num_idle <= self.pool.num_free

    def _num_fresh(self, prefix: Prefix, num_tokens: int) -> int:
        return self.pages_for(num_tokens) - prefix.first_page - len(prefix.pages)

    def start(self, seq: Sequence, prefix: Prefix, num_tokens: int) -> None:
        """Give a sequence that holds nothing its pages for `num_tokens`, the first of them those of `prefix`."""
        self.pool.share(prefix.pages, seq.key)
        fresh = self.pool.allocate(self._num_fresh(prefix, num_tokens), seq.key)
        if prefix.partial is not None:  # a source may itself be the target of a copy that was not yet made
            self._copies[fresh[0]] = self._copies.get(prefix.partial, prefix.partial)
        seq.pages = [*prefix.pages, *fresh]
        seq.first_page = prefix.first_page
        seq.kv_len = 0 if seq.canvas is not None else prefix.num_tokens  # of a canvas nothing is final
        if self.states is not None:
            self.states.start(seq, donor=prefix.donor, imported=seq.imported if prefix.is_imported else None)
        if self.cache is not None:
            self.cache.count(seq, prefix.num_cached)
        if prefix.num_cached and not seq.num_preemptions:
            seq.num_cached = prefix.num_cached
        if prefix.is_imported:
            self._imports[seq.key] = KVImport(seq=seq, start=prefix.num_cached, end=prefix.num_tokens)
        if self.swap is not None and prefix.is_swapped:
            end = self.pages_for(prefix.num_tokens) - prefix.first_page
            self.swap.fetch(seq.key, seq.pages[len(prefix.pages) : end])
            self._restored[seq.key] = seq, (prefix.first_page + len(prefix.pages)) * self.page_size
        elif self.swap is not None:
            self.swap.drop(seq.key)

    def seal(self, seq: Sequence, old_len: int) -> None:
        """`kv_len` moved from `old_len`: pages that became full can serve others."""
        first, end = old_len // self.page_size, seq.kv_len // self.page_size
        if first < end and self.cache is not None:
            self.cache.record(seq, first, end)

    def trim(self, seq: Sequence) -> None:
        """Give back pages that no query of `seq` sees any more; none where all of its KV is for another engine."""
        if seq.is_exported:
            return
        count = self.first_seen_page(seq.kv_len) - seq.first_page
        if count > 0:
            self.pool.release_first(seq.key, count)
            del seq.pages[:count]
            seq.first_page += count

    def num_lacking(self, seq: Sequence, num_tokens: int) -> int:
        """Pages that `seq` needs beyond its own to hold `num_tokens`."""
        return self.pages_for(num_tokens) - self._end_page(seq)

    def num_spare(self, seq: Sequence) -> int:
        """Tokens beyond the known ones that the pages of `seq` hold."""
        return self._end_page(seq) * self.page_size - len(seq.tokens)

    def _end_page(self, seq: Sequence) -> int:
        return seq.first_page + len(seq.pages)

    def grow(self, seq: Sequence, num_pages: int) -> None:
        """Add fresh pages at the end; PagesExhausted when they are lacking."""
        seq.pages += self.pool.allocate(num_pages, seq.key)

    def release(self, seq: Sequence) -> None:
        """Let go of everything `seq` holds."""
        if self.swap is not None:
            self.swap.drop(seq.key)
        self._release_pages(seq)

    def put_aside(self, seq: Sequence) -> None:
        """Let go of the pages of a sequence that is preempted; what is final in them is kept in host memory, if that is
        wanted and there is room. By then they hold it: what a plan begins is filled with that plan."""
        assert seq.key not in self._imports and self._copies.keys().isdisjoint(seq.pages), "preempted while it begins"
        if self.swap is not None:
            first, end = self.first_seen_page(seq.kv_len), self.pages_for(seq.kv_len)
            pages = seq.pages[first - seq.first_page : end - seq.first_page]
            self.swap.put(seq.key, pages, first_page=first, num_tokens=seq.kv_len)
        self._release_pages(seq)

    def _release_pages(self, seq: Sequence) -> None:
        self._imports.pop(seq.key, None)
        self._restored.pop(seq.key, None)
        for page in seq.pages if self._copies else ():
            self._copies.pop(page, None)
        self.pool.release(seq.key)
        if self.states is not None:
            self.states.release(seq)

    def take_swaps(self) -> SwapMoves:
        """Pages that are to leave for host memory, or to come back from it, since the last call. What comes back can
        serve others from the next plan on."""
        if self.swap is None:
            return NO_MOVES
        restored, self._restored = self._restored, {}
        for seq, start in restored.values():
            self.seal(seq, start)
        return self.swap.take_moves()

    def take_imports(self) -> tuple[KVImport, ...]:
        """Imports that became due since the last call. Their pages can serve others from the next plan on."""
        imports, self._imports = tuple(self._imports.values()), {}
        for due in imports:
            self.seal(due.seq, due.start)
        return imports

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        """(source, target) page copies that became due since the last call."""
        copies, self._copies = tuple((source, target) for target, source in self._copies.items()), {}
        return copies


def _length(prefix: Prefix) -> int:
    return prefix.num_tokens
