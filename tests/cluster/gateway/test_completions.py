"""Text completions: the four kinds of prompt, echo, logprobs, streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.gateway.completion_route import prepare_completion
from cluster.gateway.generation import Event
from tests.cluster.gateway.harness import REPLY, chunk, events_of, gateway, logprob, replying, run, stats_for
from tests.tiny_tokenizer import TOKEN_IDS


@pytest.mark.parametrize("prompt", ["hello there", ["hello", "there"], [1, 2, 3], [[1, 2], [3], [4, 5, 6]]])
@pytest.mark.parametrize("n", [1, 2])
def test_every_kind_of_prompt(tmp_path: Path, prompt: Any, n: int) -> None:
    async def main() -> None:
        async with gateway(tmp_path) as server:
            is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
            prompts = [prompt] if is_one else prompt
            body = (await server.complete(prompt=prompt, n=n)).json()
            assert body["object"] == "text_completion"
            assert [c["index"] for c in body["choices"]] == list(range(len(prompts) * n))
            assert {c["text"] for c in body["choices"]} == {"".join(REPLY)}
            assert {c["finish_reason"] for c in body["choices"]} == {"stop"}
            tokenizer = server.app.state.gateway.context.tokenizer
            expected = [tuple(tokenizer.encode(p, True) if isinstance(p, str) else p) for p in prompts]
            assert [r.request.prompt_token_ids for r in server.handoff.submitted] == expected
            assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
            assert body["usage"]["completion_tokens"] == len(REPLY) * n * len(prompts)
            assert {r.request.sampling.max_tokens for r in server.handoff.submitted} == {16}

            response = await server.complete(prompt=prompt, n=n, stream=True, stream_options={"include_usage": True})
            *chunks, usage, done = events_of(response.text)
            assert done == "[DONE]"
            assert usage["usage"] == body["usage"]
            for choice in body["choices"]:
                own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
                assert "".join(c["text"] for c in own) == choice["text"]
                assert [c["finish_reason"] for c in own] == [None] * (len(own) - 1) + ["stop"]

    run(main())


def test_best_of_reaches_the_workers_and_n_choices_come_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(tmp_path) as server:
            body = (await server.complete(n=2, best_of=5)).json()
            assert [c["index"] for c in body["choices"]] == [0, 1]
            sampling = server.handoff.submitted[0].request.sampling
            assert (sampling.n, sampling.best_of) == (2, 5)
            assert (await server.complete(n=2, best_of=2, stream=True)).status_code == 200

    run(main())


@pytest.mark.parametrize("path", ["chat", "complete"])
def test_usage_in_every_chunk_if_asked_for(tmp_path: Path, path: str) -> None:
    async def main() -> None:
        async with gateway(tmp_path) as server:
            options = {"include_usage": True, "continuous_usage_stats": True}
            call = server.chat if path == "chat" else server.complete
            *chunks, last, _ = events_of((await call(stream=True, stream_options=options)).text)
            counts = [c["usage"]["completion_tokens"] for c in chunks]
            assert sorted(set(counts)) == list(range(1, len(REPLY) + 1))
            assert counts == sorted(counts)
            del last["usage"]["hops"]  # known at the end only
            assert chunks[-1]["usage"] == last["usage"]

    run(main())


def test_special_tokens_of_a_raw_prompt_are_recognised(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(tmp_path) as server:
            await server.complete(prompt="<|im_start|>user")
            assert server.handoff.submitted[0].request.prompt_token_ids[0] == TOKEN_IDS["<|im_start|>"]

    run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hello", [104, 105]])
def test_echo_puts_the_prompt_first(tmp_path: Path, prompt: Any, stream: bool) -> None:
    async def main() -> None:
        async with gateway(tmp_path, replying("a", "b")) as server:
            tokenizer = server.app.state.gateway.context.tokenizer
            shown = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
            response = await server.complete(prompt=prompt, echo=True, n=2, stream=stream)
            if stream:
                *chunks, _ = events_of(response.text)
                choices = [c["choices"][0] for c in chunks]
                texts = ["".join(c["text"] for c in choices if c["index"] == i) for i in range(2)]
            else:
                texts = [c["text"] for c in response.json()["choices"]]
            assert texts == [shown + "ab"] * 2

    run(main())


@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_cover_what_is_shown(tmp_path: Path, echo: bool) -> None:
    async def main() -> None:
        async with gateway(tmp_path, replying("a", "b")) as server:
            whole = (await server.complete(prompt="hello", echo=echo, n=2, logprobs=2)).json()["choices"]
            response = await server.complete(prompt="hello", echo=echo, n=2, logprobs=2, stream=True)
            *chunks, _ = events_of(response.text)
            request = server.handoff.submitted[0].request
            assert (request.sampling.logprobs, request.sampling.prompt_logprobs) == (2, 2 if echo else None)
            num_prompt = len(request.prompt_token_ids) if echo else 0
            for choice in whole:
                own = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["index"] == choice["index"]]
                streamed = {key: [v for lp in own if lp for v in lp[key]] for key in choice["logprobs"]}
                assert streamed == choice["logprobs"]
                assert len(choice["logprobs"]["tokens"]) == num_prompt + 2
                assert choice["logprobs"]["token_logprobs"][0] == (None if echo else -0.5)
                assert choice["logprobs"]["token_logprobs"][-1] == -0.5
                lengths = [len(token) for token in choice["logprobs"]["tokens"]]
                assert choice["logprobs"]["text_offset"] == [sum(lengths[:i]) for i in range(len(lengths))]

    run(main())


def test_an_early_sample_is_held_across_wake_ups(tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway(tmp_path) as server:
            fields = {"model": "tiny", "prompt": [70, 71], "echo": True, "logprobs": 1, "n": 2, "stream": True}
            job = prepare_completion(server.app.state.gateway, fields)
            (request,) = job.requests
            early = chunk(request, 1, "a", logprobs=(logprob(65),))
            first = chunk(request, 0, "b", logprobs=(logprob(66),), prompt_logprobs=(None, logprob(71)))
            assert job.answer.write([Event(0, early, 0.0)]) == ""
            shown = [event["choices"][0] for event in events_of(job.answer.write([Event(0, first, 0.0)]))]
            assert [(c["index"], c["text"][-1], len(c["logprobs"]["tokens"])) for c in shown] == [
                (1, "a", 3),
                (0, "b", 3),
            ]

    run(main())


@pytest.mark.parametrize("comes", [True, False])
def test_a_sample_that_is_early_waits_for_the_prompts_logprobs(tmp_path: Path, comes: bool) -> None:
    """They come with sample 0, and the echo of every sample shows them; nothing is lost if they never come."""

    def script(running: Any, sink: Any) -> None:
        request = running.request
        given = (None, *map(logprob, request.prompt_token_ids[1:]))
        for index in (1, 0):
            extra = {"prompt_logprobs": given} if comes and index == 0 else {}
            own = chunk(request, index, "a", logprobs=(logprob(65),), finish_reason="stop", **extra)
            sink.on_chunk(own)
        sink.on_end(stats_for(request, 2))

    async def main() -> None:
        async with gateway(tmp_path, script) as server:
            for stream in (True, False):
                response = await server.complete(prompt=[70, 71], echo=True, logprobs=1, n=2, stream=stream)
                if stream:
                    choices = [event["choices"][0] for event in events_of(response.text)[:-1]]
                else:
                    choices = response.json()["choices"]
                assert sorted(c["index"] for c in choices) == [0, 1]
                for choice in choices:
                    assert choice["text"].endswith("a")
                    assert choice["logprobs"]["token_logprobs"] == [None, -0.5 if comes else None, -0.5]

    run(main())
