"""PrefixCache: which page holds the KV of which prefix.

A full page is named by a chained digest: of the page before it, its own token ids, and the content keys of the media
its positions take rows from. The chain begins with what else decides the numbers: model, dtype, page size. Equal names
mean equal content, so a hit needs no comparison. Media without a content key end a chain before their first position.

    root -> digest(root, tokens 0..31) -> digest(that, tokens 32..63, media in 32..63) -> ...

Pure: knows page ids, tokens and lengths; whose pages are evicted when is the pool's business.
"""

import struct
from array import array
from hashlib import blake2b

from language_worker.page_pool import PagePool
from language_worker.request import MediaSpan, Sequence

DIGEST_BYTES = 16


class PrefixCache:
    """Full pages of one pool by name. `root`: digest of everything but tokens and media that decides a page's KV."""

    def __init__(self, pool: PagePool, page_size: int, root: bytes) -> None:
        self._pool = pool
        self._page_size = page_size
        self._root = root
        self._pages: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self.num_queried = 0  # tokens of admitted sequences
        self.num_hit = 0  # those of them whose KV was there
        pool.on_evict = self._forget

    def find(self, seq: Sequence) -> tuple[int, ...]:
        """Pages of the longest cached prefix of `seq` that leaves at least its last token to compute."""
        pages = []
        for name in self._name_pages(seq, (len(seq.tokens) - 1) // self._page_size):
            page = self._pages.get(name)
            if page is None:
                break
            pages.append(page)
        return tuple(pages)

    def find_tail(self, seq: Sequence, window: int) -> tuple[int, tuple[int, ...]]:
        """As `find` where a query sees `window` keys, and one more is wanted: only the last pages of the prefix need be
        here. Returns which page of the sequence the first of them is, and the pages."""
        names = self._name_pages(seq, (len(seq.tokens) - 1) // self._page_size)
        pages = [self._pages.get(name) for name in names]
        gap, first, end = -1, 0, 0
        for i, page in enumerate(pages):
            if page is None:
                gap = i
                continue
            needed = first_seen_page((i + 1) * self._page_size, window, self._page_size)
            if gap < needed:
                first, end = needed, i + 1
        return first, tuple(page for page in pages[first:end] if page is not None)

    def count(self, seq: Sequence, num_hit: int) -> None:
        """`seq` was admitted with `num_hit` of its tokens found here."""
        self.num_queried += len(seq.tokens)
        self.num_hit += num_hit

    def record(self, seq: Sequence, first: int, end: int) -> None:
        """The KV of pages [first, end) of `seq` is final and complete; of equal pages the first one stays."""
        names = self._name_pages(seq, end)
        for i in range(first, len(names)):
            if names[i] not in self._pages:
                page = seq.pages[i - seq.first_page]
                self._pool.keep(page)
                self._pages[names[i]] = page
                self._names[page] = names[i]

    def _name_pages(self, seq: Sequence, num_pages: int) -> list[bytes]:
        """Names of the first pages of `seq`, fewer where the chain ends; kept with it, since tokens never change."""
        names, size = seq.page_names, self._page_size
        for i in range(len(names), num_pages):
            media = [span for span in seq.media_spans if span.start < (i + 1) * size and span.end > i * size]
            if any(span.key is None for span in media):
                break
            tokens = array("Q", seq.tokens[i * size : (i + 1) * size]).tobytes()
            names.append(_digest(names[-1] if names else self._root, tokens, i * size, media))
        return names[:num_pages]

    def _forget(self, page: int) -> None:
        del self._pages[self._names.pop(page)]

    def check_invariants(self) -> None:
        """Assert that the two tables agree and name only pages with content (tests; our own bugs only)."""
        assert {page: name for name, page in self._pages.items()} == self._names, "names and pages disagree"
        assert all(self._pool.is_kept(page) for page in self._names), "a named page may be given away unnoticed"


def first_seen_page(num_tokens: int, window: int, page_size: int) -> int:
    """The first page that a query at `num_tokens`, or one before it, still sees through a window (0: of everything)."""
    return max(0, num_tokens - window) // page_size if window else 0


def _digest(parent: bytes, tokens: bytes, start: int, media: list[MediaSpan]) -> bytes:
    digest = blake2b(parent, digest_size=DIGEST_BYTES, person=b"tandem-page")
    digest.update(tokens)
    for span in media:
        assert span.key is not None
        digest.update(struct.pack("<qqI", span.start - start, span.end - start, len(span.key)) + span.key)
    return digest.digest()
