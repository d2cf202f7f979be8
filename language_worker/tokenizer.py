"""Tokenizer: text and token ids of one checkpoint folder, through the `tokenizers` library.

Owns the rule that untrusted text never becomes a special token, and which ids end an output. A prompt is a list of
(text, trusted) pieces. While no special-token literal touches untrusted text, the whole string is tokenized at once,
exactly as Hugging Face does; otherwise trusted literals are cut out by hand and everything between them is tokenized
with special tokens switched off. Knows nothing of chat templates and models.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from language_worker.detokenizer import (
    ByteLevelDetokenizer,
    IncrementalDetokenizer,
    RedecodingDetokenizer,
    token_bytes,
)
from language_worker.errors import InvalidRequest, ModelNotSupported
from language_worker.nanochat_files import read_published
from language_worker.token_bound import max_token_chars, min_tokens
from transfer.checkpoint_json import CheckpointError, is_kind, parse_object, shown

END_OF_TURN = "<|eot_id|>"  # Llama 3 and LLaDA templates end every message with it; LLaDA's config.json does not say so
Pieces = Sequence[tuple[str, bool]]


class Tokenizer:
    """Tokenizer of the checkpoint in `model_dir` (tokenizer.json; optional tokenizer_config.json,
    generation_config.json, config.json). Thread-safe: nothing changes after construction.

    special_tokens: literal -> id of tokens flagged special. eos_token_ids: ids that end an output. vocab_size: every id
    is below it.
    """

    def __init__(self, model_dir: str | Path) -> None:
        folder = Path(model_dir)
        path = folder / "tokenizer.json"
        text = read_published(folder, path.name)
        if not folder.is_dir():
            raise ModelNotSupported(f"{folder} is no folder that exists; give that of a checkpoint")
        if text is None:
            raise ModelNotSupported(f"{folder} has no tokenizer.json; save the checkpoint with a fast tokenizer")
        try:
            self._parsing = RustTokenizer.from_str(text)
            self._plain = RustTokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise ModelNotSupported(f"{path} is no tokenizer that can be read: {error}") from error
        for tokenizer in (self._parsing, self._plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._plain.encode_special_tokens = True
        added: dict[int, AddedToken] = self._parsing.get_added_tokens_decoder()
        special = {token_id: token for token_id, token in added.items() if token.special}
        self.special_tokens: dict[str, int] = {token.content: token_id for token_id, token in special.items()}
        self._special_ids = frozenset(special)
        self._strips = {t.content: (t.lstrip, t.rstrip) for t in special.values()}
        literals = sorted(self.special_tokens, key=len, reverse=True)
        self._literals = re.compile("|".join(map(re.escape, literals))) if literals else None
        vocab = self._parsing.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocab.values(), default=-1)  # ids may have gaps
        self.eos_token_ids = _eos_ids(folder, self._parsing)
        self._token_bytes: list[bytes | None] | None = None
        self._max_token_chars: int | None = None
        spec = parse_object(text, path)
        if _is_byte_level(spec.get("decoder")):
            self._token_bytes = token_bytes(vocab, self._special_ids)
            self._max_token_chars = max_token_chars(spec, self._token_bytes)

    def has_ids_of(self, other: "Tokenizer") -> bool:
        """Whether every token has the same id here as in `other`."""
        return bool(self._parsing.get_vocab(with_added_tokens=True) == other._parsing.get_vocab(with_added_tokens=True))

    def special_ids(self, literals: Sequence[str]) -> tuple[int, ...]:
        """Ids of those literals that are special tokens here."""
        return tuple(self.special_tokens[literal] for literal in literals if literal in self.special_tokens)

    def encode(self, text: str, allow_special: bool = False, *, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`; special-token literals become special ids only with `allow_special`.

        add_special_tokens: let the tokenizer's own template add its beginning and end ids.
        """
        ids = self.encode_prompt([(text, allow_special)])
        return list(self._wrap(ids)) if add_special_tokens else ids

    def encode_prompt(self, pieces: Pieces) -> list[int]:
        """Ids of the joined pieces; literals become special ids only where they lie inside trusted text.

        Equal to Hugging Face's tokenization of the joined string whenever untrusted text holds no special literal.
        """
        text = "".join(piece for piece, _ in pieces)
        _require_text(text)
        if self._literals is None:
            return _ids(self._parsing, text)
        found = list(self._literals.finditer(text))
        trusted = _trusted_spans(pieces)
        if all(_inside(match.span(), trusted) for match in found):
            ids = _ids(self._parsing, text)
            if sum(token_id in self._special_ids for token_id in ids) == len(found):
                return ids
        return self._encode_by_hand(text, trusted)

    def min_tokens(self, text: str) -> int:
        """A lower bound of the ids that `text` makes, found without tokenizing it; 0 when none is known."""
        return 0 if self._max_token_chars is None else min_tokens(text, self._max_token_chars)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; ids beyond the vocabulary (padded embedding rows) are no text."""
        return self._parsing.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self) -> IncrementalDetokenizer:
        """A fresh incremental detokenizer that skips special tokens."""
        if self._token_bytes is not None:
            return ByteLevelDetokenizer(self._token_bytes)
        return RedecodingDetokenizer(self.decode)

    def token_text(self, token_id: int) -> str:
        """One token shown by itself (log-probability reports): special tokens by their literal."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; special tokens by their literal."""
        table = self._token_bytes
        data = table[token_id] if table is not None and token_id < len(table) else None
        return data if data is not None else self.token_text(token_id).encode("utf-8")

    def _encode_by_hand(self, text: str, trusted: list[tuple[int, int]]) -> list[int]:
        """Cut at the literals inside trusted text; the rest is plain."""
        assert self._literals is not None
        cuts = [m.span() for start, end in trusted for m in self._literals.finditer(text, start, end)]
        ids: list[int] = []
        position, strip_left = 0, False
        for start, end in [*cuts, (len(text), len(text))]:
            literal = text[start:end]
            plain = text[position:start]
            lstrip, rstrip = self._strips.get(literal, (False, False))
            plain = plain.lstrip() if strip_left else plain
            plain = plain.rstrip() if lstrip else plain
            if plain:
                ids += _ids(self._plain, plain)
            if literal:
                ids.append(self.special_tokens[literal])
            position, strip_left = end, rstrip
        return ids

    def _wrap(self, ids: list[int]) -> list[int]:
        """`ids` with what the post-processor adds around one sequence."""
        probe = self._parsing.encode("a", add_special_tokens=True)
        core = len(_ids(self._parsing, "a"))
        mask = probe.special_tokens_mask
        first = next((i for i, is_added in enumerate(mask) if not is_added), 0)
        return [*probe.ids[:first], *ids, *probe.ids[first + core :]]


