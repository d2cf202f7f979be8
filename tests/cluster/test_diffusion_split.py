"""LLaDA and LLaDA-V on a prefill and a decode worker: one worker's answers, over HTTP, streamed, and left midway."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import cluster.attempt
from cluster import LLM, DiffusionParams, SamplingParams
from tests.cluster.gateway.harness import events_of, serve
from tests.cluster.ledger import await_empty
from tests.cluster.test_diffusion_llm import SETTINGS, await_begun, chat
from tests.cluster.test_llada_v_llm import asked, expected, sampling
from tests.tiny_llada import MASK_ID, make_llada
from tests.tiny_llada_v import IMAGE_ID, Made, make_llada_v
from tests.tiny_models import random_image

SPLIT = {"prefill": 1, "decode": 1}
LEDGER = (
    "transfer_blocks_in_use", "transfer_streams_open", "transfer_tickets_open",
    "kv_pages_referenced", "kv_buffer_rows_reserved", "input_buffer_rows_reserved", "num_requests_running",
    "num_requests_waiting", "calls_incoming",
)  # fmt: skip
OF_SPLIT = (*LEDGER, "transfer_streams_sending", "kv_exports_open")
TRANSFER = {"block_size": 8, "default_allocate_tokens": 8, "pool_tokens": 64}
KINDS: list[dict[str, Any]] = [
    {"schedule": "static", "block_length": 4},
    {"schedule": "threshold", "threshold": 0.3, "kv_policy": "prefix"},
    {"schedule": "factor", "cfg_scale": 0.5, "kv_policy": "dual", "refresh_interval": 2},
    {"schedule": "entropy", "entropy_bound": 4.0, "canvas": "block", "block_length": 8},
    {"schedule": "hierarchical", "kv_policy": "none"},
]


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llada(tmp_path_factory.mktemp("llada"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_llada_v(tmp_path_factory.mktemp("llada-v"), seed=1)


@pytest.fixture(scope="module")
def together(folder: Path) -> Iterator[LLM]:
    with LLM(model=str(folder), **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def split(folder: Path) -> Iterator[LLM]:
    with LLM(model=str(folder), **SETTINGS, transfer=TRANSFER, workers=SPLIT) as llm:
        yield llm


def over_http(llm: LLM, folder: Path, main: Any) -> Any:
    """What `main(client)` returns, with the gateway in front of the workers, on whom nothing is left then."""
    result = serve(llm._workers.handoff, folder, main)
    await_empty(llm, OF_SPLIT if "prefill-0" in llm.stats() else LEDGER)
    return result


def test_many_requests_get_the_answers_of_one_worker(
    folder: Path, together: LLM, split: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster.attempt, "FIGURES_GRACE_S", 60.0)  # figures of every leg, however late
    bodies = [
        chat(diffusion=KINDS[i % 5], seed=i, temperature=[0, 0.9][i % 2], max_tokens=8 + i % 3 * 8, n=1 + i % 4 // 3)
        for i in range(32)
    ]

    async def main(client: httpx.AsyncClient) -> list[Any]:
        answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))
        return [answer.json() for answer in answers]

    whole, apart = (over_http(llm, folder, main) for llm in (together, split))
    for body, one, other in zip(bodies, whole, apart, strict=True):
        assert one["choices"] == other["choices"], body
        hops, usage = other["usage"]["hops"], other["usage"]
        assert (hops["prefill_worker"], hops["language_worker"]) == ("prefill-0", "decode-0")
        assert hops["forwards"] == one["usage"]["hops"]["forwards"]
        num_copies = 2 if "cfg_scale" in body["diffusion"] else 1
        if body["diffusion"].get("kv_policy") == "none":
            assert hops["kv_bytes"] == 0 and "prefill_forwards" not in hops
            spared = 0
        else:
            assert hops["kv_bytes"] > 0 and hops["prefill_forwards"] == 1
            spared = usage["prompt_tokens"] * num_copies * body.get("n", 1)
        assert hops["forwarded_tokens"] == one["usage"]["hops"]["forwarded_tokens"] - spared
    assert split.stats()["decode-0"]["kv_tokens_imported_total"] > 0


def test_streamed_blocks_are_the_whole_answer(folder: Path, split: LLM) -> None:
    params = SamplingParams(
        max_tokens=24, temperature=0.0, ignore_eos=True, diffusion=DiffusionParams(block_length=8, show_steps=True)
    )
    chunks = list(split.stream("12+34", params))
    (whole,) = split.generate("12+34", params)
    assert [t for chunk in chunks for t in chunk.token_ids] == whole.outputs[0].token_ids
    assert [len(chunk.token_ids) for chunk in chunks if chunk.preview is None] == [8, 8, 8]
    assert MASK_ID not in whole.outputs[0].token_ids

    async def main(client: httpx.AsyncClient) -> tuple[str, str]:
        fields = chat(diffusion={"schedule": "static", "block_length": 4})
        told = (await client.post("/v1/chat/completions", json=fields)).json()["choices"][0]["message"]["content"]
        events = events_of((await client.post("/v1/chat/completions", json={**fields, "stream": True})).text)
        assert events[-1] == "[DONE]"
        return told, "".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1] if e["choices"])

    told, streamed = over_http(split, folder, main)
    assert told == streamed != ""


def test_clients_that_leave_midway_leave_nothing(folder: Path, split: LLM) -> None:
    """One is filling in masks, others are on their way between the workers or wait."""

    async def main(client: httpx.AsyncClient) -> None:
        fields = [
            chat(diffusion={"schedule": "static", "block_length": 2, **kind}, stream=True, max_tokens=400)
            for kind in ({}, {"kv_policy": "prefix"}, {"kv_policy": "none"}, {"cfg_scale": 1.0, "canvas": "block"})
        ]
        for _ in range(3):
            tasks = [asyncio.create_task(client.post("/v1/chat/completions", json=one)) for one in fields]
            await asyncio.to_thread(await_begun, split, "decode-0")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(await_empty, split, OF_SPLIT)

    over_http(split, folder, main)


@pytest.mark.parametrize(
    "diffusion",
    [
        {"schedule": "static", "block_length": 4, "kv_policy": "none"},
        {"threshold": 0.2, "block_length": 12, "kv_policy": "prefix", "refresh_interval": 2},
        {"schedule": "static", "block_length": 4, "kv_policy": "dual", "vicinity": 30},
        {"schedule": "static", "block_length": 3, "canvas": "block", "cfg_scale": 1.5, "kv_policy": "dual"},
    ],
)
def test_images_equal_the_reference(made: Made, diffusion: dict[str, Any]) -> None:
    """Every block's first step computes the prompt anew, and its images' rows with it."""
    pictures = [random_image(*size, seed=7) for size in ((57, 90), (30, 30))]
    prompts: list[Any] = [
        ([5, 6, IMAGE_ID, 7, 8], pictures[:1]),
        ([IMAGE_ID, IMAGE_ID, 40, 34], pictures),
        ([9, 10, IMAGE_ID], pictures[1:]),
        ([9, 10, 11, 34], []),
    ]
    params = sampling(**diffusion)
    assert params.diffusion is not None
    with LLM(model=str(made.folder), **{**SETTINGS, "transfer": TRANSFER}, workers=SPLIT) as llm:
        answers = llm.generate([asked(*prompt) for prompt in prompts], params)
        for (ids, images), answer in zip(prompts, answers, strict=True):
            assert answer.outputs[0].token_ids == expected(made, ids, images, params.diffusion)
        oracle, ids = made.oracle(*prompts[1])
        logits = llm.logits(asked(*prompts[1]))
        await_empty(llm, OF_SPLIT)
    torch.testing.assert_close(logits.double(), oracle(torch.tensor(ids)), atol=1e-4, rtol=1e-4)
