"""Both halves of every family on a pretended GPU: the Triton paths (interpreted), recorded decode steps, nothing on the
wrong side of the bus, and no waiting for the device but for the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.prompts import image_bytes
from embedding_worker.config import EmbedConfig
from embedding_worker.preprocess import ImageLimits, prepare_image
from embedding_worker.runner import VisionRunner
from kernels.stored_matrix import StoredMatrix
from language_worker.diffusion_params import DiffusionParams
from language_worker.sampling_params import SamplingParams
from tests.language_worker.helpers import GREEDY, Media, Result, drive, make_engine, prompt, request
from tests.pretended_cuda import DEVICE, pretended_cuda
from tests.profiles import IS_SOAK
from tests.quantised_layouts import Scheme, quantise_folder
from tests.tiny_families import FAMILIES, Subject
from tests.tiny_llada import make_llada
from tests.tiny_text_models import make_text_model

NUM_TOKENS = 4
COVERING = (
    "qwen3_moe", "nanochat-0", "nanochat-4", "fusion_tree-bare", "minimind-2-moe-pth", "minimind-v-siglip-pth",
    "minimind-v-naflex-pth", "minimind-v-clip-pth", "qwen2_5_vl", "qwen3_vl",
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES if IS_SOAK else COVERING)
def test_tokens_are_the_reference_s(name: str, tmp_path: Path) -> None:
    subject = FAMILIES[name](tmp_path, 3)
    with pretended_cuda() as cuda:
        engine = make_engine(subject.folder, device=str(DEVICE), max_model_len=0)
        media = {"a": _encode(subject)} if subject.images else {}
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, banned_token_ids=subject.banned)
        cuda.host_reads.clear()
        answer = drive(engine, [request("a", subject.stem, params, num_media=len(subject.images))], media)["a"]
        assert cuda.host_reads == {"tolist": NUM_TOKENS}
    assert answer.error is None
    assert answer.tokens() == subject.greedy(NUM_TOKENS)


CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"kv_cache_dtype": "int8"},
    {"decode_strategy": "speculative"},
    {"preemption": "swap", "kv_cache_tokens": 96, "page_size": 4, "max_prefill_chunk": 7},
    {"quantization": "int8"},
    {"quantization": "int4"},
    {"kv_cache_tokens": 96, "page_size": 4},
)


@pytest.mark.parametrize(
    "config", CONFIGS if IS_SOAK else CONFIGS[:4], ids=lambda config: "-".join(map(str, config.values())) or "plain"
)
def test_any_traffic_is_as_on_the_cpu(config: dict[str, Any], tiny: Path) -> None:
    several = [
        GREEDY,
        SamplingParams(temperature=0.9, seed=7, max_tokens=5, ignore_eos=True, n=2),
        SamplingParams(temperature=1.3, top_k=20, top_p=0.9, min_p=0.01, seed=8, max_tokens=5, ignore_eos=True),
        SamplingParams(temperature=0, repetition_penalty=1.4, logit_bias={5: 2.0}, max_tokens=5, ignore_eos=True),
        SamplingParams(temperature=0.7, seed=9, max_tokens=4, ignore_eos=True, logprobs=2, prompt_logprobs=1),
    ]
    asked = [request(f"r{i}", (*prompt(3 + 9 * i, seed=i), 5, 6, 5, 6), params) for i, params in enumerate(several)]
    config = {"max_model_len": 96, **config}
    expected = drive(make_engine(tiny, **config), asked)
    with pretended_cuda():
        results = drive(make_engine(tiny, device=str(DEVICE), **config), asked)
    assert {name: _tokens(result) for name, result in results.items()} == {
        name: _tokens(result) for name, result in expected.items()
    }
    for mine, other in zip(results["r4"].chunks, expected["r4"].chunks, strict=True):
        for a, b in zip(mine.logprobs or (), other.logprobs or (), strict=True):
            assert (a.token_id, a.rank) == (b.token_id, b.rank)
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.mark.parametrize("kv_policy", ["none", "prefix", "dual"] if IS_SOAK else ["dual"])
def test_masks_are_filled_in_as_on_the_cpu(kv_policy: str, tmp_path: Path) -> None:
    make_llada(tmp_path, seed=2)
    params = SamplingParams(
        max_tokens=10, temperature=0, diffusion=DiffusionParams(block_length=5, kv_policy=kv_policy)
    )
    drawn = SamplingParams(
        max_tokens=8,
        temperature=0.8,
        seed=3,
        diffusion=DiffusionParams(block_length=4, threshold=0.3, schedule="threshold"),
    )
    asked = [request("a", prompt(9, vocab=20), params), request("b", prompt(4, seed=1, vocab=20), drawn)]
    expected = drive(make_engine(tmp_path), asked)
    with pretended_cuda() as cuda:
        engine = make_engine(tmp_path, device=str(DEVICE))
        cuda.host_reads.clear()
        results = drive(engine, asked)
        assert cuda.host_reads.keys() == {"tolist"}
    done = [result.done for result in results.values()]
    assert cuda.host_reads.total() <= sum(one.num_forwards for one in done if one is not None)
    for name, result in results.items():
        assert result.error is None
        assert result.tokens() == expected[name].tokens()


@pytest.mark.parametrize(
    "scheme",
    [Scheme(method="awq", sym=False), Scheme(desc_act=True, bits=8)],
    ids=lambda scheme: f"{scheme.method}-{scheme.bits}",
)
def test_weights_that_are_stored_quantised_stay_so(scheme: Scheme, tmp_path: Path) -> None:
    stored, _ = quantise_folder(make_text_model(tmp_path / "plain", "qwen2", seed=3), tmp_path, scheme)
    asked = [request("a", prompt(5), SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))]
    expected = drive(make_engine(stored), asked)["a"].tokens()
    with pretended_cuda():
        engine = make_engine(stored, device=str(DEVICE))
        assert any(isinstance(weight, StoredMatrix) for weight in engine.runner.model.parameters().values())
        assert drive(engine, asked)["a"].tokens() == expected


def test_greedy_and_drawn_tokens_of_a_step_are_waited_for_together(tiny: Path) -> None:
    drawn = SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=NUM_TOKENS, ignore_eos=True)
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with pretended_cuda() as cuda:
        engine = make_engine(tiny, device=str(DEVICE))
        cuda.host_reads.clear()
        results = drive(engine, [request("a", prompt(5), greedy), request("b", prompt(6), drawn)])
        assert cuda.host_reads == {"tolist": NUM_TOKENS}
    assert all(len(result.tokens()) == NUM_TOKENS for result in results.values())


def test_logits_that_are_not_finite_fail_their_request_alone(tiny: Path) -> None:
    with pretended_cuda():
        engine = make_engine(tiny, device=str(DEVICE))
        with torch.inference_mode():
            engine.runner.model.embedding[7] = torch.nan
        results = drive(engine, [request("bad", (7, 8, 9)), request("good", (5, 6))])
    assert "not finite" in str(results["bad"].error)
    assert results["good"].error is None


@dataclass
class Encoded(Media):
    """What the embedding half made of a subject's images. rows: [total, hidden], of several planes [total, planes,
    hidden]."""

    counts: list[int]  # of rows, by image

    def items(self) -> list[dict[str, Any]]:
        return [{"grid": list(grid), "rows": count} for grid, count in zip(self.grids, self.counts, strict=True)]

    def planes(self) -> tuple[torch.Tensor, ...]:
        return self.rows.unbind(1) if self.rows.dim() == 3 else (self.rows,)


def _encode(subject: Subject) -> Encoded:
    runner = VisionRunner.load(subject.folder, EmbedConfig(dtype="float32", device=str(DEVICE)))
    limits = ImageLimits(max_bytes=1 << 20, max_pixels=1 << 20)
    images = [prepare_image(image_bytes(image), i, runner.settings, limits) for i, image in enumerate(subject.images)]
    rows = runner.encode(images)
    return Encoded(grids=[image.grid for image in images], rows=torch.cat(rows), counts=[len(part) for part in rows])


def _tokens(result: Result) -> list[list[int]]:
    assert result.error is None
    return [result.tokens(index) for index in range(1 + max(chunk.index for chunk in result.chunks))]
