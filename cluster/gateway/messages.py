"""Validated messages -> the plain maps that chat templates are written for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from cluster.errors import BadRequest
from cluster.gateway.body import parse_json
from cluster.gateway.schema import ImagePart, Message, ToolCall


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Role, content and whatever else a message has set. `developer` is OpenAI's newer name of `system`."""
    return [_message(message) for message in messages]


def _message(message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    result: dict[str, Any] = {"role": role, "content": _content(message)}
    if message.name is not None:
        result["name"] = message.name
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        result["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        result["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return result


def _content(message: Message) -> str | list[dict[str, Any]]:
    if not isinstance(message.content, list):
        return message.content or ""
    return [
        {"type": "image_url", "image_url": part.image_url.url}
        if isinstance(part, ImagePart)
        else {"type": "text", "text": part.text}
        for part in message.content
    ]


def _tool_call(call: ToolCall) -> dict[str, Any]:
    """Arguments as a map where they are JSON of one, as strictly as a body is: the templates write them as JSON
    themselves, which neither depths that end the stack nor half characters survive."""
    arguments: Any = call.function.arguments
    with suppress(BadRequest):
        arguments = parse_json(arguments.encode())
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
