"""ChatMessage: one sample's message in OpenAI's shape, as it grows: content, reasoning, tool calls.

With a splitter what the model says is told apart; without one all of it is content.
"""

from __future__ import annotations

import uuid
from typing import Any

from cluster.answer_splitter import AnswerSplitter, Part


class ChatMessage:
    """Takes text, gives the deltas of a stream and, at the end, the whole message."""

    def __init__(self, splitter: AnswerSplitter | None) -> None:
        self._splitter = splitter
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def add(self, text: str, *, is_last: bool) -> list[dict[str, Any]]:
        """The deltas that these next characters make."""
        if self._splitter is None:
            self._content.append(text)
            return [{"content": text}] if text else []
        parts = self._splitter.push(text)
        return [self._delta(part) for part in (parts + self._splitter.finish() if is_last else parts)]

    def _delta(self, part: Part) -> dict[str, Any]:
        if part.kind == "content":
            self._content.append(part.text)
            return {"content": part.text}
        if part.kind == "reasoning":
            self._reasoning.append(part.text)
            return {"reasoning_content": part.text}
        call = {
            "id": f"call_{uuid.uuid4().hex}",
            "type": "function",
            "function": {"name": part.name, "arguments": part.text},
        }
        self._calls.append(call)
        return {"tool_calls": [{"index": len(self._calls) - 1, **call}]}

    def finish_reason(self, reason: str) -> str:
        """The reason as clients expect it: a stop behind calls is for these."""
        return "tool_calls" if self._calls and reason == "stop" else reason

    def message(self) -> dict[str, Any]:
        """The whole message; without an answer besides its calls, content is null."""
        content = "".join(self._content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message |= {"tool_calls": self._calls, "content": content or None}
        return message
