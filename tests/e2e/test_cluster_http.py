"""The HTTP API of a running cluster: the `openai` client, curl, and 64 mixed requests at once."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from cluster.demo import IMAGE_DIR, MODEL_NAME, questions
from tests.e2e.serving import TIMEOUT_S, Serving, Streamed, ask_demo_question, chat_body, long_body, png
from tests.tiny_models import random_image

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
SIZES = (
    (1, 1), (2, 3), (28, 28), (29, 55), (56, 168), (57, 90), (13, 200), (199, 31), (120, 41), (300, 33), (640, 480),
    (97, 1000), (333, 333), (1023, 767),
)  # fmt: skip


# -- the openai client and curl ---------------------------------------------------------------------------------------


@pytest.fixture
def client(serving: Serving) -> Any:
    with openai.OpenAI(base_url=serving.url + "/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
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
        timeout=TIMEOUT_S,
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
        lambda i: chat_body(
            "What number is written here?", IMAGE_DIR / f"{('one', 'two', 'three', 'four')[i % 4]}.png"
        ),
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
        started.wait(TIMEOUT_S)
        request.run(serving)

    before = serving.settled()["language-0"]
    with ThreadPoolExecutor(len(mixed)) as pool:
        for future in [pool.submit(run, request) for request in mixed]:
            future.result()
    serving.await_empty_ledger()
    after = serving.settled()["language-0"]
    num_done = after["worker_request_success_total"] - before["worker_request_success_total"]
    assert num_done == 56, "a cancelled request went on to its end"
    ask_demo_question(serving)
