"""A LLaDA checkpoint in `LLM` and behind the gateway: parameters, streaming, counters, cancellation, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from cluster import LLM, DiffusionParams, SamplingParams
from cluster.cli.generate import diffusion_from
from cluster.config import build_config
from cluster.errors import BadRequest, ConfigError
from examples.sums import save_tokenizer
from language_worker.config import EngineConfig
from language_worker.engine_builder import build_engine, check_model
from language_worker.errors import InvalidRequest, ModelNotSupported
from tests.cluster.gateway.harness import MODEL, events_of, serve
from tests.cluster.ledger import await_empty
from tests.tiny_llada import CONFIG, MASK_ID, TOKENIZER, make_llada
from tests.tiny_text_models import make_text_model
from tests.waiting import eventually

SETTINGS = {"dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_tokens": 8192}
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
HELD = ("kv_pages_referenced",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llada(tmp_path_factory.mktemp("llada"))


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    before = torch.get_num_threads()
    with LLM(model=str(folder), **SETTINGS) as llm:
        yield llm
    torch.set_num_threads(before)


def test_a_script_gets_tokens_and_counters(llm: LLM) -> None:
    params = DiffusionParams(schedule="static", block_length=8, kv_policy="dual")
    sampling = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, diffusion=params)
    (answer,) = llm.generate("12+34", sampling)
    assert len(answer.outputs[0].token_ids) == 24 and MASK_ID not in answer.outputs[0].token_ids
    length = answer.num_prompt_tokens + 24
    assert answer.hops["forwards"] == 24 and answer.hops["tokens_per_forward"] == 1.0
    assert answer.hops["forwarded_tokens"] == 3 * (length + 7 * 8)


def test_streamed_blocks_are_the_whole_answer(llm: LLM) -> None:
    params = SamplingParams(
        max_tokens=24, temperature=0.0, ignore_eos=True, diffusion=DiffusionParams(block_length=8, show_steps=True)
    )
    chunks = list(llm.stream("12+34", params))
    (whole,) = llm.generate("12+34", params)
    assert [t for chunk in chunks for t in chunk.token_ids] == whole.outputs[0].token_ids
    assert [len(chunk.token_ids) for chunk in chunks if chunk.preview is None] == [8, 8, 8]
    assert all(len(chunk.preview) == 8 for chunk in chunks if chunk.preview is not None)


def test_leaving_a_stream_gives_everything_back(llm: LLM) -> None:
    params = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True, diffusion=DiffusionParams(block_length=4))
    for chunk in llm.stream("12+34", params):
        assert chunk.token_ids
        break
    await_empty(llm, HELD)


def test_images_are_refused(llm: LLM) -> None:
    with pytest.raises(BadRequest, match="image"):
        llm.generate({"prompt": "12+34", "images": [b"x"]}, GREEDY)


def test_other_models_refuse_diffusion(tmp_path: Path) -> None:
    sampling = SamplingParams(max_tokens=4, diffusion=DiffusionParams())
    with (
        LLM(model=str(make_text_model(tmp_path, "llama")), **SETTINGS) as llm,
        pytest.raises(Exception, match="one by one"),
    ):
        llm.generate("hi", sampling)


def test_command_line_settings_become_parameters() -> None:
    settings = ["schedule=static", "steps=16", "suppress_eos=true"]
    assert diffusion_from(settings) == DiffusionParams(schedule="static", steps=16, suppress_eos=True)
    assert diffusion_from([]) is None
    with pytest.raises(InvalidRequest, match="NAME=VALUE"):
        diffusion_from(["schedule"])


def over_http(llm: LLM, folder: Path, main: Any) -> None:
    """Run `main(client)` against the gateway in front of the real worker."""
    serve(llm._workers.handoff, folder, main)
    await_empty(llm, HELD)


def await_begun(llm: LLM, worker: str) -> None:
    """A request has pages on the worker."""
    eventually(lambda: llm.stats()[worker]["kv_pages_referenced"], f"no request began on {worker}")


def chat(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "12+34"}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "ignore_eos": True, "max_tokens": 16, **fields}


def test_chat_streams_blocks_and_counts_forwards(llm: LLM, folder: Path) -> None:
    async def main(client: httpx.AsyncClient) -> None:
        diffusion = {"schedule": "static", "block_length": 8, "steps": 8}
        whole = (await client.post("/v1/chat/completions", json=chat(diffusion=diffusion))).json()
        assert whole["usage"]["completion_tokens"] == 16 and whole["usage"]["hops"]["forwards"] == 8
        assert whole["usage"]["hops"]["tokens_per_forward"] == 2.0
        fields = chat(diffusion=diffusion, stream=True, stream_options={"include_usage": True})
        events = events_of((await client.post("/v1/chat/completions", json=fields)).text)
        deltas = [e["choices"][0]["delta"].get("content", "") for e in events[:-1] if e["choices"]]
        assert "".join(deltas) == whole["choices"][0]["message"]["content"]
        assert events[-2]["usage"]["hops"]["forwards"] == 8 and events[-1] == "[DONE]"

    over_http(llm, folder, main)


def test_many_requests_with_parameters_of_their_own(llm: LLM, folder: Path) -> None:
    """32 together give what each gives alone."""
    kinds: list[dict[str, Any]] = [
        {"schedule": "static", "block_length": 4},
        {"schedule": "threshold", "threshold": 0.3, "kv_policy": "prefix"},
        {"schedule": "factor", "cfg_scale": 0.5},
        {"schedule": "entropy", "entropy_bound": 4.0, "canvas": "block", "block_length": 8},
        {"schedule": "hierarchical", "kv_policy": "none"},
    ]

    async def main(client: httpx.AsyncClient) -> None:
        bodies = [
            chat(diffusion=kinds[i % 5], seed=i, temperature=[0, 0.9][i % 2], max_tokens=8 + i % 3 * 8)
            for i in range(32)
        ]
        together = await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for body in bodies))
        for body, response in zip(bodies[::4], together[::4], strict=True):
            alone = await client.post("/v1/chat/completions", json=body)
            assert alone.json()["choices"] == response.json()["choices"], body

    over_http(llm, folder, main)


def test_a_client_that_leaves_midway_frees_what_it_held(llm: LLM, folder: Path) -> None:
    async def main(client: httpx.AsyncClient) -> None:
        fields = chat(diffusion={"schedule": "static", "block_length": 2}, stream=True, max_tokens=400)
        task = asyncio.create_task(client.post("/v1/chat/completions", json=fields))
        await asyncio.to_thread(await_begun, llm, "language-0")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(await_empty, llm, HELD)

    over_http(llm, folder, main)


@pytest.mark.parametrize(
    ("diffusion", "named"),
    [
        ({"threshold": 2}, "diffusion.threshold is 2"),
        ({"speed": 1}, "unknown fields: speed"),
        ({"show_steps": True}, "show_steps"),
        ({"block_length": 17}, "block_length is 17"),
    ],
)
def test_wrong_parameters_are_a_400_that_names_them(
    llm: LLM, folder: Path, diffusion: dict[str, Any], named: str
) -> None:
    async def main(client: httpx.AsyncClient) -> None:
        response = await client.post("/v1/chat/completions", json=chat(diffusion=diffusion))
        error = json.loads(response.text)["error"]
        assert response.status_code == 400 and named in error["message"], response.text

    over_http(llm, folder, main)


@pytest.mark.parametrize("layout", ["own", "llama"])
def test_nobody_is_preempted_so_nothing_is_swapped(layout: str, tmp_path: Path) -> None:
    """Refused before anything starts, and by whoever builds an engine or looks at a folder."""
    folder, own = make_llada(tmp_path, layout=layout), EngineConfig(**SETTINGS, preemption="swap")  # type: ignore[arg-type]
    for check in (lambda: build_engine(folder, own), lambda: check_model(folder, own)):
        with pytest.raises(ModelNotSupported, match=r"'swap' has no effect .* use 'recompute'"):
            check()
    (folder / "model.safetensors").unlink()  # nothing of it is looked at
    tree = {"model": {"path": str(folder)}, "language": {"preemption": "swap"}}
    with pytest.raises(ConfigError, match=r"language.preemption is 'swap'.*fills in masks.*use 'recompute'"):
        build_config(tree).resolve()
    build_config({**tree, "language": {}}).resolve()


def test_it_makes_no_drafts(folder: Path, tmp_path: Path) -> None:
    """It predicts what stands at a mask, not what comes next; its vocabulary would do."""
    target = make_text_model(tmp_path, "llama", vocab_size=CONFIG["vocab_size"])
    save_tokenizer(TOKENIZER, target)
    with pytest.raises(ModelNotSupported, match=r"draft model .* fills in masks"):
        LLM(model=str(target), **SETTINGS, language={"draft_model": str(folder)})


@pytest.mark.parametrize("method", ["int8", "int8_dynamic"])
def test_quantised_weights_fill_in_masks_too(folder: Path, method: str) -> None:
    with LLM(model=str(folder), **SETTINGS, quantization=method) as llm:
        (answer,) = llm.generate("12+34", GREEDY)
    assert len(answer.outputs[0].token_ids) == 24 and MASK_ID not in answer.outputs[0].token_ids
