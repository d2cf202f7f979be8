"""A running cluster as its clients see it: requests, streams, the metrics page, and waiting for conditions."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from cluster.demo import MODEL_NAME, questions
from tests.waiting import eventually

CHAT = "/v1/chat/completions"
TIMEOUT_S = 240.0  # between two events of a stream, too
NO_SPECIAL_TOKENS = {str(i): -100.0 for i in range(403, 411)}  # of the shipped model
LEDGER = (
    "transfer_blocks_in_use",
    "transfer_streams_open",
    "transfer_tickets_open",
    "kv_pages_referenced",
    "kv_pages_swapped",
    "kv_buffer_rows_reserved",
    "kv_exports_open",
    "input_buffer_rows_reserved",
    "transfer_slots_fenced",
    "num_requests_running",
    "num_requests_waiting",
)
TOPOLOGIES = ({"embedding", "language"}, {"embedding", "prefill", "decode"}, {"prefill", "decode"})
_SAMPLE = re.compile(r'^tandem:(\w+)\{worker="([^"]+)"\} (\S+)$', re.MULTILINE)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def image_part(data: bytes | Path) -> dict[str, Any]:
    """One image of a message, as a data URL."""
    raw = data.read_bytes() if isinstance(data, Path) else data
    return {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(raw).decode()},
    }


def chat_body(text: str, *images: bytes | Path, **fields: Any) -> dict[str, Any]:
    """A greedy request: the images, then the text."""
    content = [*map(image_part, images), {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return {"model": MODEL_NAME, "messages": messages, "temperature": 0, "max_tokens": 16, **fields}


def long_body(text: str, num_tokens: int, *images: bytes | Path, **fields: Any) -> dict[str, Any]:
    """A greedy request whose answer has exactly `num_tokens` tokens, all of them text."""
    fields = {"max_tokens": num_tokens, "ignore_eos": True, "logit_bias": NO_SPECIAL_TOKENS, **fields}
    return chat_body(text, *images, **fields)


@dataclass
class Streamed:
    """What a stream brought: text by choice, the usage, the error event, whether [DONE] came."""

    texts: dict[int, str] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    is_done: bool = False

    @property
    def text(self) -> str:
        return self.texts.get(0, "")

    def add(self, data: str) -> None:
        """One event. Nothing may follow an error or [DONE]."""
        assert not self.is_done and self.error is None, f"{data!r} came after the end"
        if data == "[DONE]":
            self.is_done = True
            return
        event = json.loads(data)
        self.error = event.get("error")
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            index = choice["index"]
            self.texts[index] = self.texts.get(index, "") + (choice["delta"].get("content") or "")
            if choice["finish_reason"] is not None:
                self.finish_reasons[index] = choice["finish_reason"]


class Serving:
    """One gateway. Thread-safe."""

    def __init__(self, url: str) -> None:
        self.url = url
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=64)
        self.client = httpx.Client(base_url=url, timeout=TIMEOUT_S, limits=limits)

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def post(self, body: Any) -> httpx.Response:
        return self.client.post(CHAT, json=body)

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request that must succeed."""
        response = self.post(body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def text(self, body: dict[str, Any]) -> str:
        """The text of the only choice."""
        return str(self.ask(body)["choices"][0]["message"]["content"])

    @contextmanager
    def events(self, body: dict[str, Any]) -> Iterator[Iterator[str]]:
        """The data of each event; leaving early closes the connection."""
        with self.client.stream("POST", CHAT, json={**body, "stream": True}) as response:
            if response.status_code != 200:
                raise AssertionError(response.read().decode())
            yield (line.removeprefix("data: ") for line in response.iter_lines() if line)

    def stream(self, body: dict[str, Any], on_text: Callable[[], None] = lambda: None) -> Streamed:
        """The whole stream. on_text: called once, when the first text is here."""
        streamed, is_told = Streamed(), False
        with self.events({**body, "stream_options": {"include_usage": True}}) as events:
            for data in events:
                streamed.add(data)
                if any(streamed.texts.values()) and not is_told:
                    is_told = True
                    on_text()
        return streamed

    def metrics(self) -> dict[str, dict[str, float]]:
        """The plain figures of each worker, by worker."""
        figures: dict[str, dict[str, float]] = {}
        for name, worker, value in _SAMPLE.findall(self.client.get("/metrics").text):
            figures.setdefault(worker, {})[name] = float(value)
        return figures

    def settled(self, kinds: Collection[str] = ()) -> dict[str, dict[str, float]]:
        """The plain figures of each worker once all of these kinds (none named: all) are up: one that answers too late
        for the page is on it without its figures.
        """

        def read() -> dict[str, dict[str, float]] | None:
            figures = self.metrics()
            named = [values for worker, values in figures.items() if not kinds or worker.split("-")[0] in kinds]
            return figures if named and all(values["worker_up"] for values in named) else None

        return eventually(read, lambda: f"a worker that does not answer: {self.metrics()}")

    def await_empty_ledger(self) -> None:
        """Every worker answers and holds nothing: the last acknowledgements may still be on their way."""

        def leftovers() -> dict[str, dict[str, float]]:
            figures = self.settled()
            assert {name.split("-")[0] for name in figures} in TOPOLOGIES, figures
            required = {name for name in figures if not name.startswith("embedding")}
            missing = {name: set(LEDGER) - figures[name].keys() for name in required}
            for name in required:
                if not name.startswith("prefill"):
                    missing[name].discard("kv_exports_open")
            assert not any(missing.values()), f"{missing} of {figures}"
            left = {
                worker: {k: v for k, v in values.items() if (k in LEDGER or k.endswith("requests_open")) and v}
                for worker, values in figures.items()
            }
            return {worker: values for worker, values in left.items() if values}

        eventually(lambda: not leftovers(), lambda: f"left behind: {leftovers()}")


def ask_demo_question(serving: Serving, index: int = -2) -> None:
    """A good request is answered right."""
    question = questions()[index]
    assert serving.text(chat_body(question.text, question.image)) == question.answer
