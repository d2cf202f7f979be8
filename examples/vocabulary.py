"""Tokens of a task: its tokenizer, trained when it is first asked for, and what it makes of texts that come again."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from tokenizers import Tokenizer

NUM_KEPT = 4096  # texts whose tokens are kept


class Vocabulary:
    """The tokens of the tokenizer that `build` returns."""

    def __init__(self, build: Callable[[], Tokenizer]) -> None:
        self.tokenizer = lru_cache(maxsize=1)(build)
        self.encode = lru_cache(maxsize=NUM_KEPT)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer().encode(text).ids)

    def token_id(self, token: str) -> int:
        """The id of a token that the tokenizer has."""
        found = self.tokenizer().token_to_id(token)
        assert found is not None, f"the tokenizer has no token {token}"
        return int(found)
