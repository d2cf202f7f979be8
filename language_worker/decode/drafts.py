"""Where drafts come from, as the strategy sees it, and the drafts that a model will make.

A source belongs to one sequence and is kept with it. Knows no models: an open draft only holds a place in the window.
"""

from collections.abc import Sequence
from typing import Protocol

OPEN = -1  # stands for a draft that is yet to be made


class DraftSource(Protocol):
    """Proposes what may follow one growing token list. `limit`: drafts worth proposing now."""

    limit: int

    def propose(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        """Up to `count` tokens that may follow; `tokens` must begin with those of the last call."""
        ...


class OpenDrafts:
    """Places for as many drafts as are worth making; a draft model fills them."""

    __slots__ = ("limit",)

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def propose(self, tokens: Sequence[int], count: int) -> tuple[int, ...]:
        return (OPEN,) * max(0, min(count, self.limit))


def learn(source: DraftSource, num_proposed: int, num_accepted: int, most: int) -> None:
    """Propose more when all was accepted, and little more than what was when not."""
    source.limit = min(most, source.limit + 2) if num_accepted == num_proposed else num_accepted + 1
