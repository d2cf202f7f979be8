"""Incremental detokenisation: token ids in, text out as soon as it is certain.

Promise: the pieces joined equal the tokenizer's own decode of all ids with special tokens skipped, and no piece ends
inside a UTF-8 character. Byte-level vocabularies go through a byte table (a dict look-up per token); any other decoder
goes through re-decoding a short tail.
"""

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol


class IncrementalDetokenizer(Protocol):
    def push(self, token_id: int) -> str:
        """Text that this token made certain; may be empty."""
        ...

    def flush(self) -> str:
        """The rest, an unfinished character shown as U+FFFD; ends the stream."""
        ...


class ByteLevelDetokenizer:
    """For byte-level BPE: every token is a byte string; special tokens are None."""

    __slots__ = ("_decoder", "_token_bytes")

    def __init__(self, token_bytes: Sequence[bytes | None]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        data = self._token_bytes[token_id] if token_id < len(self._token_bytes) else None
        return self._decoder.decode(data) if data else ""

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class RedecodingDetokenizer:
    """For any decoder: decode a tail of ids twice, with and without the new token, and emit the difference.

    Text ending in U+FFFD is held back, for at most `max_held` tokens (a stray byte is no unfinished character).
    """

    __slots__ = ("_decode", "_ids", "_max_held", "_read", "_start")

    def __init__(self, decode: Callable[[Sequence[int]], str], max_held: int = 8) -> None:
        self._decode = decode
        self._max_held = max_held
        self._ids: list[int] = []
        self._start = 0  # where the re-decoded tail begins
        self._read = 0  # ids whose text is out

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        if len(after) <= len(before):
            return ""
        if after.endswith("\ufffd") and len(self._ids) - self._read < self._max_held:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        before = self._decode(self._ids[self._start : self._read])
        after = self._decode(self._ids[self._start :])
        self._start = self._read = len(self._ids)
        return after[len(before) :]


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table, character -> byte: printable bytes stand for themselves, the others are shifted past U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(byte): byte for byte in printable}
    for shift, byte in enumerate(byte for byte in range(256) if byte not in printable):
        table[chr(0x100 + shift)] = byte
    return table


def token_bytes(vocab: Mapping[str, int], special_ids: Iterable[int]) -> list[bytes | None]:
    """Bytes of every id of a byte-level vocabulary; None for special ids and holes.

    A token with a character outside the alphabet (an added token with a space, say) stands for its own UTF-8.
    """
    alphabet, skipped = byte_level_alphabet(), set(special_ids)
    table: list[bytes | None] = [None] * (max(vocab.values(), default=-1) + 1)
    for token, token_id in vocab.items():
        if token_id in skipped:
            continue
        if all(char in alphabet for char in token):
            table[token_id] = bytes(alphabet[char] for char in token)
        else:
            table[token_id] = token.encode("utf-8")
    return table
