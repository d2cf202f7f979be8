"""The HTTP API of a running cluster: the `openai` client, curl, 64 mixed requests at once, and bad input."""

from __future__ import annotations

import itertools
import json
import os
import re
import struct
import subprocess
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from cluster.demo import IMAGE_DIR, MODEL_NAME, questions
from tests.e2e.serving import CHAT, Serving, Streamed, ask_demo_question, chat_body, image_part, long_body, png
from tests.tiny_models import random_image

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
BAD_INPUT_TIMEOUT_S = 2.0
SIZES = (
    (1, 1), (2, 3), (28, 28), (29, 55), (56, 168), (57, 90), (13, 200), (199, 31), (120, 41), (300, 33), (640, 480),
    (97, 1000), (333, 333), (1023, 767),
)  # fmt: skip


# -- the openai client and curl ---------------------------------------------------------------------------------------


@pytest.fixture
def client(serving: Serving) -> Any:
    with openai.OpenAI(base_url=serving.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def _messages(body: dict[str, Any]) -> Any:
    return body["messages"]


def test_openai_client_without_a_stream(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL_NAME]
    for question in questions():
        body = chat_body(question.text, question.image)
        answer = client.chat.completions.create(
            model=MODEL_NAME, messages=_messages(body), temperature=0, max_tokens=16
        )
        assert answer.choices[0].message.content == question.answer
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens >= 2
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_openai_client_streams(client: openai.OpenAI) -> None:
    for question in questions():
        stream = client.chat.completions.create(
            model=MODEL_NAME,
            messages=_messages(chat_body(question.text, question.image)),
            temperature=0,
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == question.answer
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
        assert chunks[-1].usage is not None


def test_openai_client_sends_several_images(client: openai.OpenAI, serving: Serving) -> None:
    """The order of the images matters to the prompt, and each adds its rows: 12 for 56x168 pixels, 6 for 56x84."""
    five, one = IMAGE_DIR / "five.png", IMAGE_DIR / "one.png"
    with Image.open(five) as wide, Image.open(one) as narrow:
        rows = [(image.width // 28) * (image.height // 28) for image in (wide, narrow)]
    lengths = {}
    for images in ((), (five,), (five, one), (one, five), (five, five, one)):
        answer = client.chat.completions.create(
            model=MODEL_NAME,
            messages=_messages(chat_body("What number is this?", *images)),
            temperature=0,
            max_tokens=16,
        )
        assert answer.usage is not None
        lengths[images] = answer.usage.prompt_tokens
        assert answer.choices[0].finish_reason in ("stop", "length")
    image_tokens = lengths[five,] - lengths[()] - rows[0]  # a start and an end token
    assert image_tokens == 2
    assert lengths[five, one] == lengths[one, five] == lengths[()] + sum(rows) + 4
    assert lengths[five, five, one] == lengths[()] + sum(rows) + rows[0] + 6


def test_errors_are_exceptions_of_the_openai_client(client: openai.OpenAI) -> None:
    messages = _messages(chat_body("What number is this?"))
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=messages)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as broken:
        client.chat.completions.create(model=MODEL_NAME, messages=_messages(chat_body("?", b"no picture")))
    assert broken.value.code == "invalid_image"
    assert broken.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as hot:
        client.chat.completions.create(model=MODEL_NAME, messages=messages, temperature=-1.0)
    assert "temperature" in hot.value.message
    with pytest.raises(openai.BadRequestError):  # an error before the first token of a stream is no stream
        list(client.chat.completions.create(model=MODEL_NAME, messages=_messages(chat_body("?", b"")), stream=True))


def test_the_curl_command_of_the_readme(serving: Serving) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    (command,) = (block for block in blocks if "curl" in block)
    assert "http://127.0.0.1:8000/" in command
    result = subprocess.run(
        ["bash", "-ec", command.replace("http://127.0.0.1:8000", serving.url)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"NO_PROXY": "127.0.0.1"},
    )
    assert result.returncode == 0, result.stderr
    streamed = Streamed()
    for line in filter(None, result.stdout.splitlines()):
        streamed.add(line.removeprefix("data: "))
    (answer,) = {q.answer for q in questions() if q.image.name == "five.png" and "What number" in q.text}
    assert (streamed.text, streamed.is_done) == (answer, True)


# -- many at once -----------------------------------------------------------------------------------------------------


@dataclass
class Mixed:
    """One request of the mix. leaves_after: texts after which the client closes the connection."""

    body: dict[str, Any]
    is_streamed: bool
    leaves_after: int | None = None
    expected: list[str] = field(default_factory=list)

    def alone(self, serving: Serving) -> None:
        """Note what the request is answered when nothing else runs."""
        if self.leaves_after is not None:
            self.expected = [self._leave(serving)]
        else:
            self.expected = answers(serving, self.body, not self.is_streamed)

    def run(self, serving: Serving) -> None:
        """Raises AssertionError unless the outcome is the one that the request has alone."""
        if self.leaves_after is None:
            assert answers(serving, self.body, self.is_streamed) == self.expected, self.body["messages"]
            return
        shorter, longer = sorted((self._leave(serving), self.expected[0]), key=len)  # an event may bring several tokens
        assert shorter and longer.startswith(shorter)

    def _leave(self, serving: Serving) -> str:
        """What had come when the client left."""
        streamed, count = Streamed(), 0
        with serving.events(self.body) as events:
            for data in events:
                before = streamed.text
                streamed.add(data)
                count += streamed.text != before
                if count == self.leaves_after:
                    break
        assert not streamed.finish_reasons and not streamed.is_done, "the answer had ended before the client left"
        return streamed.text


def answers(serving: Serving, body: dict[str, Any], is_streamed: bool) -> list[str]:
    """The texts of all choices."""
    if is_streamed:
        streamed = serving.stream(body)
        assert streamed.is_done and streamed.error is None, streamed
        assert set(streamed.finish_reasons) == set(range(body.get("n", 1)))
        return [streamed.texts[i] for i in sorted(streamed.finish_reasons)]
    return [choice["message"]["content"] for choice in serving.ask(body)["choices"]]


def _mixed() -> list[Mixed]:
    """64 requests: each kind with pictures of its own, every third streamed, one in eight cancelled."""
    sizes = itertools.cycle(SIZES)
    seeds = itertools.count()

    def picture() -> bytes:
        return png(random_image(*next(sizes), seed=next(seeds)))

    kinds: tuple[Callable[[int], dict[str, Any]], ...] = (
        lambda i: long_body(f"What number is this? {i}", 24, picture()),
        lambda i: long_body(f"How many digits are there? {i}", 40),
        lambda i: chat_body("What number is written here?", IMAGE_DIR / f"{('one', 'two', 'three', 'four')[i % 4]}.png"),
        lambda i: long_body("Which is larger?", 16, picture(), picture(), picture(), seed=i),
        lambda i: long_body(f"Count the digits. {i}", 20, picture(), n=2, seed=i, temperature=0.9),
        lambda i: long_body(f"Read the number. {i}", 32, seed=1000 + i, temperature=1.0, top_p=0.9),
        lambda i: long_body("What colour are the digits?" * (1 + i), 12, picture(), picture()),
    )
    mixed = [Mixed(body=kinds[i % 7](i), is_streamed=i % 3 == 0) for i in range(56)]
    for i in range(8):
        body = long_body("And this one?", 3000, *([picture()] if i % 2 else []), seed=i, temperature=1.0)
        mixed.insert(8 * i + 3, Mixed(body=body, is_streamed=True, leaves_after=4 + 4 * i))
    return mixed


def test_64_mixed_requests_at_once_answer_as_they_do_alone(serving: Serving) -> None:
    mixed = _mixed()
    assert len(mixed) == 64
    for request in mixed:
        request.alone(serving)
    texts = {text for request in mixed for text in request.expected}
    assert len(texts) > 40, "the answers must differ for a mix-up to show"
    started = threading.Barrier(len(mixed))

    def run(request: Mixed) -> None:
        started.wait(30)
        request.run(serving)

    before = serving.metrics()["language-0"]
    with ThreadPoolExecutor(len(mixed)) as pool:
        for future in [pool.submit(run, request) for request in mixed]:
            future.result()
    serving.await_empty_ledger()
    after = serving.metrics()["language-0"]
    num_done = after["worker_request_success_total"] - before["worker_request_success_total"]
    assert num_done == 56, "a cancelled request went on to its end"
    print("PREEMPT", after["num_preemptions_total"]-before["num_preemptions_total"], len(texts), num_done)
    ask_demo_question(serving)


# -- bad input --------------------------------------------------------------------------------------------------------


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
    assert response.json()["usage"]["hops"]["rows"] == 4  # enlarged to 56x56 pixels


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


def test_the_image_part_is_the_one_that_openai_documents() -> None:
    assert image_part(b"x") == {"type": "image_url", "image_url": {"url": "data:image/png;base64,eA=="}}
