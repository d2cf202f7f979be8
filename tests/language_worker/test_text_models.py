"""Text decoders, dense and with experts, against transformers on random tiny checkpoints.

Logits, greedy tokens, rotary scaling.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from language_worker.errors import InvalidRequest, ModelNotSupported
from language_worker.models import REGISTRY, resolve_model
from language_worker.models.rope import Rope
from tests.language_worker.helpers import GREEDY, drive, make_engine, prompt, request
from tests.tiny_text_models import make_text_model, text_reference
from tests.tiny_tokenizer import NUM_TOKENS

TOLERANCE = 1e-4
SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True, "num_key_value_heads": 4},
    {"num_key_value_heads": 1, "num_hidden_layers": 3, "rope_theta": 1_000_000.0},
    {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 77},
    {"rms_norm_eps": 1e-5, "vocab_size": NUM_TOKENS, "num_hidden_layers": 1},
    {"head_dim": 24, "num_attention_heads": 2},
    {"attention_bias": True, "hidden_size": 96, "num_attention_heads": 6},
]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 4096},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "yarn": {"rope_scaling": YARN, "max_position_embeddings": 256},
    "yarn, given factors": {"rope_scaling": {**YARN, "attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2}},
    "yarn, mscale": {"rope_scaling": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5}},
    "parameters": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 50_000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 2.0, "original_max_position_embeddings": 32,
        },
    },
}  # fmt: skip
CASES = [(family, shape) for family in ("llama", "qwen2", "qwen3") for shape in SHAPES]
CASES += [
    ("mixtral", {}),
    ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 1, "num_hidden_layers": 3}),
    ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 3, "tie_word_embeddings": True}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"norm_topk_prob": True, "num_experts_per_tok": 1, "decoder_sparse_step": 2}),
    ("qwen2_moe", {"mlp_only_layers": [0, 2], "num_hidden_layers": 3, "num_experts": 16, "num_experts_per_tok": 4}),
    ("dots1", {}),
    ("dots1", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    ("dots1", {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4, "first_k_dense_replace": 0}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": False, "num_experts": 12, "num_experts_per_tok": 8, "head_dim": 24}),
    ("qwen3_moe", {"mlp_only_layers": [1], "tie_word_embeddings": True, "num_experts_per_tok": 1}),
]
CASES += [(family, scaling) for scaling in SCALINGS.values() for family in ("llama", "qwen3")]


def _reference(folder: Path, ids: tuple[int, ...], num_new: int) -> tuple[torch.Tensor, list[int]]:
    model = text_reference(folder)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    with torch.no_grad():
        logits = model(**inputs).logits[0]
        model.generation_config.eos_token_id = None
        padding = list(range(NUM_TOKENS, logits.shape[1])) or None  # ids that stand for no token
        out = model.generate(**inputs, max_new_tokens=num_new, do_sample=False, suppress_tokens=padding)
    return logits, out[0, len(ids) :].tolist()


@pytest.mark.parametrize("index", range(len(CASES)))
def test_logits_and_greedy_tokens_equal_transformers(index: int, tmp_path: Path) -> None:
    family, overrides = CASES[index]
    folder = make_text_model(tmp_path, family, seed=index, **overrides)
    ids = prompt(100, seed=index, vocab=NUM_TOKENS)
    logits, tokens = _reference(folder, ids, 12)
    engine = make_engine(folder, max_prefill_chunk=(0, 7, 64)[index % 3], max_model_len=200)
    result = drive(engine, [request("a", ids, GREEDY, return_logits=True)])["a"]
    assert result.error is None
    difference = (result.logits - logits).abs().max().item()
    assert difference < TOLERANCE, f"logits differ by {difference}"
    assert result.tokens() == tokens


def test_dynamic_scaling_beyond_the_trained_length(tmp_path: Path) -> None:
    """Fixed by the longest length that is served: equal to the reference for a prompt of that length."""
    scaling = {"rope_type": "dynamic", "factor": 3.0}
    folder = make_text_model(tmp_path, "llama", rope_scaling=scaling, max_position_embeddings=40)
    ids = prompt(90, vocab=NUM_TOKENS)
    logits, _ = _reference(folder, ids, 1)
    result = drive(make_engine(folder, max_model_len=91), [request("a", ids, GREEDY, return_logits=True)])["a"]
    assert (result.logits - logits).abs().max().item() < TOLERANCE
    short = ids[:30]
    logits, _ = _reference(folder, short, 1)
    result = drive(make_engine(folder, max_model_len=41), [request("a", short, GREEDY, return_logits=True)])["a"]
    assert (result.logits - logits).abs().max().item() < TOLERANCE


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn"])
def test_scaling_changes_the_logits(kind: str, tmp_path: Path) -> None:
    """The comparison above has power: without the scaling it would fail."""
    plain = make_text_model(tmp_path / "plain", "llama")
    change = SCALINGS[kind] | ({"max_position_embeddings": 60} if kind == "dynamic" else {})
    scaled = make_text_model(tmp_path / "scaled", "llama", **change)
    asked = [request("a", prompt(100, vocab=NUM_TOKENS), GREEDY, return_logits=True)]
    first, second = (drive(make_engine(f, max_model_len=101), asked)["a"].logits for f in (plain, scaled))
    assert (first - second).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("scaling", "configured", "expected"),
    [
        ({}, 4096, 4096),
        ({"rope_type": "linear", "factor": 2.0}, 4096, 8192),
        ({"rope_type": "dynamic", "factor": 2.0}, 4096, 8192),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 32768, 131072),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072, 131072),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4,
          "original_max_position_embeddings": 8192}, 131072, 131072),
    ],
)  # fmt: skip
def test_the_longest_sequence_follows_from_the_scaling(scaling: dict, configured: int, expected: int) -> None:
    rope = Rope.read({"rope_scaling": scaling, "max_position_embeddings": configured}, 1e4)
    assert rope.max_positions(configured) == expected


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_attention_heads": 5}, "multiple"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)
def test_unserved_options_are_refused_by_name(change: dict, word: str, tmp_path: Path) -> None:
    folder = make_text_model(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text()) | change
    with pytest.raises(ModelNotSupported, match=word):
        resolve_model(config).read_spec(config)


def test_every_row_of_the_registry_resolves() -> None:
    for name in REGISTRY:
        assert resolve_model({"architectures": [name]}).__name__ in REGISTRY[name]


def test_text_models_refuse_media(tmp_path: Path) -> None:
    engine = make_engine(make_text_model(tmp_path, "qwen3"))
    result = drive(engine, [request("a", (1, 2), num_media=1), request("b", (1, 2))])
    assert isinstance(result["a"].error, InvalidRequest) and result["b"].done is not None


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bfloat16_checkpoints_are_served_as_they_are(family: str, tmp_path: Path) -> None:
    engine = make_engine(make_text_model(tmp_path, family, torch_dtype="bfloat16"), dtype="auto")
    assert engine.dtype == torch.bfloat16
    assert len(drive(engine, [request("a", prompt(9))])["a"].tokens()) == 12


def test_forks_prefix_hits_and_drafts_change_nothing(tmp_path: Path) -> None:
    folder = make_text_model(tmp_path, "qwen3")
    sampling = dataclasses.replace(GREEDY, temperature=0.7, seed=1, n=3)
    asked = [request(f"r{i}", (*prompt(40, vocab=300), *prompt(3, seed=i)), sampling) for i in range(4)]
    plain = drive(make_engine(folder, prefix_cache=False, max_num_seqs=1), asked)
    engine = make_engine(folder, page_size=4, decode_strategy="speculative")
    for one in asked:
        result = drive(engine, [one])[one.request_id]
        assert [result.tokens(i) for i in range(3)] == [plain[one.request_id].tokens(i) for i in range(3)]
    assert engine.stats()["prefix_cache_hits_total"] == 3 * 40
