"""Engines that keep keys and values in 8 bits: the same as one on what those numbers stand for, and near the full one.

The ops and pages themselves are tested in `tests/kernels`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.quantised_pages import QuantisedPages
from language_worker.config import EngineConfig, KVDTypeName
from language_worker.engine import Engine
from language_worker.engine_builder import KV_DTYPES, check_model
from language_worker.errors import InvalidRequest, KVMismatch, ModelNotSupported
from language_worker.handover.exports import KVExport
from language_worker.kv_cache import KVCache
from language_worker.models import layers
from language_worker.models.base import KVSpec
from language_worker.models.decoder import Decoder
from tests.language_worker.helpers import GREEDY, Results, drive, make_engine, prompt, request
from tests.language_worker.test_handover import ONE, Link
from tests.tiny_llada import make_llada
from tests.tiny_models import make_qwen2_5_vl
from tests.tiny_text_models import make_text_model

KINDS: tuple[KVDTypeName, ...] = ("int8", "fp8")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"num_key_value_heads": 1},
    "mistral": {"sliding_window": 12},
    "mixtral": {},
}


def _rounded(x: torch.Tensor, kind: KVDTypeName) -> torch.Tensor:
    """What is left of rows after quantisation, rounded here in float64; float8's steps by its format's definition."""
    wide, largest = x.double(), 127.0 if kind == "int8" else 448.0
    scales = wide.abs().amax(-1, keepdim=True) / largest
    steps = torch.ones_like(wide)
    if kind == "fp8":  # three bits of mantissa, exponents from 2^-6 on
        _, exponents = torch.frexp(wide / scales)
        steps = torch.ldexp(steps, (exponents - 1).clamp(min=-6) - 3)
    return ((wide / scales / steps).round() * steps * scales).to(x.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logits_are_those_of_the_rounded_keys_and_values(
    family: str, kind: KVDTypeName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_text_model(tmp_path, family, seed=4, **FAMILIES[family])
    plain, quantised = make_engine(folder), make_engine(folder, kv_cache_dtype=kind)
    assert all(isinstance(cache, QuantisedPages) for layer in quantised.runner.cache.layers for cache in layer)
    asked = [request(f"r{i}", prompt(5 + 9 * i, seed=i), return_logits=True) for i in range(4)]
    before, actual = drive(plain, asked), drive(quantised, asked)

    def write_rounded(k_cache: Any, v_cache: Any, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        original(k_cache, v_cache, _rounded(k, kind), _rounded(v, kind), slots)

    original = layers.write_pages
    monkeypatch.setattr(layers, "write_pages", write_rounded)
    monkeypatch.setattr(Decoder, "_in_one_call", lambda *_: None)  # which writes for itself
    expected = drive(make_engine(folder), asked)
    assert any(not torch.equal(before[r.request_id].logits, expected[r.request_id].logits) for r in asked)
    for r in asked:
        torch.testing.assert_close(actual[r.request_id].logits, expected[r.request_id].logits, atol=1e-4, rtol=1e-4)
        assert actual[r.request_id].tokens() == expected[r.request_id].tokens()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("fp8", 0.08)])
def test_logits_stay_near_those_of_full_keys_and_values(
    kind: KVDTypeName, bound: float, dtype: str, tmp_path: Path
) -> None:
    folder = make_qwen2_5_vl(tmp_path, hidden_size=64, num_hidden_layers=3)
    asked = [request("a", prompt(60), return_logits=True)]
    full = drive(make_engine(folder, dtype=dtype), asked)["a"].logits
    rounded = drive(make_engine(folder, dtype=dtype, kv_cache_dtype=kind), asked)["a"].logits
    assert full is not None and rounded is not None
    error = (rounded.double() - full.double()).norm() / full.double().norm()
    assert 1e-5 < float(error) < bound, float(error)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        {"max_prefill_chunk": 7},
        {"kv_cache_tokens": 160, "max_model_len": 120, "page_size": 4},
        {"kv_cache_tokens": 160, "max_model_len": 120, "page_size": 4, "preemption": "swap"},
        {"decode_strategy": "speculative"},
        {"max_num_seqs": 1, "page_size": 4},
    ],
)
def test_traffic_changes_no_token(kind: KVDTypeName, change: dict[str, Any], tmp_path: Path) -> None:
    """Forks, prefix hits, preemption and chunks, with other requests beside; in float32, where a rounding to 8 bits
    that falls another way by float noise changes no token of these."""
    folder = make_text_model(tmp_path, "qwen3", seed=3)
    sampling = dataclasses.replace(GREEDY, max_tokens=30, n=2, temperature=0.8, seed=1)
    asked = [request(f"r{i}", (*prompt(20), *prompt(3 * i, seed=i)), sampling) for i in range(5)]
    alone = [drive(make_engine(folder, kv_cache_dtype=kind, prefix_cache=False), [one]) for one in asked]
    engine = make_engine(folder, kv_cache_dtype=kind, **change)
    together = drive(engine, asked)
    for one, expected in zip(asked, alone, strict=True):
        for i in range(2):
            assert together[one.request_id].tokens(i) == expected[one.request_id].tokens(i)
    stats = engine.stats()
    assert (stats["kv_pages_swapped_in_total"] > 0) == ("preemption" in change)
    assert stats["kv_pages_referenced"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_a_little_more_than_half_of_bfloat16(kind: KVDTypeName, tmp_path: Path) -> None:
    folder = make_text_model(tmp_path, "llama", head_dim=64)
    budget = {"kv_cache_tokens": 0, "kv_cache_bytes": 1 << 20, "max_num_seqs": 64, "max_model_len": 500}
    plain, small = (make_engine(folder, dtype="bfloat16", **budget, kv_cache_dtype=name) for name in ("auto", kind))
    assert 1.85 < small.runner.cache.num_pages / plain.runner.cache.num_pages < 2
    held = sum(x.values.nbytes + x.scales.nbytes for layer in small.runner.cache.layers for x in layer)
    tokens = small.runner.cache.num_pages * small.runner.cache.page_size
    assert held == tokens * small.stats()["kv_row_bytes"] <= 1 << 20


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_the_pages_held(kind: KVDTypeName) -> None:
    spec, cpu = KVSpec(num_layers=3, num_kv_heads=2, head_dim=5), torch.device("cpu")
    source, target = (KVCache(spec, num_pages=5, page_size=4, dtype=KV_DTYPES[kind], device=cpu) for _ in range(2))
    generator, slots, others = torch.Generator().manual_seed(0), torch.tensor([7, 3, 16]), torch.tensor([1, 2, 19])
    for cache in (cache for layer in source.layers for cache in layer):
        cache.write(torch.randn(20, 2, 5, generator=generator), torch.arange(20))
    rows = source.read_rows(slots)
    assert rows.shape == (3, 3 * 2 * 2 * (5 + 4)) and rows.dtype == torch.uint8
    target.write_rows(others, rows)
    source.copy_pages_to(target, [(4, 3)])
    source.copy_pages([(4, 2)])
    for layer, new_layer in zip(source.layers, target.layers, strict=True):
        for old, new in zip(layer, new_layer, strict=True):
            for name in ("values", "scales"):
                one, other = getattr(old, name).float(), getattr(new, name).float()
                assert torch.equal(one.flatten(0, 1)[slots], other.flatten(0, 1)[others])
                assert torch.equal(one[4], other[3]) and torch.equal(one[4], one[2]) and one[4].any()


def _hand_over(prefill: Engine, decode: Engine) -> Results:
    """One prompt computed by one engine and answered by the other."""
    ids, results = prompt(50), [Results(), Results()]
    link = Link("a", decode)
    decode.submit(request("a", ids), imports_kv=True)
    prefill.submit(request("a", ids, ONE), export=KVExport("a", link, prefill.kv_plane, prefill.kv_of))  # type: ignore[arg-type]
    for _ in range(40):
        results[0].take(prefill.step())
        link.hand_on(99)
        results[1].take(decode.step())
    return results[1]


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decode_engines_hand_it_over_as_it_is(kind: KVDTypeName, tmp_path: Path) -> None:
    folder = make_text_model(tmp_path, "llama", seed=8)
    prefill, decode, whole = (make_engine(folder, kv_cache_dtype=kind) for _ in range(3))
    tokens = _hand_over(prefill, decode)["a"].tokens()
    assert tokens == drive(whole, [request("a", prompt(50))])["a"].tokens()
    assert decode.stats()["kv_tokens_imported_total"] == 49
    refused = _hand_over(prefill, make_engine(folder))["a"].error
    assert isinstance(refused, KVMismatch) and "kv_cache_dtype" in str(refused)


def test_what_is_not_served_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="kv_cache_dtype is 'int4'; use one of auto, int8, fp8"):
        EngineConfig(kv_cache_dtype="int4")  # type: ignore[arg-type]
    folder = make_llada(tmp_path)
    assert "LLaDA" in json.loads((folder / "config.json").read_text())["architectures"][0]
    with pytest.raises(ModelNotSupported, match="'int8' is not served for models that fill in masks"):
        make_engine(folder, kv_cache_dtype="int8")
    with pytest.raises(ModelNotSupported, match="'fp8' is not served"):
        check_model(folder, EngineConfig(kv_cache_dtype="fp8"))
