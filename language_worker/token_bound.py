"""How long a text one token can stand for: a lower bound of a text's token count, without tokenizing it.

Tokenizing is slow next to reading; a text that cannot fit a context is refused by this bound first. It is known only
where nothing of a text can vanish on its way into tokens: byte-level BPE over all 256 bytes, no normalizer but NFC, no
pre-tokenizer that drops what it splits at, no added token that swallows the blanks around it.
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_KEEPING = frozenset({"ByteLevel", "Digits", "Punctuation", "Sequence", "Split"})  # pre-tokenizers that drop nothing


def max_token_chars(spec: Mapping[str, Any], table: Sequence[bytes | None]) -> int | None:
    """Characters of the longest token of a tokenizer.json (`spec`); None when nothing bounds them.

    table: the bytes of each id, None for special tokens, which stand for their literal.
    """
    parts = [*_parts(spec.get("normalizer"), "normalizers"), *_parts(spec.get("pre_tokenizer"), "pretokenizers")]
    keeps = all(part.get("type") in _KEEPING | {"NFC"} and part.get("behavior") != "Removed" for part in parts)
    added = [token for token in spec.get("added_tokens") or () if isinstance(token, Mapping)]
    swallows = any(token.get("lstrip") or token.get("rstrip") for token in added)
    if not keeps or swallows or len({data for data in table if data is not None and len(data) == 1}) < 256:
        return None
    literals = (len(str(token.get("content", ""))) for token in added)
    return max(*literals, *(_num_chars(data) for data in table if data is not None), 1)


def min_tokens(text: str, longest: int) -> int:
    """At least so many tokens come of `text` when none has more than `longest` characters."""
    composed = text if text.isascii() else unicodedata.normalize("NFC", text)  # what is left of it if it is normalized
    return -(-len(composed) // longest)


def _num_chars(data: bytes) -> int:
    """Characters that begin in `data`; summed over a text's tokens, exactly the text's characters."""
    return sum(byte & 0xC0 != 0x80 for byte in data)


def _parts(spec: Any, list_key: str) -> Iterable[Mapping[str, Any]]:
    """The components of a normalizer or pre-tokenizer, sequences (of sequences) taken apart."""
    if not isinstance(spec, Mapping):
        return
    yield spec
    for part in spec.get(list_key) or ():
        yield from _parts(part, list_key)
