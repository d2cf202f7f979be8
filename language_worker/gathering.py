"""Gathering: tokens that nobody reads one by one leave in parts of several.

A part costs the same whether it holds one token or sixteen: a message, a wake-up and some Python at either end. Whoever
reads an answer as it comes asks for one token a part; whoever waits for its end asks for more. The first tokens of a
sample always leave at once, and its last ones never wait. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeVar

from language_worker.api import TokenChunk

Entry = TypeVar("Entry")


class Gathering:
    """The chunks of one request, on their way out."""

    def __init__(self, tokens_per_part: int) -> None:
        self._tokens_per_part = tokens_per_part
        self._held: dict[int, list[TokenChunk]] = {}  # by sample, from its second part on

    def add(self, chunk: TokenChunk) -> list[TokenChunk]:
        """What is to leave now that `chunk` is there: at most what was held and the chunk, in their order."""
        if self._tokens_per_part == 1:
            return [chunk]
        held = self._held.get(chunk.index)
        if held is None:
            if chunk.token_ids:
                self._held[chunk.index] = []
            return [chunk]
        if chunk.preview is not None or chunk.prompt_logprobs is not None:
            return [*self._take(chunk.index), chunk]
        held.append(chunk)
        num_tokens = sum(len(one.token_ids) for one in held)
        is_due = chunk.finish_reason is not None or num_tokens >= self._tokens_per_part
        return self._take(chunk.index) if is_due else []

    def rest(self) -> list[TokenChunk]:
        """What is still held."""
        return [part for index in list(self._held) for part in self._take(index)]

    def _take(self, index: int) -> list[TokenChunk]:
        held, self._held[index] = self._held[index], []
        return [_joined(held)] if held else []


def _joined(chunks: Sequence[TokenChunk]) -> TokenChunk:
    """Chunks of one sample, in order, as one."""
    last = chunks[-1]
    if len(chunks) == 1:
        return last
    return replace(
        last,
        token_ids=tuple(chain.from_iterable(chunk.token_ids for chunk in chunks)),
        text="".join(chunk.text for chunk in chunks),
        logprobs=_entries(chunk.logprobs for chunk in chunks),
        mask=_entries(_mask(chunk) for chunk in chunks) if any(chunk.mask is not None for chunk in chunks) else None,
        num_cached_tokens=max(chunk.num_cached_tokens for chunk in chunks),
    )


def _mask(chunk: TokenChunk) -> tuple[int, ...]:
    return (1,) * len(chunk.token_ids) if chunk.mask is None else chunk.mask


def _entries(parts: Iterable[tuple[Entry, ...] | None]) -> tuple[Entry, ...] | None:
    """All entries; None where there are none to be had."""
    there = [part for part in parts if part is not None]
    return tuple(chain.from_iterable(there)) if there else None
