"""Checkpoints stored quantised (GPTQ, AWQ, ...): logits and tokens of transformers on the numbers they stand for."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.stored_matrix import StoredMatrix
from language_worker.config import EngineConfig
from language_worker.engine import Engine
from language_worker.engine_builder import check_model
from language_worker.errors import ModelNotSupported
from language_worker.models.decoder import Decoder
from tests.language_worker.helpers import GREEDY, drive, make_engine, prompt, request
from tests.quantised_layouts import LANGUAGE, Scheme, quantise_folder
from tests.tiny_llada import make_llada
from tests.tiny_models import make_qwen2_5_vl, reference, reference_inputs
from tests.tiny_nanochat import make_hf_nanochat
from tests.tiny_qwen3_vl import make_qwen3_vl
from tests.tiny_text_models import make_text_model, text_reference
from tests.tiny_tokenizer import NUM_TOKENS
from transfer.checkpoint import CheckpointError

TOLERANCE = 1e-4
IDS = prompt(60, seed=4, vocab=NUM_TOKENS)
WORDS = -(-NUM_TOKENS // 8) * 8  # a vocabulary of whole words
AWQ, GPTQ = Scheme(method="awq", sym=False), Scheme()
SCHEMES: list[tuple[str, Scheme, dict[str, Any]]] = [
    ("qwen2", AWQ, {}),
    ("llama", Scheme(method="awq", sym=False, group_size=64), {"intermediate_size": 128, "attention_bias": True}),
    ("qwen3", Scheme(method="awq", sym=False, group_size=-1), {"tie_word_embeddings": True}),
    ("llama", GPTQ, {}),
    ("qwen2", Scheme(sym=False, low_zeros=False), {"num_key_value_heads": 4}),
    ("qwen2", Scheme(sym=False, desc_act=True), {}),
    ("llama", Scheme(desc_act=True, group_size=64), {"intermediate_size": 128}),  # groups are cut, inputs reordered
    ("llama", Scheme(desc_act=True, group_size=48), {"intermediate_size": 144}),  # which cannot be cut: widened
    ("qwen2", Scheme(group_size=-1), {"hidden_size": 128}),
    ("llama", Scheme(bits=8), {}),
    ("qwen2", Scheme(bits=8, sym=False, desc_act=True, low_zeros=False), {}),
    ("llama", Scheme(bits=8, group_size=-1), {"tie_word_embeddings": True}),
    ("qwen2", Scheme(method="compressed-tensors"), {}),
    ("llama", Scheme(method="compressed-tensors", sym=False, desc_act=True), {"attention_bias": True}),
]


def _reference(folder: Path, num_new: int = 12) -> tuple[torch.Tensor, list[int]]:
    model = text_reference(folder)
    inputs = {"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, len(IDS), dtype=torch.int64)}
    with torch.no_grad():
        logits = model(**inputs).logits[0]
        model.generation_config.eos_token_id = None
        padding = list(range(NUM_TOKENS, logits.shape[1])) or None
        out = model.generate(**inputs, max_new_tokens=num_new, do_sample=False, suppress_tokens=padding)
    return logits, out[0, len(IDS) :].tolist()


def _run(engine: Engine, ids: tuple[int, ...] = IDS) -> tuple[torch.Tensor, list[int]]:
    result = drive(engine, [request("a", ids, GREEDY, return_logits=True)])["a"]
    assert result.error is None and result.logits is not None
    return result.logits, result.tokens()


def _assert_same(engine: Engine, exact: Path) -> None:
    logits, tokens = _run(engine)
    expected, expected_tokens = _reference(exact)
    assert (logits - expected).abs().max() < TOLERANCE
    assert tokens == expected_tokens


def _kept(engine: Engine) -> dict[str, StoredMatrix]:
    model = engine.runner.model
    assert isinstance(model, Decoder)
    return {name: weight for name, weight in model.parameters().items() if isinstance(weight, StoredMatrix)}


@pytest.mark.parametrize("index", range(len(SCHEMES)))
def test_logits_and_greedy_tokens_equal_transformers(
    index: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family, scheme, overrides = SCHEMES[index]
    plain = make_text_model(tmp_path / "plain", family, seed=index, **overrides)
    stored, exact = quantise_folder(plain, tmp_path, scheme)
    with caplog.at_level(logging.INFO):
        engine = make_engine(stored, max_prefill_chunk=(0, 7)[index % 2])
    num_kept = 0 if scheme.group_size == 48 else 7 * 2
    assert f"{num_kept} are kept as they are stored, {14 - num_kept} widened to torch.float32" in caplog.text
    assert len(_kept(engine)) == (8 if num_kept else 0)
    assert check_model(stored, EngineConfig()) == check_model(exact, EngineConfig())
    _assert_same(engine, exact)


def test_qwen2_5_vl_equals_transformers(tmp_path: Path) -> None:
    plain = make_qwen2_5_vl(tmp_path / "plain", seed=3)
    stored, exact = quantise_folder(plain, tmp_path, AWQ, section={"modules_to_not_convert": ["visual"]})
    inputs = reference_inputs(exact, ["<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"])
    with torch.no_grad():
        expected = reference(exact)(**inputs).logits[0]
    engine = make_engine(stored)
    assert len(_kept(engine)) == 8
    logits, _ = _run(engine, tuple(inputs["input_ids"][0].tolist()))
    assert (logits - expected).abs().max() < TOLERANCE


def test_the_numbers_are_not_those_of_the_weights_before(tmp_path: Path) -> None:
    """The comparisons above have power."""
    plain = make_text_model(tmp_path / "plain", "llama")
    _, exact = quantise_folder(plain, tmp_path, GPTQ)
    assert (_reference(plain)[0] - _reference(exact)[0]).abs().max() > 100 * TOLERANCE


MIXED: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "the head too": ("llama", LANGUAGE + r"|lm_head\.weight", 9, {"vocab_size": WORDS}),
    "not the first layer": ("llama", LANGUAGE.replace(r"\d+", "[1-9]"), 4, {}),
    "not one part of a fused matrix": ("qwen2", LANGUAGE.replace("_proj", "(?<!k)_proj"), 6, {}),
    "experts": ("mixtral", r".*layers\.\d+\..*(?:_proj|w[123])\.weight", 4, {}),
    "experts and shared ones": ("qwen2_moe", LANGUAGE, 7, {"decoder_sparse_step": 2}),
}


@pytest.mark.parametrize("case", MIXED)
def test_some_matrices_may_be_quantised_and_others_not(case: str, tmp_path: Path) -> None:
    family, names, num_kept, overrides = MIXED[case]
    plain = make_text_model(tmp_path / "plain", family, **overrides)
    stored, exact = quantise_folder(plain, tmp_path, GPTQ, names=names)
    engine = make_engine(stored)
    assert len(_kept(engine)) == num_kept
    _assert_same(engine, exact)


OTHERS: dict[str, tuple[Callable[[Path], Any], str, int]] = {
    "own names, a bidirectional model": (make_llada, r"model\.transformer\.blocks\..*\.weight", 6),
    "nested names, deepstack": (make_qwen3_vl, LANGUAGE, 12),
    "no decoder of the usual form": (make_hf_nanochat, r"model\.layers\..*\.weight", 0),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_families_are_as_with_the_numbers_in_full(case: str, tmp_path: Path) -> None:
    make, names, num_kept = OTHERS[case]
    stored, exact = quantise_folder(make(tmp_path / "plain"), tmp_path, AWQ, names=names)
    engines = [make_engine(folder) for folder in (stored, exact)]
    kept = [name for name, weight in engines[0].runner.model.parameters().items() if isinstance(weight, StoredMatrix)]
    assert len(kept) == num_kept
    has_logits = num_kept != 6  # what fills in masks has none of the prompt
    asked = [request("a", prompt(40, vocab=250), return_logits=has_logits)]
    results = [drive(engine, asked)["a"] for engine in engines]
    assert results[0].error is None and results[0].tokens() == results[1].tokens() != []
    if has_logits:
        assert (results[0].logits - results[1].logits).abs().max() < TOLERANCE


def _biases(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """Of every quantised matrix, as some writers add them; not zero in one MLP."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".scales")]:
            tensors[name.removesuffix("scales") + "bias"] = torch.zeros(tensors[name].shape[1], dtype=torch.float16)
        tensors["model.layers.1.mlp.up_proj.bias"][3] = value

    return change


