"""PageKeeper: where a sequence's KV comes from: siblings, the prefix cache, another engine, or pages yet to be filled.

Full pages are shared: their KV is final and nobody writes to them. The page that a fork writes to next is copied when
the fork begins (its next step would write to it anyway); the copies of one plan are handed to the runner, which makes
them before it runs; so are imports, of KV that another engine computed, as far as no page has it. Pure: page ids and
lengths, no tensors.

Recurrent state goes the same ways, but stands for one position only: a sibling that has gone on lends nothing.

    donor    | page 3 | page 7 | page 9 (head: prompt, tail: the donor's own tokens) |
    fork     | page 3 | page 7 | page 4 (copied from 9, its tail overwritten)        |
"""

from collections.abc import Iterable
from dataclasses import dataclass

from language_worker.page_pool import PagePool
from language_worker.plan import KVImport
from language_worker.prefix_cache import PrefixCache
from language_worker.request import Sequence
from language_worker.state_slots import StateSlots


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """KV that is there already: `pages` can be shared whole; of `partial` (None: of none) the head can be copied.

    num_tokens: leading positions that are covered. num_cached: those of them that the prefix cache has. is_imported:
    what is not in `pages` was computed elsewhere and is at hand. donor: whose recurrent state stands at `num_tokens`.
    """

    pages: tuple[int, ...] = ()
    partial: int | None = None
    num_tokens: int = 0
    num_cached: int = 0
    is_imported: bool = False
    donor: Sequence | None = None


NOTHING = Prefix()


class PageKeeper:
    """Pages of one scheduler's sequences, and their recurrent states where they have any (`states`). `cache`: None to
    keep nothing that no sequence holds, as must be where there is state: nobody keeps that."""

    def __init__(
        self, pool: PagePool, page_size: int, cache: PrefixCache | None = None, states: StateSlots | None = None
    ) -> None:
        assert cache is None or states is None, "a page without the state behind it is of no use"
        self.pool = pool
        self.cache = cache
        self.states = states
        self.page_size = page_size
        self._copies: dict[int, int] = {}  # target -> source, until they are taken
        self._imports: dict[tuple[int, int], KVImport] = {}  # by sequence, until they are taken

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def find_prefix(self, seq: Sequence, siblings: Iterable[Sequence]) -> Prefix:
        """The longest prefix of a waiting sequence that need not be computed; its last token always must be."""
        if seq.wants_prompt_logits:
            return NOTHING
        found = [self._lent(seq, sibling) for sibling in siblings]
        pages = self.cache.find(seq) if self.cache is not None else ()
        num_cached = len(pages) * self.page_size
        if pages:
            found.append(Prefix(pages=pages, num_tokens=num_cached, num_cached=num_cached))
        if seq.imported is not None and seq.imported.num_tokens > num_cached:
            num_tokens = seq.imported.num_tokens
            found.append(Prefix(pages=pages, num_tokens=num_tokens, num_cached=num_cached, is_imported=True))
        return max(found, key=_length, default=NOTHING)

    def _lent(self, seq: Sequence, sibling: Sequence) -> Prefix:
        """What a running sample of the same prompt has of it."""
        length = min(sibling.kv_len, seq.prompt_len, len(seq.tokens) - 1)
        if self.states is not None and sibling.kv_len != length:
            return NOTHING
        num_full, rest = divmod(length, self.page_size)
        return Prefix(
            pages=tuple(sibling.pages[:num_full]),
            partial=sibling.pages[num_full] if rest else None,
            num_tokens=length,
            donor=None if self.states is None else sibling,
        )

    def can_start(self, prefix: Prefix, num_tokens: int) -> bool:
        """Whether `start` with these arguments would succeed."""
        num_idle = sum(not self.pool.num_holders(page) for page in prefix.pages)
        return self.pages_for(num_tokens) - len(prefix.pages) + num_idle <= self.pool.num_free

    def start(self, seq: Sequence, prefix: Prefix, num_tokens: int) -> None:
        """Give a sequence that holds nothing its pages for `num_tokens`, the first of them those of `prefix`."""
        self.pool.share(prefix.pages, seq.key)
        fresh = self.pool.allocate(self.pages_for(num_tokens) - len(prefix.pages), seq.key)
        if prefix.partial is not None:  # a source may itself be the target of a copy that was not yet made
            self._copies[fresh[0]] = self._copies.get(prefix.partial, prefix.partial)
        seq.pages = [*prefix.pages, *fresh]
        seq.kv_len = prefix.num_tokens
        if self.states is not None:
            self.states.start(seq, donor=prefix.donor, imported=seq.imported if prefix.is_imported else None)
        if self.cache is not None:
            self.cache.count(seq, prefix.num_cached)
        if prefix.num_cached and not seq.num_preemptions:
            seq.num_cached = prefix.num_cached
        if prefix.is_imported:
            self._imports[seq.key] = KVImport(seq=seq, start=prefix.num_cached, end=prefix.num_tokens)

    def seal(self, seq: Sequence, old_len: int) -> None:
        """`kv_len` moved from `old_len`: pages that became full can serve others."""
        first, end = old_len // self.page_size, seq.kv_len // self.page_size
        if first < end and self.cache is not None:
            self.cache.record(seq, first, end)

    def num_lacking(self, seq: Sequence, num_tokens: int) -> int:
        """Pages that `seq` needs beyond its own to hold `num_tokens`."""
        return self.pages_for(num_tokens) - len(seq.pages)

    def num_spare(self, seq: Sequence) -> int:
        """Tokens beyond the known ones that the pages of `seq` hold."""
        return len(seq.pages) * self.page_size - len(seq.tokens)

    def grow(self, seq: Sequence, num_pages: int) -> None:
        """Add fresh pages at the end; PagesExhausted when they are lacking."""
        seq.pages += self.pool.allocate(num_pages, seq.key)

    def release(self, seq: Sequence) -> None:
        """Let go of everything `seq` holds."""
        self._imports.pop(seq.key, None)
        for page in seq.pages:  # whoever gets it next has other plans for it
            self._copies.pop(page, None)
        self.pool.release(seq.key)
        if self.states is not None:
            self.states.release(seq)

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
