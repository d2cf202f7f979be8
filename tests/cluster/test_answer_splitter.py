"""Reasoning, answer and calls are told apart the same way however the text is cut into pieces."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.answer_splitter import AnswerSplitter, Part

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "ü"]}}\n</tool_call>'
ADD = ("call", "add", {"a": 1, "b": [2, "ü"]})


def _split(text: str, cuts: list[int] | None = None, **flags: bool) -> list[tuple[Any, ...]]:
    """(kind, text) with neighbours of one kind joined, and (call, name, arguments)."""
    splitter = AnswerSplitter(**{"splits_reasoning": True, "in_reasoning": False, "finds_calls": True, **flags})
    edges = [0, *sorted(cuts or []), len(text)]
    parts: list[Part] = []
    for start, end in itertools.pairwise(edges):
        parts += splitter.push(text[start:end])
    found: list[tuple[Any, ...]] = []
    for part in parts + splitter.finish():
        assert part.text or part.kind == "call"
        if part.kind == "call":
            found.append(("call", part.name, json.loads(part.text)))
        elif found and found[-1][0] == part.kind:
            found[-1] = (part.kind, found[-1][1] + part.text)
        else:
            found.append((part.kind, part.text))
    return found


CASES: list[tuple[str, dict[str, bool], list[tuple[Any, ...]]]] = [
    ("Plain words. ", {}, [("content", "Plain words. ")]),
    ("<think>\nHm.\n\nYes.\n</think>\n\nFour.", {}, [("reasoning", "Hm.\n\nYes."), ("content", "Four.")]),
    ("Hm.\n</think>\n\nFour.", {"in_reasoning": True}, [("reasoning", "Hm."), ("content", "Four.")]),
    ("<think>\n\n</think>\n\nFour.", {}, [("content", "Four.")]),
    ("\n<think>cut", {}, [("reasoning", "cut")]),
    ("  <thin", {}, [("content", "  <thin")]),
    ("a <think> b </think> c", {}, [("content", "a <think> b </think> c")]),
    ("<think>x</think>y", {"splits_reasoning": False}, [("content", "<think>x</think>y")]),
    (CALL, {}, [ADD]),
    (f"Let me see.\n{CALL}\n{CALL}\n", {}, [("content", "Let me see."), ADD, ADD]),
    (f"<think>t</think>{CALL} done", {}, [("reasoning", "t"), ADD, ("content", "done")]),
    (f"<think>{CALL}</think>", {}, [("reasoning", CALL)]),
    (CALL, {"finds_calls": False}, [("content", CALL)]),
    ('<tool_call>{"name": "f"}</tool_call>', {}, [("call", "f", {})]),
    ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', {}, [("call", "f", {"x": 1})]),
    ("<tool_call>{'name'}</tool_call>!", {}, [("content", "<tool_call>{'name'}</tool_call>!")]),
    ('<tool_call>{"name": 3}</tool_call>', {}, [("content", '<tool_call>{"name": 3}</tool_call>')]),
    ('a <tool_call>{"name": "f', {}, [("content", 'a <tool_call>{"name": "f')]),
    ("a\n<tool_call>no</tool_call> b", {}, [("content", "a\n<tool_call>no</tool_call> b")]),
    ("a < b <", {}, [("content", "a < b <")]),
    ("", {}, []),
]


@pytest.mark.parametrize(("text", "flags", "expected"), CASES)
def test_what_each_text_consists_of(text: str, flags: dict[str, bool], expected: list[tuple[Any, ...]]) -> None:
    assert _split(text, **flags) == expected
    assert _split(text, list(range(len(text))), **flags) == expected, "character by character"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=st.sampled_from(CASES), data=st.data())
def test_cuts_change_nothing(case: tuple[str, dict[str, bool], list[tuple[Any, ...]]], data: st.DataObject) -> None:
    text, flags, expected = case
    assert _split(text, data.draw(st.lists(st.integers(0, len(text)), max_size=8)), **flags) == expected


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    words=st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", "<", "a", " ", "\n", "{}"]))
)
def test_no_letter_is_lost(words: list[str]) -> None:
    """Whatever is said: all but marks and blanks comes out, in order."""
    text = "".join(words)
    said = "".join(part[1] for part in _split(text))

    def letters(value: str) -> str:
        for mark in ("<think>", "</think>", "<tool_call>", "</tool_call>"):
            value = value.replace(mark, "")
        return "".join(value.split())

    assert letters(said) == letters(text)


def test_plain_text_is_not_held_back() -> None:
    splitter = AnswerSplitter(splits_reasoning=True, in_reasoning=False, finds_calls=True)
    assert [part.text for part in splitter.push("Hello")] == ["Hello"]
    assert [part.text for part in splitter.push(" you <to")] == [" you"]
    assert [part.text for part in splitter.push("m>")] == [" <tom>"]
