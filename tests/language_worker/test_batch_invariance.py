"""Batch-invariant steps: logits have the same bits alone, in a crowd, in chunks, after preemption, behind drafts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.invariance import TILE_ROWS, tile_rows
from language_worker.api import GenerateRequest
from language_worker.errors import ModelNotSupported
from language_worker.sampling_params import SamplingParams
from tests.language_worker.helpers import Media, Results, drive, make_engine, prompt, request
from tests.tiny_llada import make_llada
from tests.tiny_models import make_qwen2_5_vl
from tests.tiny_text_models import make_text_model
from tests.tiny_tokenizer import TOKEN_IDS

WARM = SamplingParams(temperature=1.0, seed=5, max_tokens=24, ignore_eos=True, logprobs=2)
SHORT = {"kv_cache_tokens": 256, "max_model_len": 128}
CROWDS: list[dict[str, Any]] = [
    {},
    {"max_prefill_chunk": 7, "max_num_seqs": 3},
    {**SHORT, "prefix_cache": False},
    {**SHORT, "preemption": "swap", "swap_tokens": 90},
    {"decode_strategy": "speculative", "max_step_tokens": 64},
]
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # family, of the checkpoint, of the engine
    "llama": ("llama", {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5}, {}),
    "qwen3": ("qwen3", {}, {}),
    "sliding": ("mistral", {"sliding_window": 20}, {}),
    "half sliding": ("mistral", {"sliding_window": 20}, {"dtype": "float16"}),
    "int8": ("qwen2", {}, {"quantization": "int8"}),
    "int8 keys": ("qwen3", {}, {"kv_cache_dtype": "int8"}),
    "float32": ("qwen2", {}, {"dtype": "float32"}),
}


def _asked() -> list[GenerateRequest]:
    """Beginnings in common, samples, and prompts of all lengths; the prompt's logits of every other one."""
    stem = prompt(37)
    lengths = [1, 5, 16, 17, 30, 64, 80]
    return [
        request(
            f"r{i}",
            (*(stem if i % 3 == 0 else ()), *prompt(length, seed=i))[:90],
            dataclasses.replace(WARM, n=1 + i % 2, seed=i),
            return_logits=i % 2 == 1,
        )
        for i, length in enumerate(lengths)
    ]


def _bits(results: Results, asked: list[GenerateRequest]) -> list[Any]:
    """All that was chosen, with log-probabilities to the last bit, and prompts' logits."""
    found = []
    for one in asked:
        result = results[one.request_id]
        assert result.error is None
        chosen = [(c.index, c.token_ids, c.logprobs) for c in result.chunks]
        flat = sorted(
            (index, position, token_id, logprob)
            for index in range(one.sampling.n)
            for position, (token_id, logprob) in enumerate(
                (t, repr(p)) for i, ids, logprobs in chosen if i == index for t, p in zip(ids, logprobs, strict=True)
            )
        )
        found.append((flat, None if result.logits is None else result.logits.numpy().tobytes()))
    return found


def _engine(folder: Path, **config: Any) -> Any:
    return make_engine(folder, **{"dtype": "bfloat16", "page_size": 8, **config})


@pytest.mark.parametrize("name", MODELS)
def test_bits_do_not_depend_on_the_traffic(name: str, tmp_path: Path) -> None:
    family, shape, config = MODELS[name]
    folder, asked = make_text_model(tmp_path, family, seed=6, **shape), _asked()
    alone = Results()
    for one in asked:
        alone |= drive(_engine(folder, **config, batch_invariant=True), [one])
    expected = _bits(alone, asked)
    for crowd in CROWDS:
        engine = _engine(folder, **config, **crowd, batch_invariant=True)
        assert _bits(drive(engine, asked), asked) == expected, crowd
        if "kv_cache_tokens" in crowd:
            assert engine.stats()["num_preemptions_total"] > 0


def test_without_it_bits_do_depend(tmp_path: Path) -> None:
    """The comparison has power."""
    folder, asked = make_text_model(tmp_path, "llama", seed=6), _asked()
    alone = Results()
    for one in asked:
        alone |= drive(_engine(folder), [one])
    assert _bits(drive(_engine(folder, max_prefill_chunk=7), asked), asked) != _bits(alone, asked)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_large_steps_change_no_bit(dtype: str, tmp_path: Path) -> None:
    """Where ops would take another path because tensors are large."""
    folder, asked = make_text_model(tmp_path, "qwen3", seed=6), [request("a", prompt(1500), WARM)]
    engines = [
        _engine(folder, dtype=dtype, batch_invariant=True, max_model_len=1600, max_prefill_chunk=chunk)
        for chunk in (0, 333)
    ]
    first, second = (_bits(drive(engine, asked), asked) for engine in engines)
    assert first == second


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_images_beside_text_change_no_bit(dtype: str, tmp_path: Path) -> None:
    folder = make_qwen2_5_vl(tmp_path, hidden_size=96, num_attention_heads=6, num_key_value_heads=2)
    pad, generator = TOKEN_IDS["<|image_pad|>"], torch.Generator().manual_seed(1)
    media = {
        name: Media(
            grids=[grid], rows=torch.randn(grid[1] * grid[2] // 4, 96, generator=generator).to(getattr(torch, dtype))
        )
        for name, grid in (("a", (1, 4, 6)), ("b", (1, 10, 2)))
    }
    asked = [
        request(
            name,
            (*prompt(5, seed=i), *[pad] * (name in media), *prompt(9 + i)),
            WARM,
            num_media=int(name in media),
        )
        for i, name in enumerate(("a", "x", "b", "y"))
    ]
    alone = Results()
    for one in asked:
        own = {name: rows for name, rows in media.items() if name == one.request_id}
        alone |= drive(_engine(folder, dtype=dtype, batch_invariant=True), [one], own)
    for chunk in (0, 5):
        engine = _engine(folder, dtype=dtype, batch_invariant=True, max_prefill_chunk=chunk)
        assert _bits(drive(engine, asked, media), asked) == _bits(alone, asked)


def test_close_to_the_usual_steps(tmp_path: Path) -> None:
    """The same numbers but for rounding: greedy tokens and logits in float32."""
    folder = make_text_model(tmp_path, "qwen3", seed=2)
    asked = [request(f"r{i}", prompt(10 + 9 * i, seed=i), return_logits=True) for i in range(4)]
    usual, invariant = (drive(make_engine(folder, batch_invariant=is_on), asked) for is_on in (False, True))
    for one in asked:
        assert usual[one.request_id].tokens() == invariant[one.request_id].tokens()
        torch.testing.assert_close(usual[one.request_id].logits, invariant[one.request_id].logits, atol=1e-4, rtol=1e-4)


def test_tiles_are_of_one_row_where_places_matter() -> None:
    row = torch.ones(1, 4)
    assert tile_rows([(lambda x: x * 2, row)]) == TILE_ROWS
    assert tile_rows([(lambda x: x * 2, row), (lambda x: x + torch.arange(len(x))[:, None], row)]) == 1


@pytest.mark.parametrize("family", ["mixtral", "llada"])
def test_what_is_not_served_is_refused_by_name(family: str, tmp_path: Path) -> None:
    folder = make_llada(tmp_path) if family == "llada" else make_text_model(tmp_path, family)
    with pytest.raises(ModelNotSupported, match="batch_invariant is not served for mixtures"):
        make_engine(folder, batch_invariant=True)
