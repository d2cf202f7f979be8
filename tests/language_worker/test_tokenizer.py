"""Tokenization equals transformers' where it must, and untrusted text never becomes a special token."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from language_worker.detokenizer import ByteLevelDetokenizer, RedecodingDetokenizer, byte_level_alphabet
from language_worker.errors import InvalidRequest, ModelNotSupported
from language_worker.token_bound import max_token_chars
from language_worker.tokenizer import Tokenizer
from tests.tiny_models import reference_tokenizer
from tests.tiny_tokenizer import SPECIAL_TOKENS, TOKEN_IDS, save_tokenizer

FRAGMENTS = st.sampled_from(
    [
        *SPECIAL_TOKENS[:4],
        *("<tool_call>", "<|", "|>", "im_", "<|im_", "start|>"),
        *(" ", "\n", "\n\n", "  ", "the", "number"),
    ]
)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), max_size=8)
PIECE = st.lists(FRAGMENTS | TEXT, max_size=4).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Tokenizer:
    return Tokenizer(tiny)


@pytest.fixture(scope="module")
def theirs(tiny: Path):
    return reference_tokenizer(tiny)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=PIECE)
def test_trusted_text_equals_transformers(text: str, tokenizer, theirs) -> None:
    assert tokenizer.encode(text, allow_special=True) == theirs(text)["input_ids"]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(pieces=st.lists(st.tuples(PIECE, st.booleans()), max_size=5))
def test_pieces_equal_the_whole_string_unless_untrusted_text_touches_a_literal(pieces, tokenizer, theirs) -> None:
    text = "".join(piece for piece, _ in pieces)
    trust = [trusted for piece, trusted in pieces for _ in piece]
    untrusted_literal, at = False, 0
    while at < len(text):
        literal = max((s for s in SPECIAL_TOKENS if text.startswith(s, at)), key=len, default="")
        untrusted_literal |= not all(trust[at : at + len(literal)])
        at += max(1, len(literal))
    ids = tokenizer.encode_prompt(pieces)
    if not untrusted_literal:
        assert ids == theirs(text)["input_ids"]
    special = [i for i in ids if i in tokenizer.special_tokens.values()]
    expected, at = [], 0
    spans, start = [], 0
    for piece, trusted in [*pieces, ("", False)]:
        if trusted:
            spans.append(piece)
        elif piece or start is None:
            spans.append(None)
    for run in "".join(s if s is not None else "\0" for s in spans).split("\0"):
        at = 0
        while at < len(run):
            literal = max((s for s in SPECIAL_TOKENS if run.startswith(s, at)), key=len, default="")
            if literal:
                expected.append(TOKEN_IDS[literal])
            at += max(1, len(literal))
    assert special == expected, "special ids come from trusted literals, all of them and no others"
    assert tokenizer.decode(ids, skip_special_tokens=False) == _nfc(text)


def _nfc(text: str) -> str:
    import unicodedata

    return unicodedata.normalize("NFC", text)


def test_every_special_literal_in_user_text_stays_text(tokenizer) -> None:
    for literal, token_id in TOKEN_IDS.items():
        if literal not in SPECIAL_TOKENS:
            continue
        ids = tokenizer.encode_prompt([("<|im_start|>user\n", True), (literal, False), ("<|im_end|>", True)])
        assert ids.count(token_id) == (literal in ("<|im_start|>", "<|im_end|>"))
        assert tokenizer.encode(literal) != [token_id] and tokenizer.decode(tokenizer.encode(literal)) == literal


def test_literals_put_together_from_two_pieces_stay_text(tokenizer) -> None:
    for pieces in ([("<|im_", False), ("start|>", True)], [("<|im_", True), ("start|>", False)]):
        ids = tokenizer.encode_prompt(pieces)
        assert TOKEN_IDS["<|im_start|>"] not in ids
        assert tokenizer.decode(ids) == "<|im_start|>"
    assert tokenizer.encode_prompt([("<|im_", True), ("start|>", True)]) == [TOKEN_IDS["<|im_start|>"]]


def test_text_next_to_untrusted_literals_is_joined_as_one_run(tokenizer, theirs) -> None:
    """The plain runs between trusted literals are tokenized whole: 'num' + 'ber' is 'number'."""
    pieces = [("<|im_start|>num", True), ("ber <|im_end|>", False), ("<|im_end|>", True)]
    ids = tokenizer.encode_prompt(pieces)
    head = theirs("<|im_start|>number ")["input_ids"]
    assert ids[: len(head) - 1] == head[:-1]


def test_lone_surrogates_are_an_error_not_a_crash(tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizer.encode("a\ud800b")


def test_eos_ids(tokenizer, tmp_path: Path, tiny: Path) -> None:
    both = tuple(sorted((TOKEN_IDS["<|im_end|>"], TOKEN_IDS["<|endoftext|>"])))
    assert tokenizer.eos_token_ids == both
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["eos_token"] = {"content": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(tmp_path).eos_token_ids == (5, TOKEN_IDS["<|im_end|>"])


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotSupported, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 350), max_size=30))
def test_incremental_text_equals_the_whole_decode(ids: list[int], tokenizer, theirs) -> None:
    """Any ids, valid UTF-8 or not; and no piece but the last may end in a character that more bytes would change."""
    detokenizer = tokenizer.detokenizer()
    assert isinstance(detokenizer, ByteLevelDetokenizer)
    pieces = [detokenizer.push(i) for i in ids]
    whole = tokenizer.decode(ids)
    assert "".join(pieces) + detokenizer.flush() == whole
    assert whole == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(st.characters(codec="utf-8"), max_size=12))
def test_no_half_characters_for_valid_text(text: str, tokenizer) -> None:
    ids = tokenizer.encode(text)
    for detokenizer in (tokenizer.detokenizer(), RedecodingDetokenizer(tokenizer.decode)):
        pieces = [detokenizer.push(i) for i in ids]
        assert "".join(pieces) + detokenizer.flush() == _nfc(text)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


def test_ids_beyond_the_vocabulary_are_no_text(tokenizer) -> None:
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push(i) for i in (10_000, 70, 10_001)] == ["", tokenizer.decode([70]), ""]


def test_the_alphabet_is_a_bijection() -> None:
    assert sorted(byte_level_alphabet().values()) == list(range(256))


def test_token_bytes(tokenizer) -> None:
    for text in ("number", "é", "€"):
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert tokenizer.token_bytes(TOKEN_IDS["<|im_end|>"]) == b"<|im_end|>"


DECOMPOSED = st.lists(
    st.sampled_from(["e\u0301", "\u1112\u1161\u11ab", "a", "  ", "\u03b1\u0313\u0300\u0345", "<|im_end|>"])
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=PIECE | DECOMPOSED.map("".join), allow_special=st.booleans())
def test_the_bound_never_exceeds_the_tokens(text: str, allow_special: bool, tokenizer) -> None:
    assert tokenizer.min_tokens(text) <= len(tokenizer.encode(text, allow_special))


def test_the_bound_counts_characters_by_the_longest_token(tokenizer) -> None:
    longest = max(map(len, TOKEN_IDS))
    assert tokenizer.min_tokens("x" * (longest * 1000 + 1)) == 1001
    assert tokenizer.min_tokens("<|object_ref_start|>" * 50) <= 50
    assert tokenizer.min_tokens("") == 0


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "ByteLevel"}]}},
        {"pre_tokenizer": {"type": "Split", "behavior": "Removed"}},
        {"added_tokens": [{"content": "<x>", "rstrip": True}]},
    ],
    ids=str,
)
def test_no_bound_where_text_can_vanish(change: dict) -> None:
    table = [bytes([i]) for i in range(256)]
    plain = {"normalizer": None, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": []}
    assert max_token_chars(plain, [*table, b"abc", None]) == 3
    assert max_token_chars({**plain, **change}, [*table, b"abc", None]) is None
    assert max_token_chars(plain, table[1:]) is None


def test_the_longest_token_is_measured_in_characters() -> None:
    table = [*(bytes([i]) for i in range(256)), "日本語".encode(), "日".encode() + b"\xe6\x9c"]
    assert max_token_chars({}, table) == 3
    assert max_token_chars({"added_tokens": [{"content": "<five>"}]}, table) == 6
