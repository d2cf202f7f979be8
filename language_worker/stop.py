"""StopChecker: when one sample's output ends, and which of its text may leave.

Owns stop strings, stop ids and EOS, and the text held back because it may be the start of a stop string. Stop text is
never emitted. The verdict does not depend on how the text is cut into tokens: the stop string that is complete first
wins, the longest of those that end together. Where the output begins with so many tokens at least, a stop string that
ends in their text is none; one that ends behind it is, wherever it begins.

    held text   |-- of the first min_tokens tokens --|-- later --|
                 no stop string ends in the first `_num_exempt` characters
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from language_worker.detokenizer import IncrementalDetokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Text released by a token, and how the output ended if it did."""

    text: str
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None


class StopChecker:
    """For one sample. `max_tokens`: generated tokens at most; `min_tokens`: nothing but length ends it with one of
    these."""

    __slots__ = (
        "_count", "_detokenizer", "_eos_ids", "_held", "_max_tokens", "_min_tokens", "_num_exempt", "_stop_ids",
        "_strings",
    )  # fmt: skip

    def __init__(
        self,
        detokenizer: IncrementalDetokenizer,
        *,
        max_tokens: int,
        min_tokens: int = 0,
        eos_ids: Iterable[int] = (),
        stop_ids: Iterable[int] = (),
        stop_strings: Iterable[str] = (),
    ) -> None:
        self._detokenizer = detokenizer
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._eos_ids = frozenset(eos_ids)
        self._stop_ids = frozenset(stop_ids)
        self._strings = tuple(stop_strings)
        self._held = ""
        self._num_exempt = 0
        self._count = 0

    def push(self, token_id: int) -> Verdict:
        """Account for one generated token. After a verdict with a finish_reason nothing may be pushed."""
        self._count += 1
        may_stop = self._count > self._min_tokens
        if may_stop and token_id in self._stop_ids:
            return self._end("stop", token_id)
        if may_stop and token_id in self._eos_ids:
            return self._end("stop", None)
        self._hold(self._detokenizer.push(token_id))
        hit = first_stop(self._held, self._strings, self._num_exempt)
        if hit is not None:
            return self._cut(*hit)
        released = self._release(len(self._held) - unfinished_stop(self._held, self._strings))
        if self._count < self._max_tokens:
            return Verdict(text=released)
        last = self._end("length", None)
        return Verdict(text=released + last.text, finish_reason=last.finish_reason, stop_reason=last.stop_reason)

    def flush(self) -> str:
        """Everything still held, for an output that is ended from outside."""
        self._hold(self._detokenizer.flush())
        return self._release(len(self._held))

    def _hold(self, text: str) -> None:
        self._held += text
        if self._count <= self._min_tokens:
            self._num_exempt = len(self._held)

    def _release(self, num_chars: int) -> str:
        released, self._held = self._held[:num_chars], self._held[num_chars:]
        self._num_exempt = max(0, self._num_exempt - num_chars)
        return released

    def _end(self, reason: Literal["stop", "length"], stop_reason: int | None) -> Verdict:
        self._hold(self._detokenizer.flush())
        hit = first_stop(self._held, self._strings, self._num_exempt)
        if hit is not None:
            return self._cut(*hit)
        return Verdict(text=self._release(len(self._held)), finish_reason=reason, stop_reason=stop_reason)

    def _cut(self, start: int, stop: str) -> Verdict:
        released, self._held = self._held[:start], ""
        return Verdict(text=released, finish_reason="stop", stop_reason=stop)


def first_stop(text: str, strings: Iterable[str], num_exempt: int = 0) -> tuple[int, str] | None:
    """(start, stop string) of the occurrence that ends first, behind the first `num_exempt` characters; the longest of
    those that end together."""
    best: tuple[int, int, str] | None = None
    for stop in strings:
        start = text.find(stop, max(0, num_exempt + 1 - len(stop)))
        if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
            best = (start + len(stop), start, stop)
    return None if best is None else (best[1], best[2])


def unfinished_stop(text: str, strings: Iterable[str]) -> int:
    """Length of the longest suffix of `text` that a stop string begins with (the whole of one excluded)."""
    longest = 0
    for stop in strings:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
