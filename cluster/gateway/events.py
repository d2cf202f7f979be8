"""Server-sent events: the bytes of a stream, and the response that sends them.

A stream's first bytes exist before its headers leave, so that an error before the first token is an ordinary HTTP
error. After that an error becomes an `error` event, and then `[DONE]` does not come. One send carries all events of
one wake-up.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.errors import http_error

SEND_TIMEOUT_S = 60.0  # a client that takes nothing for so long is gone
DONE = b"data: [DONE]\n\n"


class ChunkWriter:
    """Writes one request's events. What all of them share is encoded once."""

    def __init__(self, *, response_id: str, kind: str, created: int, model: str, fingerprint: str, usage: bool) -> None:
        head = {
            "id": response_id,
            "object": kind,
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._head = "data: " + json.dumps(head)[:-1]
        self._open = self._head + ',"choices":[{"index":'
        self._close = '}],"usage":null}\n\n' if usage else "}]}\n\n"

    def set_usage(self, usage: dict[str, Any]) -> None:
        """The usage that the next chunks carry."""
        self._close = f'}}],"usage":{json.dumps(usage)}}}\n\n'

    def delta(self, index: int, text: str, logprobs: Any = None) -> str:
        """A chat chunk with text."""
        tail = "null" if logprobs is None else json.dumps(logprobs)
        body = f'{index},"delta":{{"content":{json.dumps(text)}}},"logprobs":{tail},"finish_reason":null'
        return self._open + body + self._close

    def part(self, index: int, delta: dict[str, Any], logprobs: Any = None) -> str:
        """A chat chunk with something else than text, or with reasoning."""
        body = f'{index},"delta":{json.dumps(delta)},"logprobs":{json.dumps(logprobs)},"finish_reason":null'
        return self._open + body + self._close

    def role(self, index: int) -> str:
        """A chat choice's first chunk."""
        body = f'{index},"delta":{{"role":"assistant","content":""}},"logprobs":null,"finish_reason":null'
        return self._open + body + self._close

    def finish(self, index: int, reason: str, stop_reason: str | int | None) -> str:
        """A chat choice's last chunk."""
        ends = f'"finish_reason":{json.dumps(reason)},"stop_reason":{json.dumps(stop_reason)}'
        return f'{self._open}{index},"delta":{{}},"logprobs":null,{ends}{self._close}'

    def text(self, index: int, text: str, logprobs: Any, reason: str | None, stop_reason: str | int | None) -> str:
        """A chunk of a text completion."""
        ends = f'"finish_reason":{json.dumps(reason)},"stop_reason":{json.dumps(stop_reason)}'
        body = f'{index},"text":{json.dumps(text)},"logprobs":{json.dumps(logprobs)},{ends}'
        return self._open + body + self._close

    def usage(self, usage: dict[str, Any]) -> str:
        """The chunk after the last choice's end."""
        return f'{self._head},"choices":[],"usage":{json.dumps(usage)}}}\n\n'


def error_event(error: Exception) -> bytes:
    """An error in the middle of a stream."""
    return b"data: " + json.dumps(http_error(error).body).encode() + b"\n\n"


class EventStream(Response):
    """Sends what the iterator gives, each item in one piece, and calls `on_close` whatever happens."""

    media_type = "text/event-stream"

    def __init__(self, items: AsyncIterator[bytes], on_close: Callable[[], None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._items = items
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in self._items:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._on_close()
