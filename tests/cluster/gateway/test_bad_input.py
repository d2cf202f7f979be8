"""Bad input: every answer is a precise 4xx in OpenAI's shape, whatever is sent."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.gateway.schema import ChatRequest, CompletionRequest
from language_worker.tokenizer import Tokenizer
from tests.cluster.gateway.harness import assert_error, gateway, run

USER = [{"role": "user", "content": "hi"}]
PNG = "data:image/png;base64," + base64.b64encode(b"x" * 100).decode()


def user(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


CHAT_CASES: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"model": "other"}, 404, "model_not_found", "model"),
    ({"model": 5}, 400, "invalid_request", "model"),
    ({"messages": []}, 400, "invalid_request", "messages"),
    ({"messages": "hi"}, 400, "invalid_request", "messages"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "invalid_request", "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "invalid_request", "messages[0].content"),
    ({"messages": [{"role": "user"}]}, 400, "invalid_request", "messages[0]"),
    ({"messages": [{"role": "user", "content": None}]}, 400, "invalid_request", "messages[0]"),
    ({"messages": [{"role": "user", "content": "x", "nme": "y"}]}, 400, "unsupported_parameter", "messages[0].nme"),
    ({"messages": user({"type": "input_audio", "input_audio": {}})}, 400, "invalid_request", "messages[0].content[0]"),
    ({"messages": user({"type": "text"})}, 400, "invalid_request", "messages[0].content[0].text"),
    (
        {"messages": user({"type": "image_url", "image_url": PNG})},
        400,
        "invalid_request",
        "messages[0].content[0].image_url",
    ),
    ({"messages": user(image(5))}, 400, "invalid_request", "messages[0].content[0].image_url.url"),
    ({"messages": [{"role": "system", "content": [image(PNG)]}]}, 400, "invalid_request", "messages[0]"),
    ({"messages": user(image("http://169.254.169.254/x"))}, 400, "media_not_allowed", "image 0"),
    ({"messages": user(image(PNG), image("file:///etc/passwd"))}, 400, "media_not_allowed", "image 1"),
    ({"messages": user(image("data:image/png;base64,@@@"))}, 400, "invalid_image_url", "image 0"),
    ({"messages": user(*[image(PNG)] * 4)}, 400, "too_many_images", "messages"),
    ({"messages": user(image("data:image/png;base64," + "A" * 4000))}, 400, "image_too_large", "image 0"),
    ({"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "context_length_exceeded", "messages"),
    ({"max_tokens": 10**6}, 400, "context_length_exceeded", "messages"),
    ({"temperature": "1"}, 400, "invalid_request", "temperature"),
    ({"temperature": -1}, 400, "invalid_request", "temperature"),
    ({"temperature": 10**400}, 400, "invalid_request", "temperature"),
    ({"temperature": True}, 400, "invalid_request", "temperature"),
    ({"top_p": 0}, 400, "invalid_request", "top_p"),
    ({"n": 0}, 400, "invalid_request", "n"),
    ({"n": 1.5}, 400, "invalid_request", "n"),
    ({"n": 10**30}, 400, "invalid_request", "n"),
    ({"max_tokens": 0}, 400, "invalid_request", "max_tokens"),
    ({"max_completion_tokens": 0}, 400, "invalid_request", "max_completion_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, 400, "invalid_request", None),
    ({"seed": 2**70}, 400, "invalid_request", "seed"),
    ({"stop": 5}, 400, "invalid_request", "stop"),
    ({"stop": ["a", 5]}, 400, "invalid_request", "stop[1]"),
    ({"stop": [""]}, 400, "invalid_request", "stop"),
    ({"logit_bias": {"x": 1}}, 400, "invalid_request", "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, 400, "invalid_request", "logit_bias"),
    ({"logit_bias": {"1": 500}}, 400, "invalid_request", "logit_bias"),
    ({"top_k": 2**63}, 400, "invalid_request", "top_k"),
    ({"top_k": 10**30}, 400, "invalid_request", "top_k"),
    ({"min_tokens": 10**30}, 400, "invalid_request", "min_tokens"),
    ({"max_tokens": 10**30}, 400, "invalid_request", "max_tokens"),
    ({"stop_token_ids": [10**30]}, 400, "invalid_request", "stop_token_ids"),
    ({"stop_token_ids": [1, 100_000]}, 400, "invalid_request", "stop_token_ids"),
    ({"stop_token_ids": [-1]}, 400, "invalid_request", "stop_token_ids"),
    ({"allowed_token_ids": [100_000]}, 400, "invalid_request", "allowed_token_ids"),
    ({"allowed_token_ids": []}, 400, "invalid_request", "allowed_token_ids"),
    ({"allowed_token_ids": [5], "banned_token_ids": [5]}, 400, "invalid_request", "allowed_token_ids"),
    ({"banned_token_ids": 5}, 400, "invalid_request", "banned_token_ids"),
    ({"banned_token_ids": [-1]}, 400, "invalid_request", "banned_token_ids"),
    ({"priority": -1}, 400, "invalid_request", "priority"),
    ({"priority": 101}, 400, "invalid_request", "priority"),
    ({"priority": 1.5}, 400, "invalid_request", "priority"),
    ({"prompt_logprobs": 21}, 400, "invalid_request", "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, 400, "invalid_request", None),
    ({"top_logprobs": 3}, 400, "invalid_request", None),
    ({"logprobs": True, "top_logprobs": 99}, 400, "invalid_request", "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, 400, "invalid_request", None),
    ({"stream": "yes"}, 400, "invalid_request", "stream"),
    ({"tools": [{"type": "function"}]}, 400, "invalid_request", "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "unsupported_parameter", "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "invalid_request", "tools[0].function.name"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, 400, "unsupported_parameter", "tool_choice"),
    ({"tool_choice": "required"}, 400, "unsupported_parameter", "tool_choice"),
    ({"response_format": {"type": "json_schema"}}, 400, "unsupported_parameter", "response_format"),
    ({"audio": {"voice": "x"}}, 400, "unsupported_parameter", "audio"),
    ({"modalities": ["audio"]}, 400, "unsupported_parameter", "modalities"),
    ({"temprature": 1}, 400, "unsupported_parameter", "temprature"),
    ({"chat_template_kwargs": {"messages": []}}, 400, "invalid_request", "chat_template_kwargs"),
    ({"chat_template_kwargs": {"tools": []}}, 400, "invalid_request", "chat_template_kwargs"),
    ({"chat_template_kwargs": {"_x": 1}}, 400, "invalid_request", "chat_template_kwargs"),
]


@pytest.mark.parametrize(("fields", "status", "code", "param"), CHAT_CASES, ids=lambda v: str(v)[:40])
def test_a_wrong_chat_field_is_a_precise_error(
    tmp_path: Path, fields: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    async def main() -> None:
        async with gateway(tmp_path, max_images_per_request=3, max_image_bytes=1000) as server:
            error = assert_error(await server.chat(**fields), status, code)
            assert error["param"] == param
            assert server.handoff.submitted == []
            assert (await server.chat()).status_code == 200  # and the next request is answered

    run(main())


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": ""}, "invalid_request", "prompt"),
        ({"prompt": []}, "invalid_request", "prompt"),
        ({"prompt": [[]]}, "invalid_request", "prompt"),
        ({"prompt": ["a", 1]}, "invalid_request", "prompt"),
        ({"prompt": [1, True]}, "invalid_request", "prompt"),
        ({"prompt": 5}, "invalid_request", "prompt"),
        ({"prompt": None}, "invalid_request", "prompt"),
        ({"prompt": [-1]}, "invalid_request", "prompt"),
        ({"prompt": [10**40]}, "invalid_request", "prompt"),
        ({"prompt": ["a"] * 1000}, "invalid_request", "prompt"),
        ({"prompt": "<|image_pad|>"}, "invalid_request", "prompt"),
        ({"prompt": "word " * 5000}, "context_length_exceeded", "prompt"),
        ({"logprobs": 50}, "invalid_request", "logprobs"),
        ({"logprobs": 50, "echo": True}, "invalid_request", "logprobs"),
        ({"best_of": 2, "n": 3}, "invalid_request", "best_of"),
        ({"best_of": 200}, "invalid_request", "best_of"),
        ({"best_of": 2, "stream": True}, "invalid_request", None),
        ({"prompt_logprobs": 1, "echo": True, "logprobs": 1}, "invalid_request", None),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_a_wrong_completion_field_is_a_precise_error(
    tmp_path: Path, fields: dict[str, Any], code: str, param: str | None
) -> None:
    async def main() -> None:
        async with gateway(tmp_path) as server:
            error = assert_error(await server.complete(**fields), 400, code)
            assert error["param"] == param

    run(main())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_plainly_too_long_prompt_is_refused_before_it_is_tokenized(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: object, **__: object) -> list[int]:
        raise AssertionError("the prompt was tokenized")

    async def main() -> None:
        async with gateway(tmp_path) as server:
            with monkeypatch.context() as patch:
                patch.setattr(Tokenizer, "encode", encode)
                patch.setattr(Tokenizer, "encode_prompt", encode)
                text = "word " * 100_000
                fields = (
                    {"prompt": text}
                    if path == "/v1/completions"
                    else {"messages": user({"type": "text", "text": text})}
                )
                response = await server.client.post(path, json={"model": "tiny", **fields})
                error = assert_error(response, 400, "context_length_exceeded")
                assert "4096 tokens" in error["message"] and "at least" in error["message"]
            counted = await server.client.post("/tokenize", json={"model": "tiny", "prompt": "word " * 20_000})
            assert counted.json()["count"] > 4096  # counting is what that path is for

    run(main())


NESTED = b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
CHAT_PREFIX = b'{"model":"tiny","messages":[{"role":"user","content":"'


@pytest.mark.parametrize(
    ("body", "headers", "status", "code", "words"),
    [
        (b"", {}, 400, "invalid_request", "not valid JSON"),
        (b"{", {}, 400, "invalid_request", "line 1"),
        (b"[]", {}, 400, "invalid_request", "a list"),
        (b"null", {}, 400, "invalid_request", "null"),
        (b"\xff\xfe{", {}, 400, "invalid_request", "UTF-8"),
        (b'{"temperature": NaN}', {}, 400, "invalid_request", "NaN"),
        (b'{"temperature": -Infinity}', {}, 400, "invalid_request", "Infinity"),
        (b'{"temperature": 1e999}', {}, 400, "invalid_request", "too large"),
        (b'{"n": ' + b"9" * 10_000 + b"}", {}, 400, "invalid_request", "too long"),
        (NESTED, {}, 400, "invalid_request", "nested"),
        (b'{"metadata":' + b'{"a":' * 70 + b"1" + b"}" * 70 + b"}", {}, 400, "invalid_request", "nested"),
        (CHAT_PREFIX + b'\\ud800"}]}', {}, 400, "invalid_request", "surrogate"),
        (b"{}", {"content-type": "text/plain"}, 415, "unsupported_media_type", "application/json"),
        (b"{}", {"content-encoding": "gzip"}, 415, "unsupported_media_type", "uncompressed"),
        (b" " * 3000, {}, 413, "request_too_large", "at most 2000"),
        (b"{}", {}, 400, "invalid_request", "model"),
    ],
    ids=range(16),
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_a_wrong_body_is_a_precise_error(
    tmp_path: Path, path: str, body: bytes, headers: dict[str, str], status: int, code: str, words: str
) -> None:
    async def main() -> None:
        async with gateway(tmp_path, max_body_bytes=2000 if status == 413 else 10**7) as server:
            headers_sent = {"content-type": "application/json", **headers}
            response = await server.client.post(path, content=body, headers=headers_sent)
            error = assert_error(response, status, code)
            assert words in error["message"] or path in ("/tokenize", "/detokenize")

    run(main())


def test_a_body_without_a_length_is_cut_off_at_the_cap(tmp_path: Path) -> None:
    async def main() -> None:
        produced = 0

        async def parts() -> AsyncIterator[bytes]:
            nonlocal produced
            for _ in range(1000):
                produced += 1000
                yield b" " * 1000

        async with gateway(tmp_path, max_body_bytes=5000) as server:
            headers = {"content-type": "application/json"}
            response = await server.client.post("/v1/completions", content=parts(), headers=headers)
            assert_error(response, 413, "request_too_large")
            assert produced <= 7000

    run(main())


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/docs", "/openapi.json", "/v1/chat/completions/"])
def test_an_unknown_path_is_404(tmp_path: Path, path: str) -> None:
    async def main() -> None:
        async with gateway(tmp_path) as server:
            assert_error(await server.client.get(path), 404, "not_found")

    run(main())


def test_a_wrong_method_is_405(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(tmp_path) as server:
            error = assert_error(await server.client.get("/v1/chat/completions"), 405, "method_not_allowed")
            assert "POST" in error["message"]
            assert_error(await server.client.delete("/v1/models"), 405, "method_not_allowed")

    run(main())


NAMES = sorted(
    ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys() | {"tools", "user", "x", "suffix"}
)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PARTS = st.one_of(
    VALUES,
    st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=30) | VALUES}),
    st.fixed_dictionaries(
        {"type": st.just("image_url"), "image_url": VALUES | st.fixed_dictionaries({"url": st.text()})}
    ),
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "system", "assistant", "tool", "developer", "x"]),
            "content": st.text(max_size=30) | st.lists(PARTS, max_size=3) | VALUES,
        },
        optional={"name": VALUES, "tool_calls": VALUES, "tool_call_id": VALUES},
    )
    | VALUES,
    max_size=4,
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    fields=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5),
    messages=MESSAGES,
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"]),
)
def test_no_json_object_is_ever_a_server_error(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any], messages: list[Any], path: str
) -> None:
    async def main() -> None:
        async with gateway(tmp_path_factory.getbasetemp()) as server:
            body: dict[str, Any] = {"model": "tiny", **fields}
            if path == "/v1/chat/completions":
                body = {"messages": messages, **body}
            text = json.dumps(body).encode()
            response = await server.client.post(path, content=text, headers={"content-type": "application/json"})
            assert response.status_code in (200, 400, 404), response.text
            if response.status_code != 200:
                assert_error(response, response.status_code, response.json()["error"]["code"])

    run(main())


@settings(max_examples=100, derandomize=True, deadline=None)
@given(body=st.binary(max_size=60) | st.text(alphabet='{}[]":,0eE+-.tfn\\u ', max_size=60).map(str.encode))
def test_no_bytes_are_ever_a_server_error(tmp_path_factory: pytest.TempPathFactory, body: bytes) -> None:
    async def main() -> None:
        async with gateway(tmp_path_factory.getbasetemp()) as server:
            headers = {"content-type": "application/json"}
            response = await server.client.post("/v1/chat/completions", content=body, headers=headers)
            assert_error(response, 400, response.json()["error"]["code"])

    run(main())
