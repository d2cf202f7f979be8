"""nanochat behind the OpenAI endpoints: conversations, tools in the middle of an answer, streamed or not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import httpx
import pytest
import torch

from cluster.config import GatewayConfig, build_config
from cluster.gateway.app import create_app
from cluster.gateway.context import GatewayContext
from cluster.local import LocalWorkers
from tests.cluster.gateway.harness import assert_error, client_of, events_of, run
from tests.tiny_nanochat import NANO_IDS, make_scripted_nanochat, nano_ranks

ANSWER_START, PYTHON, PYTHON_END, OUTPUT_END, END = (
    NANO_IDS[f"<|{name}|>"] for name in ("assistant_start", "python_start", "python_end", "output_end", "assistant_end")
)


def _path(*tokens: int | str) -> Iterator[int]:
    for token in tokens:
        yield from [token] if isinstance(token, int) else (nano_ranks()[char.encode()] for char in token)


def _script() -> dict[int, list[int]]:
    """The answer `is <an expression>: yes`, whatever is asked."""
    before = list(_path(ANSWER_START, "is", PYTHON, "12+3/4", PYTHON_END))
    after = list(_path(OUTPUT_END, ": ye", END))
    return {token: [follower] for path in (before, after) for token, follower in itertools.pairwise(path)}


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayContext]:
    before = torch.get_num_threads()
    folder = make_scripted_nanochat(tmp_path_factory.mktemp("nano"), _script())
    tree: dict[str, Any] = {
        "model": {"path": str(folder), "device": "cpu"}, "language": {"num_threads": 1, "kv_cache_tokens": 4096}
    }  # fmt: skip

    async def no_stats() -> Mapping[str, Mapping[str, Any] | None]:
        return {}

    with closing(LocalWorkers(build_config(tree).resolve())) as workers:
        yield GatewayContext(
            config=GatewayConfig(),
            model_name="nano",
            tokenizer=workers.info.tokenizer,
            chat_template=workers.info.chat_template,
            handoff=workers.handoff,
            max_model_len=workers.engines["language-0"].max_model_len,
            worker_stats=no_stats,
            ready=lambda: (True, ""),
        )
    torch.set_num_threads(before)


async def _post(context: GatewayContext, path: str, **body: Any) -> httpx.Response:
    async with client_of(create_app(context)) as client:
        return await client.post(path, json={"model": "nano", "temperature": 0, **body})


CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it?"}]


def test_an_answer_goes_on_with_the_tools_result_and_does_not_show_it(context: GatewayContext) -> None:
    response = run(_post(context, CHAT, messages=MESSAGES))
    body = response.json()
    assert body["choices"][0]["message"]["content"] == "is: ye"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 2 + 8 + 2 + len("12.75") + 4 + 1


def test_the_stream_says_the_same(context: GatewayContext) -> None:
    response = run(_post(context, CHAT, messages=MESSAGES, stream=True))
    events = events_of(response.text)
    deltas = [event["choices"][0]["delta"].get("content") or "" for event in events[:-1]]
    assert events[-1] == "[DONE]" and "".join(deltas) == "is: ye"


def test_raw_completions_may_spell_special_tokens(context: GatewayContext) -> None:
    response = run(_post(context, "/v1/completions", prompt="hi<|assistant_start|>", max_tokens=30))
    assert response.json()["choices"][0]["text"] == "is: ye"


def test_turns_of_one_role_are_refused(context: GatewayContext) -> None:
    response = run(_post(context, CHAT, messages=[MESSAGES[1], MESSAGES[1]]))
    assert "alternate" in assert_error(response, 400, response.json()["error"]["code"])["message"]
