"""What a folder in nanochat's own layout says of tokens and chat, as the files that a published folder would hold.

The tokenizer lies beside the weights (`tokenizer.pkl`) or in the base folder of all checkpoints
(`BASE/tokenizer/tokenizer.pkl` for `BASE/chatsft_checkpoints/d20`). Its ranks become merges: the pair that a token was
merged from is the one that is left when its own bytes are merged; in no text does another adjoining pair make that
token, since what happens inside it does not depend on what is beside it. So both tokenizers agree on every text.
Conversations are nanochat's: the system message leads the first user message, turns alternate.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from language_worker.detokenizer import byte_level_alphabet
from language_worker.errors import ModelNotSupported
from language_worker.tiktoken_pickle import TiktokenEncoding, read_tiktoken_pickle
from transfer.checkpoint_json import read_text

PICKLE = "tokenizer.pkl"
BOS, EOS = "<|bos|>", "<|assistant_end|>"
CHAT_TOKENS = (BOS, "<|user_start|>", "<|user_end|>", "<|assistant_start|>", EOS)
CHAT_TEMPLATE = """\
{%- if messages and messages[0]['role'] == 'system' -%}
  {%- set lead = messages[0]['content'] + '\\n\\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}
  {%- set lead = '' -%}{%- set turns = messages -%}
{%- endif -%}
{{- '<|bos|>' -}}
{%- for turn in turns -%}
  {%- if turn['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}
    {{- raise_exception('messages must alternate between user and assistant, after at most one system message') -}}
  {%- elif turn['role'] == 'user' -%}
    {{- '<|user_start|>' + (lead if loop.first else '') + turn['content'] + '<|user_end|>' -}}
  {%- else -%}
    {{- '<|assistant_start|>' + turn['content'] + '<|assistant_end|>' -}}
  {%- endif -%}
{%- else -%}
  {{- raise_exception('a conversation needs a user message') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""
_DEPTH = re.compile(r"d(\d+)")
_WEIGHTS = re.compile(r"model_\d+\.pt")


def read_published(folder: str | Path, name: str) -> str | None:
    """Text of a file that published folders hold, derived from nanochat's own where the folder has none; None if there
    is neither. Raises CheckpointError for a file that is no text, ModelNotSupported for a tokenizer that cannot be
    read."""
    path = Path(folder) / name
    if path.is_file():
        return read_text(path)
    pickle = _find_pickle(Path(folder))
    if pickle is None:
        return None
    stat = pickle.stat()
    return _derived(pickle, stat.st_mtime_ns, stat.st_size).get(name)


def choose_folder(folder: Path) -> Path:
    """The folder itself, or of one that only holds nanochat's models by depth (d12, d20, ...) the deepest model's; of
    those with other names the newest."""
    if not folder.is_dir() or (folder / "config.json").is_file() or _holds_weights(folder):
        return folder
    models = [path for path in folder.iterdir() if path.is_dir() and _holds_weights(path)]
    return max(models, key=_depth_and_age, default=folder)


def _depth_and_age(folder: Path) -> tuple[int, float]:
    depth = _DEPTH.fullmatch(folder.name)
    return (int(depth[1]) if depth else -1, folder.stat().st_mtime)


def _holds_weights(folder: Path) -> bool:
    return any(_WEIGHTS.fullmatch(path.name) for path in folder.iterdir())


def _find_pickle(folder: Path) -> Path | None:
    """The tokenizer of a folder with weights in nanochat's layout."""
    if not folder.is_dir() or (folder / "tokenizer.json").is_file():
        return None
    if not _holds_weights(folder):
        return None
    places = (folder / PICKLE, folder.resolve().parent.parent / "tokenizer" / PICKLE)
    return next((place for place in places if place.is_file()), None)


@functools.lru_cache(maxsize=2)
def _derived(pickle: Path, mtime_ns: int, num_bytes: int) -> Mapping[str, str]:
    """The files by name; the figures are those of the pickle, so that another one is read anew."""
    try:
        encoding = read_tiktoken_pickle(pickle.read_bytes())
        spec = _tokenizer_spec(encoding)
    except (OSError, ValueError) as error:
        raise ModelNotSupported(f"{pickle} is no tokenizer that can be read: {error}") from error
    special = encoding.special_tokens
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if BOS in special and EOS in special:
        config |= {"bos_token": BOS, "eos_token": EOS}
    if all(token in special for token in CHAT_TOKENS):
        config["chat_template"] = CHAT_TEMPLATE
    ends = [special[token] for token in (EOS, BOS) if token in special]
    files = {
        "tokenizer.json": spec,
        "tokenizer_config.json": config,
        "generation_config.json": {"eos_token_id": ends},
    }
    return {name: json.dumps(value, ensure_ascii=False) for name, value in files.items()}


def _tokenizer_spec(encoding: TiktokenEncoding) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE with tiktoken's rules; its reader numbers the special tokens on."""
    by_id = sorted((token_id, token) for token, token_id in encoding.special_tokens.items())
    first = 1 + max(encoding.ranks.values(), default=-1)
    if [token_id for token_id, _ in by_id] != list(range(first, first + len(by_id))) or first != len(encoding.ranks):
        raise ValueError("its ids have gaps; special tokens must follow the others at once")
    letters = {byte: char for char, byte in byte_level_alphabet().items()}

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": encoding.pattern}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token_id, "content": token, **flags} for token_id, token in by_id],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": _beginning(encoding),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece of text that is a token is that token
            "vocab": {spelled(token): rank for token, rank in encoding.ranks.items()},
            "merges": [[spelled(first), spelled(second)] for first, second in merges_of(encoding.ranks)],
        },
    }


def _beginning(encoding: TiktokenEncoding) -> dict[str, Any] | None:
    """What puts the token in front that every document of the training data began with."""
    if BOS not in encoding.special_tokens:
        return None
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    tokens = {BOS: {"id": BOS, "ids": [encoding.special_tokens[BOS]], "tokens": [BOS]}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": tokens,
    }


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that tokens are merged from, in the order of their ranks; a token that no merging reaches has none."""
    longer = sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__)
    return [pair for token in longer if (pair := _last_pair(token, ranks)) is not None]


def _last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    cuts = [i for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    if len(cuts) == 1:
        return token[: cuts[0]], token[cuts[0] :]
    parts = [token[i : i + 1] for i in range(len(token))]
    none = len(ranks) + 1
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], none))
        if parts[best] + parts[best + 1] not in ranks:
            return None
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return (parts[0], parts[1]) if all(part in ranks for part in parts) else None
