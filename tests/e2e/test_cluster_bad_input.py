"""Bad input over HTTP: a precise 4xx in OpenAI's error shape, at once, and no harm to anybody else."""

from __future__ import annotations

import json
import socket
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from cluster.demo import MODEL_NAME, questions
from tests.e2e.serving import CHAT, Serving, ask_demo_question, chat_body, image_part, png
from tests.tiny_models import random_image

pytestmark = pytest.mark.ray

BAD_INPUT_TIMEOUT_S = 2.0


def _declared(width: int, height: int) -> bytes:
    """A well-formed PNG that says it has this many pixels, and holds a few rows of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 + 3 * width) * 4)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _real() -> bytes:
    return png(random_image(64, 64, seed=5))


def _with(**fields: Any) -> dict[str, Any]:
    return chat_body("What number is this?") | fields


def _url(url: str) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return _with(messages=[{"role": "user", "content": [part, {"type": "text", "text": "?"}]}])


BAD: dict[str, tuple[Callable[[], Any], int, str, str]] = {  # name -> body, status, code, what the message names
    "broken image": (lambda: chat_body("?", b"not an image at all"), 400, "invalid_image", "image 0"),
    "empty image": (lambda: chat_body("?", b""), 400, "invalid_image_url", "no data"),
    "truncated PNG": (lambda: chat_body("?", _real()[:-700]), 400, "invalid_image", "truncated or corrupt"),
    "second of two broken": (lambda: chat_body("?", _real(), b"\x89PNG\r\n\x1a\n"), 400, "invalid_image", "image 1"),
    "3x2000 pixels": (lambda: chat_body("?", png(random_image(3, 2000))), 400, "invalid_image_aspect", "3x2000"),
    "20000x20000 pixels": (lambda: chat_body("?", _declared(20000, 20000)), 400, "image_too_large", "pixels"),
    "http URL": (lambda: _url("http://127.0.0.1:1/a.png"), 400, "media_not_allowed", "http"),
    "file URL": (lambda: _url("file:///etc/passwd"), 400, "media_not_allowed", "file"),
    "data URL of no image": (lambda: _url("data:text/plain;base64,aGk="), 400, "invalid_image_url", "image"),
    "data URL of bad base64": (lambda: _url("data:image/png;base64,%%%"), 400, "invalid_image_url", "base64"),
    "33 images": (lambda: chat_body("?", *[_real()] * 33), 400, "too_many_images", "32"),
    "unknown role": (lambda: _with(messages=[{"role": "wizard", "content": "hi"}]), 400, "invalid_request", "role"),
    "empty messages": (lambda: _with(messages=[]), 400, "invalid_request", "messages"),
    "no messages": (lambda: {"model": MODEL_NAME}, 400, "invalid_request", "messages"),
    "too long a prompt": (lambda: chat_body("12345 " * 5000), 400, "context_length_exceeded", "4096"),
    "images beyond the context": (
        lambda: chat_body("?", *[png(random_image(640, 480))] * 20), 400, "context_length_exceeded", "4096",
    ),
    "too many new tokens": (lambda: _with(max_tokens=100_000), 400, "context_length_exceeded", "4096"),
    "wrong model": (lambda: _with(model="gpt-4"), 404, "model_not_found", "gpt-4"),
    "not JSON": (lambda: b"{'model': 1}", 400, "invalid_request", "JSON"),
    "no object": (lambda: [1, 2], 400, "invalid_request", "object"),
    "text for a number": (lambda: _with(max_tokens="many"), 400, "invalid_request", "max_tokens"),
    "number for text": (lambda: _with(model=7), 400, "invalid_request", "model"),
    "list for a map": (lambda: _with(messages=[[]]), 400, "invalid_request", "messages[0]"),
    "negative count": (lambda: _with(max_tokens=-1), 400, "invalid_request", "max_tokens"),
    "unknown parameter": (lambda: _with(tempertaure=1), 400, "unsupported_parameter", "tempertaure"),
}  # fmt: skip


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_precisely(serving: Serving, name: str, is_streamed: bool) -> None:
    make, status, code, named = BAD[name]
    body = make()
    if is_streamed and isinstance(body, dict):
        body["stream"] = True
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    response = serving.client.post(CHAT, content=content, headers=headers, timeout=BAD_INPUT_TIMEOUT_S)
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    assert named in error["message"], error["message"]
    ask_demo_question(serving)


def test_an_image_of_one_pixel_is_answered(serving: Serving) -> None:
    body = chat_body("What number is this?", png(Image.new("RGB", (1, 1), "red")))
    response = serving.client.post(CHAT, json=body, timeout=BAD_INPUT_TIMEOUT_S)
    assert response.status_code == 200, response.text
    plain = serving.ask(chat_body("What number is this?"))["usage"]["prompt_tokens"]
    assert response.json()["usage"]["prompt_tokens"] == plain + 4 + 2  # enlarged to 56x56 pixels; a start and an end


def test_bad_requests_do_not_hurt_good_ones_beside_them(serving: Serving) -> None:
    """All bad bodies at once, over and over, while good ones are answered; then nothing is left behind."""
    bodies = [make() for make, *_ in BAD.values()]

    def send(body: Any) -> int:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        return serving.client.post(CHAT, content=content, headers=headers).status_code

    with ThreadPoolExecutor(12) as pool:
        bad = [pool.submit(send, body) for body in bodies * 2]
        good = [pool.submit(ask_demo_question, serving, i % len(questions())) for i in range(24)]
        assert [f.result() for f in bad] == [status for _, status, *_ in BAD.values()] * 2
        for future in good:
            future.result()
    serving.await_empty_ledger()


def test_a_connection_that_closes_in_the_middle_of_its_body_leaves_nothing(serving: Serving) -> None:
    body = json.dumps(chat_body("?", _real())).encode()

    def part() -> Any:
        yield body[: len(body) // 2]
        raise httpx.ReadError("the client goes away")

    with pytest.raises(httpx.ReadError):
        serving.client.post(CHAT, content=part(), headers={"content-type": "application/json"})
    serving.await_empty_ledger()
    ask_demo_question(serving)


@pytest.mark.parametrize(
    "raw",
    [b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01" * 20, b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n"],
    ids=["words", "TLS", "length"],
)
def test_what_is_not_http_is_refused_and_harms_nobody(serving: Serving, raw: bytes) -> None:
    url = httpx.URL(serving.url)
    with socket.create_connection((url.host, url.port or 80), timeout=BAD_INPUT_TIMEOUT_S) as connection:
        connection.sendall(raw + b"\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
    ask_demo_question(serving)


def test_the_image_part_is_the_one_that_openai_documents() -> None:
    assert image_part(b"x") == {"type": "image_url", "image_url": {"url": "data:image/png;base64,eA=="}}
