"""LLaDA-V with its parts in processes of their own gives what it gives in one, and what the restated loop gives: its
halves, and its tower, prompts and masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import LLM, DiffusionParams, SamplingParams
from cluster.model_info import ModelInfo
from cluster.prompts import image_bytes, request_from_prompt
from tests.e2e.front import open_workers
from tests.e2e.worker_process import WorkerProcess
from tests.oracles_llada import by_count, generate
from tests.tiny_llada_v import IMAGE_ID, make_llada_v
from tests.tiny_models import random_image

LENGTH, BLOCK = 12, 4
ENGINE = {"dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_tokens": 4096, "max_model_len": 512}
EMBED = {"dtype": "float32", "device": "cpu", "num_threads": 1, "cache_tokens": 0}
POLICIES = ("none", "prefix", "dual")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("kinds", "transport", "block_size", "default_tokens"),
    [
        (("language",), "ipc", 16, 8192),
        (("prefill", "decode"), "curve", 5, 1),
    ],
    ids=["halves", "thirds"],
)
def test_apart_is_as_together(
    tmp_path: Path, kinds: tuple[str, ...], transport: str, block_size: int, default_tokens: int
) -> None:
    made = make_llada_v(tmp_path, seed=4)
    pictures = [random_image(*size, seed=9) for size in ((57, 90), (100, 20), (30, 30))]
    prompts: list[dict[str, Any]] = []
    wanted: list[list[int]] = []
    params = [DiffusionParams(schedule="static", block_length=BLOCK, kv_policy=policy) for policy in POLICIES]
    for ids, images, diffusion in (
        ([5, IMAGE_ID, 7], pictures[:1], params[0]),
        ([IMAGE_ID, IMAGE_ID, 40, 34, IMAGE_ID], pictures, params[1]),
        ([9, 10, IMAGE_ID], pictures[1:2], params[2]),
    ):
        prompts.append({"prompt_token_ids": ids, "images": [image_bytes(image) for image in images]})
        oracle, prompt = made.oracle(ids, images)
        settings: dict[str, Any] = {"block_length": BLOCK, "kv_policy": diffusion.kv_policy}
        never = made.never_ids()
        wanted.append(generate(oracle, prompt, LENGTH, choose=lambda n: by_count(n, n), never=never, **settings).tokens)
    asked = [SamplingParams(max_tokens=LENGTH, temperature=0.0, ignore_eos=True, diffusion=d) for d in params]
    transfer = {"block_size": block_size, "default_allocate_tokens": default_tokens}
    with LLM(model=str(made.folder), language=ENGINE, embedding=EMBED, **transfer) as llm:
        together = [answer.outputs[0].token_ids for answer in llm.generate(prompts, asked)]
    with ExitStack() as stack:
        processes = {kind: WorkerProcess(kind) for kind in ("embedding", *kinds)}
        for process in processes.values():
            stack.callback(process.close)
        folder = str(made.folder)
        engines = dict.fromkeys(kinds, ENGINE)
        front = open_workers(stack, folder, transfer, transport, processes, embedding=EMBED, **engines)
        info = ModelInfo.load(made.folder)
        requests = [request_from_prompt(info, p, s) for p, s in zip(prompts, asked, strict=True)]
        sinks = [front.submit(request)[0] for request in requests]  # all at once
        apart = []
        for sink in sinks:
            assert sink.finish().num_generated_tokens == LENGTH
            assert [len(chunk.token_ids) for chunk in sink.chunks] == [BLOCK] * (LENGTH // BLOCK)
            apart.append(sink.tokens())
    assert apart == together == wanted
