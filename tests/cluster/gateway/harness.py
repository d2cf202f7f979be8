"""A gateway in one process: the real application, a real small tokenizer, and a handoff played by a script."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
from fastapi import FastAPI

from cluster.chat import load_chat_template
from cluster.config import GatewayConfig
from cluster.gateway.app import create_app
from cluster.gateway.context import GatewayContext
from cluster.served import RequestStats, ServedRequest, Sink
from language_worker.api import TokenChunk, TokenLogprob
from language_worker.errors import Cancelled
from language_worker.tokenizer import Tokenizer
from tests.tiny_tokenizer import TOKEN_IDS, save_tokenizer

MODEL = "tiny"
REPLY = ("The ", "number ", "is ", "4", "2", ".")
T = TypeVar("T")


@dataclass
class Running:
    """What the gateway holds of a request; a script looks at `cancelled`."""

    request: ServedRequest
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


Script = Callable[[Running, Sink], None]


class FakeHandoff:
    """Runs the script of each request on a thread of its own, as callbacks come from I/O threads."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.submitted: list[Running] = []
        self.threads: list[threading.Thread] = []

    def submit(self, request: ServedRequest, sink: Sink) -> Running:
        running = Running(request)
        self.submitted.append(running)
        thread = threading.Thread(target=self.script, args=(running, sink), daemon=True)
        self.threads.append(thread)
        thread.start()
        return running

    def join(self) -> None:
        for thread in self.threads:
            thread.join(timeout=30)
            assert not thread.is_alive(), "a request's script has not ended"


def chunk(request: ServedRequest, index: int, text: str, **fields: Any) -> TokenChunk:
    """One token's chunk."""
    values: dict[str, Any] = {"token_ids": (len(text) % 7 + 65,), "num_prompt_tokens": len(request.prompt_token_ids)}
    return TokenChunk(request_id=request.request_id, index=index, text=text, **{**values, **fields})


def logprob(token_id: int) -> TokenLogprob:
    return TokenLogprob(token_id=token_id, logprob=-0.5, rank=1, top=((token_id, -0.5), (66, -float("inf"))))


def stats_for(request: ServedRequest, num_generated: int) -> RequestStats:
    return RequestStats(num_prompt_tokens=len(request.prompt_token_ids), num_generated_tokens=num_generated, hops={})


def replying(*texts: str) -> Script:
    """Every sample says these texts, a token each, and ends with the last one; the samples take turns."""

    def script(running: Running, sink: Sink) -> None:
        request = running.request
        wants = request.sampling.logprobs is not None
        for position, text in enumerate(texts):
            for index in range(request.sampling.n):
                is_last = position == len(texts) - 1
                made = chunk(request, index, text, finish_reason="stop" if is_last else None)
                extra: dict[str, Any] = {}
                if wants:
                    extra["logprobs"] = tuple(map(logprob, made.token_ids))
                if request.sampling.prompt_logprobs is not None and position == 0 and index == 0:
                    rest = tuple(map(logprob, request.prompt_token_ids[1:]))
                    extra["prompt_logprobs"] = (None, *rest)
                sink.on_chunk(chunk(request, index, text, finish_reason=made.finish_reason, **extra))
        sink.on_end(stats_for(request, len(texts) * request.sampling.n))

    return script


def failing(error: Exception, *texts: str) -> Script:
    """Fail after these texts."""

    def script(running: Running, sink: Sink) -> None:
        for text in texts:
            sink.on_chunk(chunk(running.request, 0, text))
        sink.on_error(error)

    return script


def endless(started: threading.Event, *, text: str = "a") -> Script:
    """One chunk, then nothing until the request is cancelled."""

    def script(running: Running, sink: Sink) -> None:
        if text:
            sink.on_chunk(chunk(running.request, 0, text))
        started.set()
        assert running.cancelled.wait(30), "the request was never cancelled"
        sink.on_error(Cancelled("the request was cancelled"))

    return script


@dataclass
class Gateway:
    """The application, its client and the handoff behind it."""

    app: FastAPI
    client: httpx.AsyncClient
    handoff: FakeHandoff

    async def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.client.post("/v1/chat/completions", json=body)

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": MODEL, "prompt": "hi", **fields})


def make_context(folder: Path, handoff: FakeHandoff, **changes: Any) -> GatewayContext:
    """A context round the tiny tokenizer in `folder`; `changes` are fields of the context or of its config."""
    if not (folder / "tokenizer.json").exists():
        save_tokenizer(folder)
    names = {"config", *GatewayContext.__dataclass_fields__}
    config = GatewayConfig(**{name: value for name, value in changes.items() if name not in names})

    async def no_workers() -> Mapping[str, Mapping[str, Any] | None]:
        return {}

    values: dict[str, Any] = {
        "config": config,
        "model_name": MODEL,
        "tokenizer": Tokenizer(folder),
        "chat_template": load_chat_template(folder),
        "handoff": handoff,
        "max_model_len": 4096,
        "worker_stats": no_workers,
        "ready": lambda: (True, ""),
        "image_token_id": TOKEN_IDS["<|image_pad|>"],
    }
    return GatewayContext(**{**values, **{name: value for name, value in changes.items() if name in names}})


@asynccontextmanager
async def client_of(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application in this process, which is closed on leaving."""
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", timeout=240) as client:
            yield client
    finally:
        app.state.gateway.close()


@asynccontextmanager
async def gateway(folder: Path, script: Script | None = None, **changes: Any) -> AsyncIterator[Gateway]:
    """A running gateway; on leaving, every script has ended and everything that was taken is back."""
    handoff = FakeHandoff(script if script is not None else replying(*REPLY))
    app = create_app(make_context(folder, handoff, **changes))
    async with client_of(app) as client:
        yield Gateway(app, client, handoff)
    await asyncio.to_thread(handoff.join)
    assert app.state.gateway.num_active == 0
    assert app.state.gateway.budget.used == 0


def serve(handoff: Any, folder: Path, main: Callable[[httpx.AsyncClient], Coroutine[Any, Any, T]]) -> T:
    """What `main(client)` returns, with the gateway in front of workers that serve text alone."""

    async def body() -> T:
        app = create_app(make_context(folder, handoff, image_token_id=None, max_model_len=512))
        async with client_of(app) as client:
            result = await main(client)
        assert app.state.gateway.num_active == 0
        return result

    return run(body())


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a test's coroutine under a bound."""

    async def bounded() -> T:
        async with asyncio.timeout(240):
            return await main

    return asyncio.run(bounded())


def events_of(text: str) -> list[Any]:
    """The events of an SSE body, parsed; `[DONE]` as the string."""
    blocks = [block for block in text.split("\n\n") if block]
    assert all(block.startswith("data: ") for block in blocks)
    return [block[6:] if block == "data: [DONE]" else json.loads(block[6:]) for block in blocks]


def assert_error(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The response is OpenAI's error JSON with this status and code; returns the error."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    assert isinstance(error["message"], str)
    assert error["message"]
    assert "Traceback" not in response.text
    return error
