"""Telling apart what a model says: its reasoning, its answer, and the tools it calls; piece by piece as it comes.

    <think> reasoning </think> answer <tool_call> {"name": ..., "arguments": {...}} </tool_call>

Reasoning comes first or not at all. Text that may turn out to be the beginning of a mark is held back until it is
clear; a call is whole or it is text: one that is cut short or is no JSON of a call stays in the answer as it was said.
Blanks around the parts belong to none. Knows strings, nothing of tokens, templates or HTTP.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A piece of the reasoning or of the answer; or one call: the tool's name, and its arguments as JSON in `text`."""

    kind: Literal["reasoning", "content", "call"]
    text: str
    name: str = ""


class AnswerSplitter:
    """One answer. in_reasoning: the prompt has opened the reasoning already. splits_reasoning, finds_calls: else its
    marks are text like any other."""

    def __init__(self, *, splits_reasoning: bool, in_reasoning: bool, finds_calls: bool) -> None:
        self._finds_calls = finds_calls
        self._state = "reasoning" if in_reasoning else "start" if splits_reasoning else "content"
        self._held = ""
        self._blanks = ""  # before the call that may turn out to be text
        self._skips_blanks = in_reasoning

    def push(self, text: str) -> list[Part]:
        """What has become clear with these next characters."""
        self._held += text
        parts: list[Part] = []
        while self._step(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """What was held back: no more characters come."""
        held, self._held = self._held, ""
        if self._state == "call":
            held = self._blanks + CALL + held
        elif self._skips_blanks:
            held = held.lstrip()
        kind: Literal["reasoning", "content"] = "reasoning" if self._state == "reasoning" else "content"
        return [Part(kind=kind, text=held)] if held else []

    def _step(self, parts: list[Part]) -> bool:
        """Take one mark, or what stands before the next; whether to go on at once."""
        if self._state == "start":
            return self._begin()
        if self._state == "reasoning":
            return self._until(parts, "reasoning", END_THINK, "content")
        if self._state == "content":
            return self._until(parts, "content", CALL if self._finds_calls else "", "call")
        end = self._held.find(END_CALL)
        if end < 0:
            return False
        said, self._held = self._held[:end], self._held[end + len(END_CALL) :]
        call = _call(said)
        parts.append(call or Part(kind="content", text=self._blanks + CALL + said + END_CALL))
        self._state, self._skips_blanks = "content", call is not None
        return True

    def _begin(self) -> bool:
        """Reasoning, if that is what the answer begins with."""
        said = self._held.lstrip()
        if said.startswith(THINK):
            self._state, self._skips_blanks, self._held = "reasoning", True, said[len(THINK) :]
            return True
        if THINK.startswith(said):
            return False
        self._state = "content"
        return True

    def _until(self, parts: list[Part], kind: Literal["reasoning", "content"], mark: str, after: str) -> bool:
        """Hand out what stands before `mark` ("": there is none)."""
        if self._skips_blanks:
            self._held = self._held.lstrip()
            self._skips_blanks = not self._held
        place = self._held.find(mark) if mark else -1
        if place >= 0:
            before, self._held = self._held[:place], self._held[place + len(mark) :]
            said = before.rstrip()
            self._blanks = before[len(said) :]
            self._state, self._skips_blanks = after, after == "content"
        else:
            clear = len(self._held) - _open_end(self._held, mark)
            said, self._held = self._held[:clear], self._held[clear:]
        if said:
            parts.append(Part(kind=kind, text=said))
        return place >= 0


def _open_end(text: str, mark: str) -> int:
    """How many characters at the end may belong to a mark to come: its beginning, and the blanks before it."""
    if not mark:
        return 0
    begun = next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-n:])), 0)
    before = text[: len(text) - begun]
    return begun + len(before) - len(before.rstrip())


def _call(said: str) -> Part | None:
    """A call in the form that the templates ask for, else None; also for numbers that JSON has not, and for halves of
    surrogate pairs, which no answer can hold."""
    try:
        value = json.loads(said)
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
            return None
        arguments = value.get("arguments", {})
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        if not isinstance(arguments, str):
            return None
        (value["name"] + arguments).encode()
    except (ValueError, RecursionError):
        return None
    return Part(kind="call", text=arguments, name=value["name"])
