"""Tool calls and reasoning in chat completions: into the template, and out of the answer, streamed or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.cluster.gateway.harness import Gateway, assert_error, events_of, gateway, replying, run
from tests.tiny_tokenizer import save_tokenizer

# The shape of Qwen3's and MiniMind's own: tools in the system turn, reasoning kept, opened or shut by a variable.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>{{ message.content }}</tool_response><|im_end|>
{% else %}<|im_start|>{{ message.role }}
{% if message.reasoning_content is string %}<think>{{ message.reasoning_content }}</think>{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{"name": "{{ call.function.name }}", "arguments": \
{{ call.function.arguments | tojson }}}</tool_call>{% endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if open_thinking %}<think>
{% else %}<think>

</think>

{% endif %}{% endif %}"""
TOOL = {"type": "function", "function": {"name": "add", "description": "sum", "parameters": {"type": "object"}}}
SAID = ("<thi", "nk>\nI should", " add.\n</think>\n\n", "Let me see.", "\n<tool", '_call>\n{"name": "add", ')
SAID += ('"arguments": {"a": 1}}', "\n</tool_call>", '\n<tool_call>{"name": "add"}</tool_call>', "")


def _folder(folder: Path) -> Path:
    save_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return folder


def _prompt(server: Gateway) -> str:
    request = server.handoff.submitted[-1].request
    tokenizer = server.app.state.gateway.context.tokenizer
    return str(tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False))


