"""Stop conditions: the verdict does not depend on how the text is cut, and stop text never leaves."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from language_worker.detokenizer import ByteLevelDetokenizer
from language_worker.stop import StopChecker, first_stop, unfinished_stop

ALPHABET = [bytes([b]) for b in b"abc"]


class Texts:
    """A detokenizer whose tokens are indices into a list of texts."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def push(self, token_id: int) -> str:
        return self.texts[token_id]

    def flush(self) -> str:
        return ""


def _run(texts: list[str], **values) -> tuple[list[str], str | None, str | int | None]:
    checker = StopChecker(Texts(texts), **{"max_tokens": len(texts), **values})
    pieces = []
    for i in range(len(texts)):
        verdict = checker.push(i)
        pieces.append(verdict.text)
        if verdict.finish_reason is not None:
            return pieces, verdict.finish_reason, verdict.stop_reason
    raise AssertionError("max_tokens did not end the output")


def _oracle(text: str, stops: list[str], num_exempt: int = 0) -> tuple[str, str | None]:
    """Read character by character; the first character at which some stop string is complete ends the text."""
    for end in range(num_exempt + 1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.text("abc", max_size=4), min_size=1, max_size=8),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_any_cut_gives_the_oracle_text(texts: list[str], stops: list[str]) -> None:
    pieces, reason, stop_reason = _run(texts, stop_strings=stops)
    text, stop = _oracle("".join(texts), stops)
    assert ("".join(pieces), stop_reason) == (text, stop)
    assert reason == ("length" if stop is None else "stop")


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.text("ab", max_size=4), min_size=1, max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    min_tokens=st.integers(0, 8),
)
def test_a_stop_string_counts_when_it_ends_behind_the_first_min_tokens(
    texts: list[str], stops: list[str], min_tokens: int
) -> None:
    min_tokens = min(min_tokens, len(texts))
    pieces, reason, stop_reason = _run(texts, stop_strings=stops, min_tokens=min_tokens)
    text, stop = _oracle("".join(texts), stops, len("".join(texts[:min_tokens])))
    assert ("".join(pieces), stop_reason) == (text, stop)
    assert reason == ("length" if stop is None else "stop")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(texts=st.lists(st.text("abc", max_size=4), min_size=1, max_size=8), stop=st.text("abc", min_size=1, max_size=4))
def test_text_leaves_as_soon_as_it_cannot_begin_a_stop(texts: list[str], stop: str) -> None:
    checker = StopChecker(Texts(texts), max_tokens=99, stop_strings=[stop])
    seen, shown = "", ""
    for i, text in enumerate(texts):
        verdict = checker.push(i)
        seen += text
        shown += verdict.text
        if verdict.finish_reason:
            return
        assert seen.startswith(shown)
        held = seen[len(shown) :]
        assert stop.startswith(held) and len(held) < len(stop)
        assert not any(stop.startswith(seen[-n:]) for n in range(len(held) + 1, min(len(stop), len(seen) + 1)))


def test_eos_and_stop_ids_end_without_their_text() -> None:
    assert _run(["x", "E", "y"], eos_ids=[1]) == (["x", ""], "stop", None)
    assert _run(["x", "S", "y"], stop_ids=[1]) == (["x", ""], "stop", 1)
    assert _run(["x", "E"]) == (["x", "E"], "length", None)


def test_text_held_for_a_stop_string_leaves_at_the_end() -> None:
    assert _run(["a", "b"], stop_strings=["abX"]) == (["", "ab"], "length", None)
    assert _run(["a", "b", "E"], stop_strings=["abX"], eos_ids=[2]) == (["", "", "ab"], "stop", None)


def test_min_tokens_holds_off_every_kind_of_stop() -> None:
    assert _run(["s", "E", "s", "x", "s"], stop_strings=["s"], min_tokens=3) == (["s", "E", "s", "x", ""], "stop", "s")
    assert _run(["a", "b", "c"], stop_strings=["ab"], min_tokens=1) == (["", ""], "stop", "ab")
    assert _run(["a", "b", "c"], stop_strings=["ab"], min_tokens=2) == (["", "ab", "c"], "length", None)
    assert _run(["E", "E", "E"], eos_ids=[0, 1], min_tokens=3) == (["E", "E", "E"], "length", None)


def test_an_unfinished_character_is_flushed_as_replacement() -> None:
    checker = StopChecker(ByteLevelDetokenizer([b"a", b"\xe2\x82"]), max_tokens=2)
    assert checker.push(0).text == "a"
    assert checker.push(1).text == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "hit"),
    [("xabc", ["abc", "bc"], (1, "abc")), ("xabc", ["abcd", "b"], (2, "b")), ("x", ["y"], None), ("", ["y"], None)],
)
def test_first_stop(text: str, stops: list[str], hit: tuple[int, str] | None) -> None:
    assert first_stop(text, stops) == hit


def test_first_stop_behind_exempt_text() -> None:
    assert first_stop("abab", ["ab"], 2) == (2, "ab") and first_stop("abab", ["ab"], 1) == (0, "ab")
    assert first_stop("aba", ["aba", "ba"], 2) == (0, "aba") and first_stop("aba", ["aba"], 3) is None


def test_unfinished_stop() -> None:
    assert unfinished_stop("xxab", ["abc", "b"]) == 2
    assert unfinished_stop("xxabc", ["abc"]) == 0
    assert unfinished_stop("a", ["aaa"]) == 1
