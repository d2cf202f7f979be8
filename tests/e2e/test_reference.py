"""Random tiny Qwen2.5-VL, Qwen3-VL and MiniMind-V checkpoints: the reference's logits and greedy tokens, in float32.

Twice each: colocated (`LLM`, in-memory endpoints) and disaggregated (an embedding worker and a language worker in
processes of their own, over ZeroMQ), with every pair of default grant and block size spread over the checkpoints.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cluster import LLM, SamplingParams
from cluster.model_info import ModelInfo
from cluster.prompts import image_bytes, request_from_prompt
from tests.e2e.front import Gathered, open_workers
from tests.e2e.worker_process import WorkerProcess
from tests.profiles import IS_SOAK
from tests.tiny_families import FAMILIES
from tests.tiny_models import QWEN2_5_VL_CONFIGS, make_qwen2_5_vl, random_image, reference, reference_inputs
from tests.tiny_qwen3_vl import QWEN3_VL_CONFIGS, make_qwen3_vl, qwen3_vl_reference
from tests.tiny_tokenizer import TOKEN_IDS
from tests.waiting import eventually

TOLERANCE = 1e-4
NUM_NEW = 8
GREEDY = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True)
SIZES = ((57, 90), (28, 28), (120, 41), (300, 33), (1, 1), (86, 84), (170, 169), (31, 199), (233, 140))
DEFAULT_TOKENS = (1, 100, 8000, 8192)
BLOCK_SIZES = (16, 37, 128)
PAIRS = tuple(itertools.product(DEFAULT_TOKENS, BLOCK_SIZES))
TRANSPORTS = ("ipc", "tcp", "curve")
ENGINE = {"dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_tokens": 4096, "max_model_len": 1024}
EMBED = {"dtype": "float32", "device": "cpu", "num_threads": 1, "cache_tokens": 0}
LEDGER = (
    "transfer_blocks_in_use",
    "transfer_streams_open",
    "transfer_tickets_open",
    "kv_pages_referenced",
    "num_requests_running",
    "num_requests_waiting",
)


def _pairs_of(index: int) -> tuple[tuple[int, int], ...]:
    """(default_allocate_tokens, block_size) pairs that a checkpoint runs with."""
    return PAIRS if IS_SOAK else (PAIRS[index % len(PAIRS)],)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One prompt and what the reference says of it."""

    prompt: dict[str, Any]
    logits: torch.Tensor
    tokens: list[int]
    num_media_rows: int

    def check(self, logits: torch.Tensor, tokens: list[int], run: str) -> None:
        assert logits.shape == self.logits.shape, f"{run}: {logits.shape}, reference {self.logits.shape}"
        difference = (logits - self.logits).abs().max().item()
        assert difference < TOLERANCE, f"{run}: logits differ by {difference}"
        assert tokens == self.tokens, run


def _case(folder: Path, model: Any, index: int, num_images: int) -> Case:
    sizes = [SIZES[(index + 2 * i) % len(SIZES)] for i in range(num_images)]
    images = [random_image(*size, seed=17 * index + i) for i, size in enumerate(sizes)]
    pieces: list[str | Image.Image] = ["<|im_start|>user\n"]
    for i, image in enumerate(images):
        pieces += [image, f" number {i}? "] if (index + i) % 3 else [image]  # some images lie side by side
    pieces.append(f"What is in picture {index}?<|im_end|>\n<|im_start|>assistant\n")
    inputs = reference_inputs(folder, pieces)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
        out = model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False)
    ids = inputs["input_ids"][0].tolist()
    pad = TOKEN_IDS["<|image_pad|>"]
    collapsed = [token for i, token in enumerate(ids) if token != pad or ids[i - 1] != pad]
    return Case(
        prompt={"prompt_token_ids": collapsed, "images": [image_bytes(image) for image in images]},
        logits=logits,
        tokens=out[0, len(ids) :].tolist(),
        num_media_rows=ids.count(pad),
    )


def _cases(folder: Path, model: Any, index: int) -> list[Case]:
    """Text only, and twice some of 1 to 5 images (the soak profile: each number once)."""
    model.generation_config.eos_token_id = None
    counts = (0, 1, 2, 3, 4, 5) if IS_SOAK else (0, 1 + index % 5, 1 + (index + 2) % 5)
    return [_case(folder, model, index, count) for count in counts]


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, WorkerProcess]]:
    with ExitStack() as stack:
        workers = {kind: WorkerProcess(kind) for kind in ("embedding", "language")}
        for worker in workers.values():
            stack.callback(worker.close)
        yield workers


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("index", range(len(QWEN2_5_VL_CONFIGS)))
def test_equals_the_reference(index: int, tmp_path: Path, processes: dict[str, WorkerProcess]) -> None:
    folder = make_qwen2_5_vl(tmp_path, seed=100 + index, **QWEN2_5_VL_CONFIGS[index])
    _check_equal(folder, _cases(folder, reference(folder), index), index, processes)


