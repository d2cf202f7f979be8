"""Prompts on one worker, answers on another: the reference implementation's tokens, and no page left on either side.

In one process over in-memory endpoints; single workers over inproc:// and tcp://, where each end is cancelled, or lost,
in turn. `test_topologies` does the same with processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import LLM, SamplingParams
from cluster.directory import WorkerAddress
from cluster.errors import WorkerLost
from cluster.prompts import image_bytes
from cluster.served import ServedRequest
from language_worker.config import EngineConfig
from language_worker.worker import LanguageWorker
from tests.e2e.front import Front
from tests.tiny_models import QWEN2_5_VL_CONFIGS, make_qwen2_5_vl, random_image, reference, reference_inputs
from tests.tiny_text_models import make_text_model
from tests.tiny_tokenizer import TOKEN_IDS
from tests.waiting import eventually
from transfer.config import TransferConfig
from transfer.endpoints.endpoint import open_endpoint
from transfer.errors import RemoteFailure

PAD = TOKEN_IDS["<|image_pad|>"]
NUM_NEW = 8
GREEDY = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True)
ENGINE = {"dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_tokens": 4096, "max_model_len": 1024}
SPLIT = {"prefill": 1, "decode": 1}
LEDGER = (
    "transfer_blocks_in_use", "transfer_streams_open", "transfer_tickets_open", "transfer_streams_sending",
    "kv_pages_referenced", "kv_buffer_rows_reserved", "kv_exports_open", "input_buffer_rows_reserved",
    "num_requests_running", "num_requests_waiting", "calls_incoming",
)  # fmt: skip
LACKING = {"prefill": set(), "decode": {"kv_exports_open", "transfer_streams_sending"}}  # figures, by kind of worker
NAMES = itertools.count()
WAIT_S = 120.0


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _await_empty(stats_of: Any) -> None:
    """No page, row, stream or ticket is left anywhere; last acknowledgements may still be on their way."""

    def left() -> dict[str, dict[str, Any]]:
        figures = stats_of()
        for kind, stats in figures.items():
            assert kind.startswith("embedding") or set(LEDGER) - stats.keys() <= LACKING[kind.split("-")[0]], kind
        return {worker: {name: stats[name] for name in LEDGER if stats.get(name)} for worker, stats in figures.items()}

    eventually(lambda: not any(left().values()), lambda: f"left behind: {left()}")


@pytest.mark.parametrize(("index", "page_size"), [(0, 4), (3, 32), (7, 4)])
def test_the_tokens_are_those_of_the_reference(index: int, page_size: int, tmp_path: Path) -> None:
    folder = make_qwen2_5_vl(tmp_path, seed=300 + index, **QWEN2_5_VL_CONFIGS[index])
    model = reference(folder)
    model.generation_config.eos_token_id = None
    prompts, expected, logits = [], [], []
    for pieces in (
        ["How do you do? " * 9],
        ["<|im_start|>user\n", random_image(120, 41, seed=1), " or ", random_image(57, 90, seed=2), " what?"],
        ["It ends in a picture ", random_image(86, 84, seed=3)],
    ):
        inputs = reference_inputs(folder, pieces)
        ids = inputs["input_ids"][0].tolist()
        with torch.no_grad():
            logits.append(model(**inputs).logits[0])
            out = model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False)
        expected.append(out[0, len(ids) :].tolist())
        collapsed = [token for i, token in enumerate(ids) if token != PAD or ids[i - 1] != PAD]
        images = [image_bytes(piece) for piece in pieces if not isinstance(piece, str)]
        prompts.append({"prompt_token_ids": collapsed, "images": images})
    engine = {**ENGINE, "page_size": page_size, "max_prefill_chunk": 5 if page_size == 4 else 0}
    transfer = {"block_size": 8, "default_allocate_tokens": 8, "pool_tokens": 32}
    with LLM(model=str(folder), language=engine, transfer=transfer, dtype="float32", workers=SPLIT) as llm:
        for _ in range(2):  # the second time both sides have prefixes in their caches
            outputs = llm.generate(prompts, GREEDY)
            assert [output.outputs[0].token_ids for output in outputs] == expected
        for prompt, right in zip(prompts, logits, strict=True):
            assert (llm.logits(prompt) - right).abs().max() < 1e-4
        stats = llm.stats()
        assert stats["prefill-0"]["prefix_cache_hits_total"] and stats["decode-0"]["prefix_cache_hits_total"]
        assert stats["decode-0"]["kv_tokens_imported_total"] > 0
        assert stats["decode-0"]["computed_tokens_total"] == len(prompts) * (2 * NUM_NEW + 1), "and no prompt"
        _await_empty(llm.stats)


VARIETY = [
    GREEDY,
    SamplingParams(max_tokens=12, temperature=1.0, seed=5, n=3, ignore_eos=True),
    SamplingParams(max_tokens=9, temperature=0.8, top_p=0.9, seed=1, logprobs=3, prompt_logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=10, temperature=1.0, seed=2, n=2, best_of=4, prompt_logprobs=0, ignore_eos=True),
    SamplingParams(max_tokens=30, temperature=1.2, seed=9, stop=["a", "e"], repetition_penalty=1.3),
    SamplingParams(max_tokens=12, temperature=0.0, min_tokens=4, logit_bias={7: 3.0}, frequency_penalty=0.5),
]


def _facts(output: Any) -> Any:
    """What must be equal; log-probabilities to the fifth digit."""

    def told(entries: Any) -> Any:
        return entries and [e and (e.token_id, e.rank, round(e.logprob, 4)) for e in entries]

    samples = [(o.token_ids, o.text, o.finish_reason, told(o.logprobs)) for o in output.outputs]
    return output.prompt_token_ids, told(output.prompt_logprobs), samples


@pytest.mark.parametrize("strategy", ["autoregressive", "speculative"])
def test_split_and_together_give_the_same(strategy: str, tmp_path: Path) -> None:
    """Seeds, samples, stop strings, log-probabilities, in a cache in which not all fit at once."""
    folder = make_text_model(tmp_path, "qwen3", seed=4)
    prompts = [" ".join(f"word {j}" for j in range(3 + 5 * i)) for i in range(len(VARIETY))]
    settings = {**ENGINE, "decode_strategy": strategy, "page_size": 4, "kv_cache_tokens": 260, "max_model_len": 250}
    with LLM(model=str(folder), **settings) as together:
        expected = together.generate([*prompts, "x"], [*VARIETY, GREEDY])
    with LLM(model=str(folder), workers=SPLIT, **settings) as split:
        for _ in range(2):
            got = split.generate([*prompts, "x"], [*VARIETY, GREEDY])
            assert list(map(_facts, got)) == list(map(_facts, expected))
        _await_empty(split.stats)


# -- ends that go away ------------------------------------------------------------------------------------------------


class Pair:
    """One prefill and one decode worker on a text model, and a front."""

    def __init__(
        self, stack: ExitStack, folder: Path, scheme: str, *, decode: Mapping[str, Any] | None = None, **engine: Any
    ) -> None:
        """engine: settings of both workers; decode: what the decode worker has instead."""
        transfer = TransferConfig(block_size=8, default_allocate_tokens=8, pool_tokens=64, peer_timeout_s=90.0)
        self.workers: dict[str, LanguageWorker] = {}
        self.front = Front(self._address(scheme), transfer)
        stack.callback(self.front.close)
        addresses = []
        for kind, own in (("prefill", {}), ("decode", decode or {})):
            endpoint = open_endpoint(self._address(scheme), transfer)
            config = EngineConfig(**{**ENGINE, **engine, **own})
            worker = LanguageWorker(folder, config, transfer, endpoint, kind)  # type: ignore[arg-type]
            stack.callback(worker.close)
            worker.start()
            self.workers[kind] = worker
            addresses.append(WorkerAddress(name=kind, kind=kind, address=worker.address))  # type: ignore[arg-type]
        self.front.reach(addresses)

    @staticmethod
    def _address(scheme: str) -> str:
        return f"inproc://split-{next(NAMES)}" if scheme == "inproc" else "tcp://127.0.0.1:0"

    def stats(self) -> dict[str, dict[str, Any]]:
        return {kind: worker.stats() for kind, worker in self.workers.items()}

    def ask(self, name: str, length: int = 60, **values: Any) -> Any:
        ids = tuple(5 + (7 * i) % 200 for i in range(length))
        return self.front.submit(ServedRequest(request_id=name, prompt_token_ids=ids, **{"sampling": GREEDY, **values}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("split"), "llama")


@pytest.fixture(params=["inproc", "tcp"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_request_over_either_transport(scheme: str, folder: Path) -> None:
    with ExitStack() as stack:
        pair = Pair(stack, folder, scheme)
        sink, _ = pair.ask("a", length=1)
        sink.finish()
        sink, _ = pair.ask("b", return_logits=True)
        stats = sink.finish()
        assert len(sink.tokens()) == NUM_NEW and sink.logits().shape[0] == 60
        assert (stats.hops["prefill_worker"], stats.hops["language_worker"]) == ("prefill", "decode")
        row_bytes = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head size, float32
        assert stats.hops["kv_bytes"] == 59 * row_bytes and stats.hops["kv_blocks"] == 8
        assert stats.hops["kv_grant_rounds"] > 1
        _await_empty(pair.stats)


def test_cancels_leave_nothing_on_either_side(scheme: str, folder: Path) -> None:
    long = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
    with ExitStack() as stack:
        pair = Pair(stack, folder, scheme, max_prefill_chunk=4, max_num_seqs=2)
        flights = [pair.ask(f"r{i}", sampling=long) for i in range(8)]
        assert flights[0][0].first_chunk.wait(WAIT_S)
        for _, running in flights:  # some answer, some are handed over, some are computed, some wait
            running.cancel()
        for sink, _ in flights:
            assert sink.over.wait(WAIT_S)
            is_whole = sink.error is None and len(sink.tokens()) == 900  # before it was cancelled
            assert is_whole or (isinstance(sink.error, RemoteFailure) and sink.error.code == "Cancelled"), sink.error
        assert any(sink.error is not None for sink, _ in flights)
        _await_empty(pair.stats)
        pair.ask("after")[0].finish()


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_worker_that_stops_leaves_nothing_at_the_other(victim: str, scheme: str, folder: Path) -> None:
    long = SamplingParams(max_tokens=800, temperature=0.0, ignore_eos=True)
    with ExitStack() as stack:
        pair = Pair(stack, folder, scheme, max_prefill_chunk=1, max_num_seqs=2)
        flights = [pair.ask(f"r{i}", length=200, sampling=long) for i in range(10)]
        assert flights[0][0].first_chunk.wait(WAIT_S)
        pair.workers.pop(victim).close()
        for sink, _ in flights:
            assert sink.over.wait(WAIT_S), "a request did not end"
            is_whole = sink.error is None and len(sink.tokens()) == 800  # it needed the worker no more
            assert isinstance(sink.error, WorkerLost) or is_whole, sink.error
        assert any(isinstance(sink.error, WorkerLost) for sink, _ in flights)
        _await_empty(pair.stats)


def test_room_for_kv_is_given_whole_and_oldest_first(folder: Path) -> None:
    """Buffers that hold one prompt at a time at either end: all requests are answered, one after the other."""
    with ExitStack() as stack:
        pair = Pair(stack, folder, "inproc", kv_buffer_tokens=100, max_prefill_chunk=16)
        alone = pair.ask("alone")[0]
        alone.finish()
        flights = [pair.ask(f"r{i}")[0] for i in range(12)]
        for sink in flights:
            sink.finish()
            assert sink.tokens() == alone.tokens()
        refused = pair.ask("long", length=102)[0]
        assert refused.over.wait(WAIT_S)
        assert isinstance(refused.error, RemoteFailure) and refused.error.code == "PromptTooLong"
        _await_empty(pair.stats)


# -- workers that compute otherwise -----------------------------------------------------------------------------------

DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 100}


def _outcome(folder: Path, **settings: Any) -> tuple[Any, list[int]]:
    with ExitStack() as stack:
        pair = Pair(stack, folder, "inproc", **settings)
        sink, _ = pair.ask("a")
        assert sink.over.wait(WAIT_S)
        _await_empty(pair.stats)
        return sink.error, sink.tokens()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one square weight of `folder`, by MiniMind's names."""
    path, generator = tmp_path_factory.mktemp("adapter") / "lora_other_64.pth", torch.Generator().manual_seed(0)
    name = "model.layers.0.self_attn.q_proj.lora"
    sides = {"A": (4, 64), "B": (64, 4)}
    torch.save(
        {f"{name}.{side}.weight": torch.randn(*shape, generator=generator) for side, shape in sides.items()}, path
    )
    return path


