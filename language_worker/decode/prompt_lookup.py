"""Drafts from the sequence itself: what followed the last time its latest tokens occurred.

An index per sequence, kept with it and extended as it grows, so that a proposal costs a few look-ups however long the
text is. Where the earlier occurrence runs into the end of the text, the draft goes on with itself: text with a period
is continued beyond one period.
"""

from collections.abc import Sequence

NGRAM_SIZES = (4, 3, 2)  # tokens that must agree; longer ones are better predictors and are tried first


class DraftIndex:
    """Where each n-gram of one growing token list was followed last. `limit`: drafts worth proposing now."""

    __slots__ = ("_ends", "_num_indexed", "limit")

    def __init__(self, limit: int) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0
        self.limit = limit

    def propose(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """Up to `count` tokens that may follow; `tokens` must begin with those of the last call."""
        count = min(count, self.limit)
        if count <= 0:
            return ()
        self._extend(tokens)
        for size in NGRAM_SIZES:
            start = self._ends.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if start is not None:
                return _copied(tokens, start, count)
        return ()

    def _extend(self, tokens: Sequence[int]) -> None:
        """Index every n-gram that has a follower by now."""
        for end in range(max(1, self._num_indexed), len(tokens)):
            for size in NGRAM_SIZES:
                if end >= size:
                    self._ends[tuple(tokens[end - size : end])] = end
        self._num_indexed = len(tokens)


def _copied(tokens: Sequence[int], start: int, count: int) -> tuple[int, ...]:
    period = len(tokens) - start
    return tuple(tokens[start + i % period] for i in range(count))
