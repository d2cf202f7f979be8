"""Engines whose weights are stored in 8 or 4 bits: the same as an engine on what those numbers stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import quantised_matrix
from kernels.quantised_linear import sums_bytes_exactly
from kernels.quantised_matrix import QuantisedMatrix, Quantization
from language_worker.config import EngineConfig
from language_worker.engine import Engine
from language_worker.engine_builder import check_model
from language_worker.errors import InvalidRequest, ModelNotSupported
from language_worker.models import feed_forward, layers
from language_worker.models.decoder import Decoder
from tests.language_worker.helpers import drive, make_engine, prompt, request
from tests.tiny_models import make_qwen2_5_vl
from tests.tiny_text_models import make_text_model
from transfer.checkpoint import CheckpointError


def _decoder(engine: Engine) -> Decoder:
    model = engine.runner.model
    assert isinstance(model, Decoder)
    return model


def _weights(engine: Engine) -> dict[str, Any]:
    """The matrices of all blocks, of attention and of the MLP."""
    parts = [(f"{i}", b) for i, b in enumerate(_decoder(engine).blocks)]
    parts += [(f"{i}.mlp", b.mlp) for i, b in enumerate(_decoder(engine).blocks)]
    return {
        f"{at}.{name}": getattr(part, name)
        for at, part in parts
        for name in (feed_forward.MATRICES if at.endswith("mlp") else layers.MATRICES)
    }


def _matrices(engine: Engine) -> dict[str, QuantisedMatrix]:
    found = _weights(engine)
    assert all(isinstance(matrix, QuantisedMatrix) for matrix in found.values())
    return found


@torch.inference_mode()
def _round_like(plain: Engine, method: Quantization) -> None:
    """Replace a plain engine's matrices by what is left of them after quantisation, rounded here in float64."""
    decoder = _decoder(plain)
    decoder.head = decoder.head.clone()  # the embedding stays as it is, also where it is the head
    for weight, bits in ((decoder.head, 8), *((w, 4 if method == "int4" else 8) for w in _weights(plain).values())):
        size = next(s for s in (128, 64, 32) if weight.shape[1] % s == 0) if bits == 4 else weight.shape[1]
        groups = weight.double().unflatten(1, (-1, size))
        steps = (groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp_min(1e-30)  # rows of zeros
        weight.copy_(((groups / steps).round() * steps).flatten(1))


@pytest.mark.parametrize("method", ["int8", "int4"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llama"])
def test_tokens_and_logits_are_those_of_the_rounded_weights(family: str, method: Quantization, tmp_path: Path) -> None:
    folder = make_qwen2_5_vl(tmp_path, hidden_size=64, intermediate_size=96)
    if family == "llama":
        folder = make_text_model(tmp_path / "text", "llama", hidden_size=64, intermediate_size=96)
    plain, quantised = (make_engine(folder, prefix_cache=False, quantization=kind) for kind in ("none", method))
    assert len(_matrices(quantised)) == 4 * len(_decoder(plain).blocks)
    requests = [request(f"r{i}", prompt(5 + 9 * i, seed=i), return_logits=True) for i in range(4)]
    before = drive(plain, requests)
    _round_like(plain, method)
    expected, actual = drive(plain, requests), drive(quantised, requests)
    assert any(not torch.equal(before[r.request_id].logits, expected[r.request_id].logits) for r in requests)
    for r in requests:
        torch.testing.assert_close(actual[r.request_id].logits, expected[r.request_id].logits, atol=1e-4, rtol=1e-4)
        assert actual[r.request_id].tokens() == expected[r.request_id].tokens()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "bound"), [("int8", 0.05), ("int8_dynamic", 0.08), ("int4", 0.5)])
def test_logits_stay_near_those_of_the_full_weights(
    method: Quantization, bound: float, dtype: str, tmp_path: Path
) -> None:
    folder = make_qwen2_5_vl(tmp_path, hidden_size=64, intermediate_size=96)
    asked = [request("a", prompt(40), return_logits=True)]
    if method == "int8_dynamic" and not sums_bytes_exactly():
        pytest.skip("this processor has no VNNI")
    full = drive(make_engine(folder, dtype="float32"), asked)["a"].logits
    rounded = drive(make_engine(folder, dtype=dtype, quantization=method), asked)["a"].logits
    assert full is not None and rounded is not None
    error = (rounded.double() - full.double()).norm() / full.double().norm()
    assert 1e-5 < float(error) < bound


@pytest.mark.parametrize(("method", "share"), [("int8", 1 / 2), ("int8_dynamic", 1 / 2), ("int4", 1 / 4)])
def test_matrices_take_their_share_of_bfloat16(method: Quantization, share: float, tmp_path: Path) -> None:
    folder = make_qwen2_5_vl(tmp_path, hidden_size=128, intermediate_size=256)
    if method == "int8_dynamic" and not sums_bytes_exactly():
        pytest.skip("this processor has no VNNI")
    plain, quantised = make_engine(folder, dtype="bfloat16"), make_engine(folder, dtype="bfloat16", quantization=method)
    full = sum(2 * weight.numel() for weight in _weights(plain).values())
    held = sum(matrix.num_bytes for matrix in _matrices(quantised).values())
    assert share < held / full < share * 1.15  # the scales


def test_what_is_not_served_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="quantization is 'int3'; use one of none, int8, int8_dynamic, int4"):
        EngineConfig(quantization="int3")  # type: ignore[arg-type]
    odd = make_qwen2_5_vl(tmp_path / "odd", intermediate_size=80)
    with pytest.raises(ModelNotSupported, match="'int4' does not serve this model: a matrix of 80 inputs"):
        make_engine(odd, quantization="int4")
    config = json.loads((odd / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "bits": 8}
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantised by 'fp8', a layout that is not read; .* take the original"):
        make_engine(odd)
    with pytest.raises(CheckpointError, match="quantised by 'fp8'"):
        check_model(odd, EngineConfig())


def test_rounded_activations_are_refused_on_processors_that_cannot_add_them_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_qwen2_5_vl(tmp_path)
    monkeypatch.setattr(quantised_matrix, "sums_bytes_exactly", lambda: False)
    with pytest.raises(ModelNotSupported, match=r"'int8_dynamic' does not serve this model: .* no VNNI.*; use 'int8'"):
        make_engine(folder, quantization="int8_dynamic")