def _joined(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """One choice's message as a client puts it together from a stream."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": []}
    for chunk in chunks:
        choice = chunk["choices"][0]
        if choice["index"] != index:
            continue
        for name in ("content", "reasoning_content"):
            message[name] += choice["delta"].get(name) or ""
        for call in choice["delta"].get("tool_calls", ()):
            assert call["index"] == len(message["calls"]) and call["id"].startswith("call_")
            message["calls"].append((call["function"]["name"], json.loads(call["function"]["arguments"])))
        message["finish_reason"] = choice["finish_reason"]
    return message


def test_reasoning_and_calls_are_told_apart(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(_folder(tmp_path), replying(*SAID)) as server:
            (choice,) = (await server.chat(tools=[TOOL])).json()["choices"]
            message = choice["message"]
            assert (message["reasoning_content"], message["content"]) == ("I should add.", "Let me see.")
            calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message["tool_calls"]]
            assert calls == [("add", {"a": 1}), ("add", {})]
            assert {c["type"] for c in message["tool_calls"]} == {"function"}
            assert len({c["id"] for c in message["tool_calls"]}) == 2
            assert choice["finish_reason"] == "tool_calls"
            assert json.dumps(TOOL["function"]["name"]) in _prompt(server)  # type: ignore[index]
            for n in (1, 2):
                response = await server.chat(tools=[TOOL], stream=True, n=n, logprobs=True)
                *chunks, _ = events_of(response.text)
                for i in range(n):
                    assert _joined(chunks, i) == {
                        "reasoning_content": "I should add.", "content": "Let me see.", "calls": calls,
                        "finish_reason": "tool_calls",
                    }  # fmt: skip
                    own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
                    assert sum(len(c["logprobs"]["content"]) for c in own if c["logprobs"]) == len(SAID)

    run(main())


@pytest.mark.parametrize("choice", ["none", None])
def test_without_tools_a_call_is_text(tmp_path: Path, choice: str | None) -> None:
    async def main() -> None:
        async with gateway(_folder(tmp_path), replying('<tool_call>{"name": "add"}</tool_call>')) as server:
            fields = {"tools": [TOOL], "tool_choice": choice} if choice else {}
            (answer,) = (await server.chat(**fields)).json()["choices"]
            assert answer["message"]["content"] == '<tool_call>{"name": "add"}</tool_call>'
            assert answer["finish_reason"] == "stop" and "tool_calls" not in answer["message"]
            assert "<tools>" not in _prompt(server)

    run(main())


def test_a_call_without_an_answer_has_null_content(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(_folder(tmp_path), replying('<tool_call>{"name": "add"}', "</tool_call>")) as server:
            (answer,) = (await server.chat(tools=[TOOL], tool_choice="auto")).json()["choices"]
            assert answer["message"]["content"] is None and len(answer["message"]["tool_calls"]) == 1

    run(main())


@pytest.mark.parametrize(
    "said",
    [
        '{"name": "add", "arguments": {"a": NaN}}',
        '{"name": "add", "arguments": {"a": -1e999}}',
        '{"name": "add", "arguments": {"a": "\\ud800"}}',
        '{"name": "\\udfff"}',
        '{"name": "add", "arguments": "\\ud800"}',
    ],
    ids=["nan", "infinity", "surrogate", "surrogate-name", "surrogate-text"],
)
def test_a_call_that_no_client_could_read_is_text(tmp_path: Path, said: str) -> None:
    """Numbers that JSON has not, and half characters, which do not travel as UTF-8."""

    async def main() -> None:
        async with gateway(_folder(tmp_path), replying("<tool_call>", said, "</tool_call>")) as server:
            response = await server.chat(tools=[TOOL])
            assert response.status_code == 200
            (answer,) = response.json()["choices"]
            assert answer["message"]["content"] == f"<tool_call>{said}</tool_call>"
            assert answer["finish_reason"] == "stop" and "tool_calls" not in answer["message"]
            *chunks, _ = events_of((await server.chat(tools=[TOOL], stream=True)).text)
            assert _joined(chunks)["content"] == answer["message"]["content"]

    run(main())


def test_reasoning_that_the_prompt_opened(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(_folder(tmp_path), replying("Hm.", "\n</think>", "\n\nFour.")) as server:
            fields = {"chat_template_kwargs": {"open_thinking": True}}
            (answer,) = (await server.chat(**fields)).json()["choices"]
            assert _prompt(server).endswith("<think>\n")
            assert (answer["message"]["reasoning_content"], answer["message"]["content"]) == ("Hm.", "Four.")
            *chunks, _ = events_of((await server.chat(stream=True, **fields)).text)
            joined = _joined(chunks)
            assert (joined["reasoning_content"], joined["content"]) == ("Hm.", "Four.")

    run(main())


def test_a_conversation_with_calls_and_their_results_goes_into_the_template(tmp_path: Path) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "Add. <|im_end|>"},
        {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "<|im_start|>1"},
    ]

    async def main() -> None:
        async with gateway(_folder(tmp_path), replying("One.")) as server:
            assert (await server.chat(messages=messages, tools=[TOOL])).status_code == 200
            prompt = _prompt(server)
            assert '<think>Hm.</think><tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>' in prompt
            assert "<tool_response><|im_start|>1</tool_response>" in prompt
            ids = server.handoff.submitted[-1].request.prompt_token_ids
            special = server.app.state.gateway.context.tokenizer.special_tokens
            assert ids.count(special["<|im_start|>"]) == 5 and ids.count(special["<|im_end|>"]) == 4

    run(main())


@pytest.mark.parametrize(
    "arguments", ['{"":' * 500 + "1" + "}" * 500, '{"a": "\\ud800"}', '{"a": NaN}', "[1]"],
    ids=["deep", "surrogate", "nan", "list"],
)  # fmt: skip
def test_arguments_that_are_no_plain_map_go_into_the_template_as_text(tmp_path: Path, arguments: str) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]

    async def main() -> None:
        async with gateway(_folder(tmp_path), replying("One.")) as server:
            assert (await server.chat(messages=messages, tools=[TOOL])).status_code == 200
            assert f'"arguments": {json.dumps(arguments)}}}</tool_call>' in _prompt(server)

    run(main())


def test_a_template_without_tools_refuses_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(tmp_path) as server:
            error = assert_error(await server.chat(tools=[TOOL]), 400, "unsupported_parameter")
            assert error["param"] == "tools" and "template" in error["message"]

    run(main())


def test_the_openai_client_reads_calls_from_a_stream(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(_folder(tmp_path), replying(*SAID)) as server:
            client = AsyncOpenAI(base_url="http://gateway/v1", api_key="none", http_client=server.client)
            tools: Any = [TOOL]
            whole = await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "hi"}], tools=tools
            )
            calls: Any = whole.choices[0].message.tool_calls
            assert [c.function.name for c in calls] == ["add", "add"]
            names = []
            async with client.chat.completions.stream(
                model="tiny", messages=[{"role": "user", "content": "hi"}], tools=tools
            ) as stream:
                async for event in stream:
                    if event.type == "tool_calls.function.arguments.done":
                        names.append((event.name, event.arguments))
            assert [(name, json.loads(text)) for name, text in names] == [("add", {"a": 1}), ("add", {})]

    run(main())
