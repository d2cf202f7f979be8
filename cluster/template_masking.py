"""Telling a template's own words from a client's, in the text that the template rendered.

The characters that special tokens are made of are replaced, one for one, in every client string by private-use
characters before rendering. Wherever one of these comes out, that character was the client's; a special-token literal
counts as the template's only if no character of it is. This also holds for literals that only arise by joining strings.

A template may look at what it is given (`'</think>' in content`), so its own string constants stay readable inside
client text, unless they could serve to build a special token. Where that is still not enough (the template changes
letters, say), the `narrow` masking touches only what could take part in a literal. Knows nothing of jinja2 or tokens:
strings in, strings out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_FIRST_PRIVATE, _LAST_PRIVATE = 0xF0000, 0x10FFFD


@dataclass(frozen=True, kw_only=True, slots=True)
class Masking:
    """A one-for-one character mapping, and how to cut a client string: odd entries of the cut are left as they are."""

    to_private: dict[int, int]
    to_plain: dict[int, int]
    cut: Callable[[str], Sequence[str]]

    def mask(self, value: Any) -> Any:
        """The value with every string inside it masked. Keys that are identifiers stay: templates look for them."""
        if isinstance(value, str):
            parts = self.cut(value)
            return "".join(part if i % 2 else part.translate(self.to_private) for i, part in enumerate(parts))
        if isinstance(value, Mapping):
            return {key if key.isidentifier() else self.mask(key): self.mask(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mask(item) for item in value]
        return value

    def unmask(self, text: str) -> str:
        """The text with every private character put back."""
        return text.translate(self.to_plain)


class Masker:
    """Builds maskings for one template (its string constants) and its tokenizer's special literals."""

    def __init__(self, literals: Collection[str], constants: Collection[str]) -> None:
        self._literals = frozenset(literal for literal in literals if literal)
        self._characters = sorted({c for literal in self._literals for c in literal if not c.isspace()})
        self._beginnings = {literal[:i] for literal in self._literals for i in range(1, len(literal))}
        self._endings = {literal[i:] for literal in self._literals for i in range(1, len(literal))}
        self._longest = max(map(len, self._literals), default=0)
        self._literal_pattern = _any_of(self._literals)
        self._spared_pattern = _any_of(filter(self._can_spare, constants))

    def _can_spare(self, constant: str) -> bool:
        apart = not any(literal in constant or constant in literal for literal in self._literals)
        return len(constant) > 1 and apart and not constant.isspace()

    def _cut_wide(self, text: str) -> Sequence[str]:
        return (text,) if self._spared_pattern is None else self._spared_pattern.split(text)

    def _cut_narrow(self, text: str) -> Sequence[str]:
        """Mask whole literals, and at both edges what could become one with what stands beside the string."""
        if self._literal_pattern is None:
            return ("", text)
        if any(text in literal for literal in self._literals):
            return (text,)
        sizes = range(min(self._longest, len(text)), 0, -1)
        head = next((n for n in sizes if text[:n] in self._endings), 0)
        tail = len(text) - next((n for n in sizes if text[-n:] in self._beginnings), 0)
        spans = [(0, head), *(m.span() for m in self._literal_pattern.finditer(text)), (tail, len(text))]
        parts, done = [""], 0
        for start, end in spans:
            if end > done:
                parts += [text[done : max(start, done)], text[max(start, done) : end]]
                done = end
        return [*parts, text[done:]]

    def maskings(self, texts: Sequence[str]) -> tuple[Masking, Masking] | None:
        """(wide, narrow) maskings whose private characters occur in no text; None when the texts use all of them."""
        base = _free_base(len(self._characters), texts)
        if base is None:
            return None
        to_private = {ord(c): base + i for i, c in enumerate(self._characters)}
        to_plain = {private: plain for plain, private in to_private.items()}
        return (
            Masking(to_private=to_private, to_plain=to_plain, cut=self._cut_wide),
            Masking(to_private=to_private, to_plain=to_plain, cut=self._cut_narrow),
        )

    def split(self, masked: str, plain: str) -> list[tuple[str, bool]]:
        """`plain` in (text, trusted) pieces: untrusted are exactly the literals in which the client had a hand.

        `masked` is the same text, character for character, with the client's critical characters private.
        """
        if self._literal_pattern is None:
            return [(plain, True)] if plain else []
        pieces: list[tuple[str, bool]] = []
        start = end = 0  # plain[start:end]: trusted text that has not been written yet
        for own in [*(m.span() for m in self._literal_pattern.finditer(masked)), (len(plain), len(plain))]:
            for foreign in self._literal_pattern.finditer(plain, end, own[0]):
                pieces += [(plain[start : foreign.start()], True), (foreign.group(), False)]
                start = foreign.end()
            end = own[1]
        pieces.append((plain[start:], True))
        return [piece for piece in pieces if piece[0]]


def strings_in(value: Any) -> Iterable[str]:
    """Every string inside nested lists and mappings (keys too)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings_in(item)


def _any_of(words: Iterable[str]) -> re.Pattern[str] | None:
    """A one-group pattern for any of the words, longest first; None for no words."""
    alternatives = [re.escape(word) for word in sorted(set(words), key=len, reverse=True)]
    return re.compile(f"({'|'.join(alternatives)})") if alternatives else None


def _free_base(count: int, texts: Sequence[str]) -> int | None:
    """First code point of `count` private-use ones that no text contains."""
    used = {ord(c) for text in texts for c in re.findall(r"[\U000F0000-\U0010FFFD]", text)}
    base = _FIRST_PRIVATE
    while base + count <= _LAST_PRIVATE:
        clash = next((point for point in range(base + count - 1, base - 1, -1) if point in used), None)
        if clash is None:
            return base
        base = clash + 1
    return None