@pytest.mark.parametrize("index", range(len(QWEN3_VL_CONFIGS)))
def test_deepstack_equals_the_reference(index: int, tmp_path: Path, processes: dict[str, WorkerProcess]) -> None:
    """Every media row consists of several planes; in a block they arrive together, whatever the block's size."""
    folder = make_qwen3_vl(tmp_path, seed=200 + index, **QWEN3_VL_CONFIGS[index])
    _check_equal(folder, _cases(folder, qwen3_vl_reference(folder), index), index, processes)


@pytest.mark.parametrize("index", range(6))
def test_minimind_v_equals_the_reference(index: int, tmp_path: Path, processes: dict[str, WorkerProcess]) -> None:
    """Two images side by side, in every layout; text alone and behind them."""
    name = [name for name in FAMILIES if name.startswith("minimind-v")][index]
    subject = FAMILIES[name](tmp_path, 10 + index)
    behind = subject.greedy(NUM_NEW + 5)
    num_rows = subject.logits([]).shape[0] - len(subject.stem) + len(subject.images)
    cases = [
        Case(
            prompt=subject.prompt(behind[:n]),
            logits=subject.logits(behind[:n]),
            tokens=behind[n : n + NUM_NEW],
            num_media_rows=num_rows,
        )
        for n in (0, 5)
    ]
    _check_equal(subject.folder, cases, index, processes)


def _check_equal(folder: Path, cases: list[Case], index: int, processes: dict[str, WorkerProcess]) -> None:
    assert len({tuple(case.tokens) for case in cases}) > 1, "prompts must matter to the model"
    for default_tokens, block_size in _pairs_of(index):
        transfer = {"block_size": block_size, "default_allocate_tokens": default_tokens}
        _check_colocated(folder, cases, transfer)
        for transport in TRANSPORTS if IS_SOAK else (TRANSPORTS[index % 3],):
            _check_disaggregated(folder, cases, transfer, transport, processes)


def _check_colocated(folder: Path, cases: list[Case], transfer: dict[str, int]) -> None:
    with LLM(model=str(folder), language=ENGINE, embedding=EMBED, **transfer) as llm:
        outputs = llm.generate([case.prompt for case in cases], GREEDY)
        for case, output in zip(cases, outputs, strict=True):
            assert output.num_prompt_tokens == case.logits.shape[0]
            case.check(llm.logits(case.prompt), output.outputs[0].token_ids, f"colocated {transfer}")


def _check_disaggregated(
    folder: Path,
    cases: list[Case],
    transfer: dict[str, int],
    transport: str,
    processes: dict[str, WorkerProcess],
) -> None:
    run = f"{transport} {transfer}"
    info = ModelInfo.load(folder)
    with ExitStack() as stack:
        front = open_workers(stack, str(folder), transfer, transport, processes, embedding=EMBED, language=ENGINE)
        requests = [request_from_prompt(info, case.prompt, GREEDY, return_logits=True) for case in cases]
        sinks = [front.submit(request)[0] for request in requests]  # all at once
        for case, sink in zip(cases, sinks, strict=True):
            sink.finish()
            case.check(sink.logits(), sink.tokens(), run)
            _check_hops(case, sink, **transfer)
        _await_empty(processes["language"])
        num_blocks = sum(math.ceil(case.num_media_rows / transfer["block_size"]) for case in cases)
        assert processes["language"].ask("stats")["transfer_blocks_received_total"] == num_blocks
        if transport == "curve":
            assert processes["language"].ask("stats")["refused_keys"] == 0


def _check_hops(case: Case, sink: Gathered, *, block_size: int, default_allocate_tokens: int) -> None:
    """The figures of the transfer are what the sizes demand."""
    stats = sink.finish()
    assert (stats.num_prompt_tokens, stats.num_generated_tokens) == (case.logits.shape[0], NUM_NEW)
    if not case.num_media_rows:
        assert "blocks" not in stats.hops, "a text-only request met an embedding worker"
        return
    if "blocks" not in stats.hops:
        return  # the embedding worker's figures came after the last token; the receiver's count is checked besides
    num_blocks = math.ceil(case.num_media_rows / block_size)
    default_blocks = math.ceil(default_allocate_tokens / block_size)
    assert (stats.hops["rows"], stats.hops["blocks"]) == (case.num_media_rows, num_blocks)
    assert (stats.hops["grant_rounds"] > 1) == (num_blocks > default_blocks), stats.hops


def _await_empty(language: WorkerProcess) -> None:
    """The ledger of the language worker comes to zero: its last acknowledgements may still be on their way."""

    def left() -> dict[str, Any]:
        stats = language.ask("stats")
        return {name: stats[name] for name in LEDGER if stats[name]}

    eventually(lambda: not left(), lambda: f"left behind: {left()}")


def test_every_pair_of_grant_and_block_size_is_run() -> None:
    assert {pair for index in range(len(QWEN2_5_VL_CONFIGS)) for pair in _pairs_of(index)} == set(PAIRS)
    assert len(QWEN2_5_VL_CONFIGS) >= 20
    counts = {count for index in range(len(QWEN2_5_VL_CONFIGS)) for count in (1 + index % 5, 1 + (index + 2) % 5)}
    assert counts == {1, 2, 3, 4, 5}