def _ids(tokenizer: RustTokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _require_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the prompt holds a lone surrogate at character {error.start}; send valid text") from None


def _trusted_spans(pieces: Pieces) -> list[tuple[int, int]]:
    """Maximal [start, end) ranges of the joined text that come from trusted pieces."""
    spans: list[tuple[int, int]] = []
    position = 0
    for piece, is_trusted in pieces:
        end = position + len(piece)
        if is_trusted and piece:
            if spans and spans[-1][1] == position:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((position, end))
        position = end
    return spans


def _inside(span: tuple[int, int], trusted: list[tuple[int, int]]) -> bool:
    i = bisect_right(trusted, span[0], key=lambda range_: range_[0]) - 1
    return i >= 0 and span[1] <= trusted[i][1]


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders") or []
        return len(parts) == 1 and _is_byte_level(parts[0])
    return decoder.get("type") == "ByteLevel"


def _eos_ids(folder: Path, tokenizer: RustTokenizer) -> tuple[int, ...]:
    """EOS ids of generation_config.json, else of config.json, the tokenizer's own eos_token, and the end of a turn."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        if value is not None and not is_kind(value, "ids"):
            wrong = f"{name} has eos_token_id = {shown(value)}; a token id or a list of them is needed"
            raise CheckpointError(str(folder), (wrong,))
        ids |= set(value if isinstance(value, list) else [] if value is None else [value])
        if ids:
            break
    token = _read_json(folder / "tokenizer_config.json").get("eos_token")
    literal = token.get("content") if isinstance(token, dict) else token
    token_id = tokenizer.token_to_id(literal) if isinstance(literal, str) else None
    ids.update(i for i in (token_id, tokenizer.token_to_id(END_OF_TURN)) if i is not None)
    return tuple(sorted(ids))


def _read_json(path: Path) -> dict[str, Any]:
    text = read_published(path.parent, path.name)
    return {} if text is None else parse_object(text, path)