@pytest.mark.parametrize(
    "decode",
    [
        {"quantization": "int8"},
        {"config_overrides": {"rope_theta": 500.0}},
        {"config_overrides": {"rms_norm_eps": 1e-3}},
        {"lora": "adapter"},
    ],
)
def test_kv_that_was_computed_otherwise_is_refused(decode: dict[str, Any], folder: Path, adapter: Path) -> None:
    error, tokens = _outcome(folder, decode=decode if "lora" not in decode else {"lora": str(adapter)})
    assert isinstance(error, RemoteFailure) and error.code == "KVMismatch" and not tokens
    assert "same model folder, config_overrides, lora, quantization, dtype and kv_cache_dtype" in str(error)


def test_the_same_settings_on_both_sides_agree(folder: Path, adapter: Path, tmp_path: Path) -> None:
    """Wherever the adapter lies, and whatever length each serves where that decides nothing."""
    elsewhere = tmp_path / adapter.name
    elsewhere.write_bytes(adapter.read_bytes())
    error, tokens = _outcome(folder, lora=str(adapter), decode={"lora": str(elsewhere), "max_model_len": 512})
    assert error is None and len(tokens) == NUM_NEW


def test_a_dynamic_rotary_scaling_needs_one_length(tmp_path: Path) -> None:
    folder = make_text_model(tmp_path, "llama", **DYNAMIC)
    error, tokens = _outcome(folder, max_model_len=200, decode={"max_model_len": 400})
    assert isinstance(error, RemoteFailure) and error.code == "KVMismatch" and not tokens
    error, tokens = _outcome(folder, max_model_len=200)
    assert error is None and len(tokens) == NUM_NEW
    error, tokens = _outcome(folder, max_model_len=80, decode={"max_model_len": 100})  # neither grows
    assert error is None and len(tokens) == NUM_NEW
