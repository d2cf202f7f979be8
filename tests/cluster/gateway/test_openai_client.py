"""The unmodified `openai` client against the gateway on a real uvicorn server."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from cluster.gateway.app import create_app
from tests.cluster.gateway.harness import REPLY, FakeHandoff, Script, endless, failing, make_context, replying
from transfer.errors import RemoteFailure

TEXT = "".join(REPLY)
IMAGE = "data:image/png;base64," + base64.b64encode(b"picture").decode()


class Server:
    """A uvicorn server in a thread, on a free port."""

    def __init__(self, folder: Path, script: Script, **changes: Any) -> None:
        self.handoff = FakeHandoff(script)
        self.app = create_app(make_context(folder, self.handoff, **changes))
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        config = uvicorn.Config(self.app, log_level="error", lifespan="on", timeout_graceful_shutdown=5)
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self) -> Server:
        self.socket.listen()  # connections wait in the backlog until the server accepts
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.uvicorn.should_exit = True
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()
        self.handoff.join()
        assert self.app.state.gateway.num_active == 0
        self.socket.close()


@contextlib.contextmanager
def client_of(server: Server, key: str = "key") -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0, timeout=30) as client:
        yield client


def test_chat_with_and_without_stream_with_an_image(tmp_path: Path) -> None:
    content: Any = [{"type": "image_url", "image_url": {"url": IMAGE, "detail": "low"}}, {"type": "text", "text": "?"}]
    messages: Any = [{"role": "user", "content": content}]
    with Server(tmp_path, replying(*REPLY), api_keys=("key",)) as server, client_of(server) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        answer = client.chat.completions.create(model="tiny", messages=messages, n=2, logprobs=True, top_logprobs=1)
        assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 2 * len(REPLY)
        assert answer.choices[0].logprobs is not None
        stream = client.chat.completions.create(
            model="tiny",
            messages=messages,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"top_k": 1},
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage is not None
        assert server.handoff.submitted[-1].request.sampling.top_k == 1
        assert server.handoff.submitted[-1].request.media == (b"picture",)


def test_text_completions(tmp_path: Path) -> None:
    with Server(tmp_path, replying(*REPLY)) as server, client_of(server) as client:
        answer = client.completions.create(model="tiny", prompt=["a", "b"], logprobs=1, echo=True)
        assert [choice.text for choice in answer.choices] == ["a" + TEXT, "b" + TEXT]
        stream = client.completions.create(model="tiny", prompt="a", stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == TEXT


def test_errors_arrive_as_the_clients_own_types(tmp_path: Path) -> None:
    messages: Any = [{"role": "user", "content": "x"}]
    with Server(tmp_path, replying(*REPLY), api_keys=("key",)) as server:
        with client_of(server, "wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with client_of(server) as client:
            with pytest.raises(openai.NotFoundError) as missing:
                client.chat.completions.create(model="other", messages=messages)
            assert missing.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError) as bad:
                client.chat.completions.create(model="tiny", messages=[])
            assert bad.value.param == "messages"
            server.handoff.script = failing(RemoteFailure("QueueFull", "full"))
            with pytest.raises(openai.InternalServerError) as full:
                client.chat.completions.create(model="tiny", messages=messages, stream=True)
            assert full.value.status_code == 503
            server.handoff.script = failing(RemoteFailure("PeerLost", "x"), "one")
            with pytest.raises(openai.APIError) as broken:
                list(client.chat.completions.create(model="tiny", messages=messages, stream=True))
            assert broken.value.code == "worker_lost"


@pytest.mark.parametrize("stream", [True, False])
def test_closing_the_connection_cancels(tmp_path: Path, stream: bool) -> None:
    started = threading.Event()
    body = {"model": "tiny", "stream": stream, "messages": [{"role": "user", "content": "x"}]}
    with Server(tmp_path, endless(started)) as server:
        connection = socket.create_connection(server.socket.getsockname(), timeout=30)
        request = httpx.Request("POST", server.url + "/v1/chat/completions", json=body)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(request.content)}\r\n\r\n"
        connection.sendall(head.encode() + request.content)
        assert started.wait(30)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        connection.close()
        assert server.handoff.submitted[0].cancelled.wait(30)


def test_many_streams_at_once_do_not_mix(tmp_path: Path) -> None:
    def script(running: Any, sink: Any) -> None:
        number = len(running.request.prompt_token_ids)
        replying(*[f"{number}," for _ in range(50)])(running, sink)

    with Server(tmp_path, script) as server, client_of(server) as client:

        def ask(number: int) -> tuple[int, str]:
            stream = client.completions.create(model="tiny", prompt=[65] * number, stream=True)
            return number, "".join(chunk.choices[0].text for chunk in stream)

        with ThreadPoolExecutor(16) as pool:
            for number, text in pool.map(ask, range(1, 65)):
                assert text == f"{number}," * 50