def test_biases_of_zeros_that_the_model_has_not_are_nothing(tmp_path: Path) -> None:
    plain = make_text_model(tmp_path / "plain", "llama")
    stored, exact = quantise_folder(plain, tmp_path, GPTQ, change=_biases(0.0))
    _assert_same(make_engine(stored), exact)
    wrong, _ = quantise_folder(plain, tmp_path / "wrong", GPTQ, change=_biases(0.5))
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.bias is not zero, and the MLP has no b"
    ):
        make_engine(wrong)


@pytest.mark.parametrize("scheme", [AWQ, Scheme(desc_act=True), Scheme(bits=8)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_near(dtype: str, scheme: Scheme, tmp_path: Path) -> None:
    plain = make_text_model(tmp_path / "plain", "qwen2", torch_dtype="float16")
    stored, exact = quantise_folder(plain, tmp_path, scheme)
    logits, _ = _run(make_engine(stored, dtype=dtype))
    expected, _ = _reference(exact)
    assert (logits.float() - expected).norm() / expected.norm() < (0.05 if dtype == "bfloat16" else 0.01)


def test_a_checkpoint_is_served_in_its_own_dtype(tmp_path: Path) -> None:
    """Not in that of its words, which are most of its numbers, where config.json does not say."""
    stored, _ = quantise_folder(make_text_model(tmp_path / "plain", "llama"), tmp_path, GPTQ)
    config = json.loads((stored / "config.json").read_text())
    del config["torch_dtype"]
    (stored / "config.json").write_text(json.dumps(config))
    assert make_engine(stored, dtype="auto").dtype == torch.float16


def test_an_override_tells_what_config_json_does_not(tmp_path: Path) -> None:
    """As of older folders, which have a quantize_config.json beside it."""
    stored, exact = quantise_folder(make_text_model(tmp_path / "plain", "llama"), tmp_path, GPTQ)
    config = json.loads((stored / "config.json").read_text())
    section = config.pop("quantization_config")
    (stored / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.0\.mlp\.down_proj\.qweight"):
        make_engine(stored)
    _assert_same(make_engine(stored, config_overrides={"quantization_config": section}), exact)


def test_it_takes_a_quarter_of_the_bytes(tmp_path: Path) -> None:
    plain = make_text_model(tmp_path / "plain", "llama", hidden_size=128, intermediate_size=256)
    stored, _ = quantise_folder(plain, tmp_path, Scheme(group_size=128))
    kept = _kept(make_engine(stored, dtype="bfloat16"))
    half = sum(2 * weight.shape[0] * weight.shape[1] for weight in kept.values())
    assert 0.25 < sum(weight.num_bytes for weight in kept.values()) / half < 0.28


def test_it_serves_as_a_draft_model_and_with_one(tmp_path: Path) -> None:
    plain = make_text_model(tmp_path / "plain", "llama")
    stored, _ = quantise_folder(plain, tmp_path, GPTQ)
    _, expected = _run(make_engine(stored))
    engine = make_engine(stored, draft_model=str(stored))
    assert _run(engine)[1] == expected
    stats = engine.stats()
    assert stats["spec_decode_num_draft_tokens_total"] == stats["spec_decode_num_accepted_tokens_total"] > 0


def test_only_equal_numbers_exchange_keys_and_values(tmp_path: Path) -> None:
    plain = make_text_model(tmp_path / "plain", "llama")
    stored, exact = quantise_folder(plain, tmp_path, GPTQ)
    other, _ = quantise_folder(plain, tmp_path / "other", Scheme(bits=8))
    kinds = [make_engine(folder).kv_of for folder in (stored, exact, other)]
    assert len({*kinds}) == 3 and make_engine(stored).kv_of == kinds[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_invariant_steps(dtype: str, tmp_path: Path) -> None:
    plain = make_text_model(tmp_path / "plain", "qwen2")
    stored, _ = quantise_folder(plain, tmp_path, Scheme(sym=False, desc_act=True))
    asked = [request(f"r{i}", prompt(20 + 9 * i, seed=i), return_logits=True) for i in range(3)]
    engine = make_engine(stored, batch_invariant=True, prefix_cache=False, dtype=dtype)
    together = drive(engine, asked)
    for one in asked:
        alone = drive(engine, [one])
        assert torch.equal(alone[one.request_id].logits, together[one.request_id].logits)


def test_an_adapter_is_merged_into_what_the_numbers_stand_for(tmp_path: Path) -> None:
    plain = make_text_model(tmp_path / "plain", "llama")
    stored, exact = quantise_folder(plain, tmp_path, GPTQ)
    tensors = load_file(exact / "model.safetensors")
    generator = torch.Generator().manual_seed(7)
    sides, adapter = {}, stored / "adapter"
    for name in [name for name in tensors if re.search(r"\.(?:v|down)_proj\.", name)]:
        out, inputs = tensors[name].shape
        pair = torch.randn(4, inputs, generator=generator) / 8, torch.randn(out, 4, generator=generator) / 4
        for side, matrix in zip("AB", pair, strict=True):
            sides[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"] = matrix
        tensors[name] = tensors[name] + 2 * pair[1] @ pair[0]
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    save_file(sides, adapter / "adapter_model.safetensors")
    save_file(tensors, exact / "model.safetensors", metadata={"format": "pt"})
    engine = make_engine(stored, lora=str(adapter))
    assert len(_kept(engine)) == 4, "o and gate_up: the others were changed"
    _assert_same(engine, exact)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_what_is_stored_quantised_is_not_quantised_again(method: str, tmp_path: Path) -> None:
    stored, _ = quantise_folder(make_text_model(tmp_path / "plain", "llama"), tmp_path, GPTQ)
    message = f"quantization is '{method}', and the checkpoint's weights are stored quantised; set it to 'none'"
    with pytest.raises(ModelNotSupported, match=message):
        make_engine(stored, quantization=method)
    with pytest.raises(ModelNotSupported, match=message):
        check_model(stored, EngineConfig(quantization=method))  # type: ignore[arg-type]


ODD: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no zeros": (
        lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.qzeros"),
        r"missing: model\.layers\.1\.mlp\.down_proj\.qzeros \(of gptq\)",
    ),
    "a matrix too many": (
        lambda tensors: tensors.update(
            {name.replace("o_proj", "x_proj"): tensor.clone() for name, tensor in tensors.items() if "o_proj" in name}
        ),
        r"unexpected: model\.layers\.0\.self_attn\.x_proj\.weight",
    ),
    "another width": (
        lambda tensors: tensors.update(
            {
                "model.layers.0.self_attn.o_proj.qweight": torch.zeros(4, 64).int(),
                "model.layers.0.self_attn.o_proj.g_idx": torch.zeros(32).int(),
                "model.layers.0.self_attn.o_proj.scales": torch.zeros(1, 64).half(),
                "model.layers.0.self_attn.o_proj.qzeros": torch.zeros(1, 8).int(),
            }
        ),
        r"wrong shape: model\.layers\.0\.self_attn\.o_proj\.weight is \(64, 32\), .* wants \(64, 64\)",
    ),
    "scales of other groups": (
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.scales": torch.ones(4, 64).half()}),
        r"wrong shape: model\.layers\.0\.self_attn\.q_proj\.scales is \(4, 64\); gptq wants \(2, 64\)",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_what_does_not_fit_is_named(case: str, tmp_path: Path) -> None:
    change, message = ODD[case]
    stored, _ = quantise_folder(make_text_model(tmp_path / "plain", "llama"), tmp_path, GPTQ, change=change)
    for load in (make_engine, lambda folder: check_model(folder, EngineConfig())):
        with pytest.raises(CheckpointError, match=message):
            load(stored)
