"""Failures: before the first token, in mid-stream, disconnects, slow readers, overload, deadlines."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

import cluster.gateway.generation as generation_module
from cluster.errors import NoWorker, WorkerLost
from language_worker.errors import Cancelled
from tests.cluster.gateway.harness import (
    FakeHandoff,
    assert_error,
    chunk,
    endless,
    events_of,
    failing,
    gateway,
    run,
    stats_for,
)
from transfer.errors import RemoteFailure

REMOTE = {
    "BadImage": (400, "invalid_image"),
    "ImageTooLarge": (400, "image_too_large"),
    "ImageAspect": (400, "invalid_image_aspect"),
    "TooManyImages": (400, "too_many_images"),
    "PromptTooLong": (400, "context_length_exceeded"),
    "MediaMismatch": (400, "media_mismatch"),
    "InvalidRequest": (400, "invalid_request"),
    "QueueFull": (503, "overloaded"),
    "DeadlineExceeded": (504, "deadline_exceeded"),
    "PeerLost": (503, "worker_lost"),
    "StreamTimeout": (503, "worker_lost"),
    "StreamAborted": (503, "worker_lost"),
    "InternalError": (500, "internal_error"),
    "NeverHeardOf": (500, "internal_error"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("code", REMOTE)
def test_a_failure_before_the_first_token_is_an_http_error(tmp_path: Path, code: str, stream: bool) -> None:
    status, expected = REMOTE[code]

    async def main() -> None:
        script = failing(RemoteFailure(code, "image 2: broken at tcp://10.1.2.3:4567"))
        async with gateway(tmp_path, script) as server:
            response = await server.chat(stream=stream)
            error = assert_error(response, status, expected)
            assert "10.1.2.3" not in response.text
            assert ("image 2" in error["message"]) == (status == 400)
            assert ("retry-after" in response.headers) == (status == 503)

    run(main())


def test_a_failure_in_mid_stream_is_an_event_and_done_does_not_come(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(tmp_path, failing(RemoteFailure("PeerLost", "ipc:///run/x.sock"), "one", "two")) as server:
            response = await server.chat(stream=True)
            assert response.status_code == 200
            *chunks, last = events_of(response.text)
            text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
            assert text == "onetwo"
            assert last["error"]["code"] == "worker_lost"
            assert "x.sock" not in response.text

    run(main())


def test_a_failure_after_some_chunks_is_an_http_error_without_stream(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(tmp_path, failing(RemoteFailure("PeerLost", "gone"), "one")) as server:
            assert_error(await server.chat(), 503, "worker_lost")

    run(main())


def test_an_end_without_a_finish_reason_is_an_error(tmp_path: Path) -> None:
    def script(running: Any, sink: Any) -> None:
        sink.on_chunk(chunk(running.request, 0, "half"))
        sink.on_end(stats_for(running.request, 1))

    async def main() -> None:
        async with gateway(tmp_path, script) as server:
            assert_error(await server.chat(), 500, "internal_error")
            *_, last = events_of((await server.chat(stream=True)).text)
            assert last["error"]["code"] == "internal_error"

    run(main())


def test_a_handoff_that_refuses_cancels_what_was_started(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(tmp_path, endless(threading.Event(), text="")) as server:
            inner = server.handoff.submit

            def submit(request: Any, sink: Any) -> Any:
                if len(server.handoff.submitted) == 2:
                    raise NoWorker("no language worker is alive")
                return inner(request, sink)

            server.handoff.submit = submit  # type: ignore[method-assign]
            assert_error(await server.complete(prompt=["a", "b", "c"]), 503, "no_worker")
            assert [running.cancelled.is_set() for running in server.handoff.submitted] == [True, True]

    run(main())


def test_an_unexpected_exception_gives_nothing_away(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(tmp_path) as server:

            def submit(request: Any, sink: Any) -> Any:
                raise KeyError("secret detail")

            server.handoff.submit = submit  # type: ignore[method-assign]
            response = await server.chat()
            assert_error(response, 500, "internal_error")
            assert "secret" not in response.text

    run(main())


async def call_and_leave(
    server: Any, body: dict[str, Any], leave: asyncio.Event, path: str = "/v1/chat/completions"
) -> list[Any]:
    """Speak ASGI by hand: send the body, and disconnect when told to; returns what was sent back."""
    sent: list[Any] = []
    data = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x"}], **body}).encode()
    messages = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "scheme": "http", "http_version": "1.1", "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2), "asgi": {"version": "3.0", "spec_version": "2.3"},
    }  # fmt: skip
    await server.app(scope, receive, send)
    return sent


@pytest.mark.parametrize("text", ["", "a"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_cancels_the_request(tmp_path: Path, stream: bool, text: str) -> None:
    async def main() -> None:
        started = threading.Event()
        async with gateway(tmp_path, endless(started, text=text)) as server:
            leave = asyncio.Event()
            call = asyncio.create_task(call_and_leave(server, {"stream": stream}, leave))
            await asyncio.to_thread(started.wait, 30)
            assert not server.handoff.submitted[0].cancelled.is_set()
            leave.set()
            sent = await call
            assert await asyncio.to_thread(server.handoff.submitted[0].cancelled.wait, 30)
            body = b"".join(m.get("body", b"") for m in sent)
            assert b"[DONE]" not in body
            page = (await server.client.get("/metrics")).text
            assert 'tandem:request_success_total{finish_reason="abort"} 1.0' in page

    run(main())


def test_a_slow_reader_loses_its_stream_and_memory_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.gateway.serving.MAX_BUFFERED_CHUNKS", 8)
    flooded = threading.Event()

    def script(running: Any, sink: Any) -> None:
        sink.on_chunk(chunk(running.request, 0, "first"))
        for _ in range(100_000):
            if running.cancelled.is_set():
                break
            sink.on_chunk(chunk(running.request, 0, "x"))
        flooded.set()
        assert running.cancelled.wait(30)
        sink.on_error(Cancelled("cancelled"))

    async def main() -> None:
        async with gateway(tmp_path, script) as server:
            # The reader: takes nothing until the flood is over.
            response = server.app.state.gateway
            sent: list[bytes] = []

            async def receive() -> Any:
                if not sent:
                    sent.append(b"")
                    body = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "x"}]}
                    return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
                await asyncio.Event().wait()

            async def send(message: Any) -> None:
                if message["type"] == "http.response.body":
                    await asyncio.to_thread(flooded.wait, 30)
                    sent.append(message["body"])

            scope = {
                "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "root_path": "",
                "scheme": "http", "http_version": "1.1", "headers": [], "client": None, "server": None,
                "asgi": {"version": "3.0", "spec_version": "2.3"},
            }  # fmt: skip
            await server.app(scope, receive, send)
            assert response.num_active == 0
            *chunks, last = events_of(b"".join(sent).decode())
            assert last["error"]["code"] == "slow_reader"
            assert len(chunks) < 40

    run(main())


def test_the_gateway_has_a_deadline_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_module, "DEADLINE_GRACE_S", 0.0)

    async def main() -> None:
        script = endless(threading.Event(), text="")
        async with gateway(tmp_path, script, request_timeout_s=0.05) as server:
            assert_error(await server.chat(), 504, "deadline_exceeded")
            assert server.handoff.submitted[0].cancelled.is_set()

    run(main())


def test_beyond_the_concurrent_limit_is_503_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        started = threading.Event()
        async with gateway(tmp_path, endless(started), max_concurrent_requests=1) as server:
            leave = asyncio.Event()
            call = asyncio.create_task(call_and_leave(server, {}, leave))
            await asyncio.to_thread(started.wait, 30)
            response = await server.chat()
            assert_error(response, 503, "overloaded")
            assert response.headers["retry-after"] == "1"
            leave.set()
            await call
            server.handoff.script = FakeHandoff(failing(Cancelled("x"))).script
            assert_error(await server.chat(), 499, "cancelled")

    run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_what_still_runs_when_the_server_must_end_is_told_so(tmp_path: Path, stream: bool) -> None:
    async def main() -> None:
        started = threading.Event()
        async with gateway(tmp_path, endless(started)) as server:
            call = asyncio.create_task(server.chat(stream=stream))
            assert await asyncio.to_thread(started.wait, 30)
            server.app.state.gateway.end_running(WorkerLost("the server stopped before this request had ended"))
            response = await call
            if stream:
                *_, last = events_of(response.text)
                assert last["error"]["code"] == "worker_lost", "and no [DONE]"
            else:
                assert_error(response, 503, "worker_lost")

    run(main())
