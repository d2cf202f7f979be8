"""nanochat's pickled tokenizer: read without running anything, and token for token what tiktoken's rules give."""

import itertools
import os
import pickle
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from language_worker.errors import ModelNotSupported
from language_worker.nanochat_files import merges_of, read_published
from language_worker.tiktoken_pickle import read_tiktoken_pickle
from language_worker.tokenizer import Tokenizer
from tests.tiny_nanochat import NANO_IDS, SPLIT_PATTERN, make_native_nanochat, nano_ranks, pickled_encoding


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_native_nanochat(tmp_path_factory.mktemp("nano"), 4)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def _merged(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule for one piece: a known one is itself; else the lowest-ranked adjoining pair, leftmost first."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _words(text: str) -> list[str]:
    """Pieces of text of small letters, digits and single blanks, as the split pattern cuts them."""
    pieces: list[str] = []
    for char in text:
        last = pieces[-1] if pieces else ""
        same = char.isalpha() and (last.isalpha() or (last.startswith(" ") and (len(last) == 1 or last[1:].isalpha())))
        if same or (char.isdigit() and last.isdigit() and len(last) == 1):
            pieces[-1] += char
        else:
            pieces.append(char)
    return pieces


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcehlnorstwy") | st.sampled_from([" t", " he", "the", "1", "23", "er"]), max_size=40))
def test_ids_are_those_of_tiktokens_rules(tokenizer: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    expected = [token_id for word in _words(text) for token_id in _merged(word.encode(), nano_ranks())]
    assert tokenizer.encode(text) == expected


@settings(deadline=None)
@given(st.data())
def test_merges_give_what_ranks_give_for_any_vocabulary(data: st.DataObject) -> None:
    """Random vocabularies of few letters, where pairs compete; tokens that no merging reaches are among them."""
    tokens = data.draw(st.lists(st.text("ab", min_size=2, max_size=5), unique=True, max_size=8))
    ranks = {token.encode(): i for i, token in enumerate(["a", "b", *tokens])}
    order = {pair: i for i, pair in enumerate(merges_of(ranks))}
    piece = data.draw(st.text("ab", min_size=1, max_size=14)).encode()
    parts = [bytes([byte]) for byte in piece]
    while piece not in ranks:  # as the `tokenizers` library merges: the earliest pair, leftmost first
        pairs = [(order[p], i) for i, p in enumerate(itertools.pairwise(parts)) if p in order]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    assert [ranks[p] for p in ([piece] if piece in ranks else parts)] == _merged(piece, ranks)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_the_last_ids_and_never_parsed_from_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_tokens == NANO_IDS
    assert tokenizer.vocab_size == len(nano_ranks()) + 9
    assert set(tokenizer.eos_token_ids) == {NANO_IDS["<|assistant_end|>"], NANO_IDS["<|bos|>"]}
    assert not set(tokenizer.encode("<|bos|>hello<|python_start|>")) & set(NANO_IDS.values())
    assert tokenizer.encode("<|bos|>hello", allow_special=True)[0] == NANO_IDS["<|bos|>"]
    assert tokenizer.encode("hello", add_special_tokens=True) == [NANO_IDS["<|bos|>"], *tokenizer.encode("hello")]


def test_digits_are_split_in_twos(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([t]) for t in tokenizer.encode("123456789")] != ["123456789"]
    pieces = [len(tokenizer.decode([t])) for t in tokenizer.encode("9" * 9)]
    assert max(pieces) <= 2 and sum(pieces) == 9


class _Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/tandem-nanochat-was-run",)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (pickle.dumps(_Runs()), "system"),
        (pickle.dumps({"a": 1}), "pat_str"),
        (pickle.dumps(pickled_encoding()), "state"),
        (pickled_encoding(mergeable_ranks={"a": 1}), "mergeable_ranks"),
        (pickled_encoding(mergeable_ranks={b"a": 1, b"b": 1}), "mergeable_ranks"),
        (pickled_encoding(special_tokens=None), "special_tokens"),
        (pickled_encoding(pat_str=_Runs()), "system"),
        (pickled_encoding(special_tokens={"<|bos|>": 500}), "gaps"),
        (pickled_encoding()[:-200], "ends|opcode"),
        (b"", "."),
        (b"not a pickle", "."),
    ],
)
def test_other_pickles_are_refused_and_nothing_runs(data: bytes, word: str, tmp_path: Path) -> None:
    folder = make_native_nanochat(tmp_path, 0)
    (tmp_path / "tokenizer" / "tokenizer.pkl").write_bytes(data)
    with pytest.raises(ModelNotSupported, match=rf"tokenizer\.pkl is no tokenizer that can be read: .*({word})"):
        Tokenizer(folder)
    assert not Path("/tmp/tandem-nanochat-was-run").exists()


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_damaged_pickles_are_errors_of_one_kind(seed: int) -> None:
    rng = random.Random(seed)
    data = bytearray(pickled_encoding())
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        encoding = read_tiktoken_pickle(bytes(data))
    except ValueError:
        return
    assert all(type(rank) is int for rank in encoding.ranks.values())


def test_the_state_is_what_was_pickled() -> None:
    encoding = read_tiktoken_pickle(pickled_encoding())
    assert (encoding.pattern, encoding.ranks, encoding.special_tokens) == (SPLIT_PATTERN, nano_ranks(), NANO_IDS)


def test_a_tokenizer_beside_the_weights_goes_before_that_of_the_base_folder(folder: Path, tmp_path: Path) -> None:
    own = make_native_nanochat(tmp_path, 4)
    (own / "tokenizer.pkl").write_bytes(pickled_encoding(special_tokens={"<|bos|>": len(nano_ranks())}))
    assert Tokenizer(own).special_tokens == {"<|bos|>": len(nano_ranks())}
    assert "chat_template" not in str(read_published(own, "tokenizer_config.json"))
    assert "chat_template" in str(read_published(folder, "tokenizer_config.json"))


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    folder = make_native_nanochat(tmp_path, 4)
    (tmp_path / "tokenizer" / "tokenizer.pkl").unlink()
    with pytest.raises(ModelNotSupported, match=r"tokenizer\.json"):
        Tokenizer(folder)
