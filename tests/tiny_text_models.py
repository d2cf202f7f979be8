"""Random tiny checkpoints of the text-only families in the published Hugging Face layout, and their reference models.

Made without transformers, like those of `tiny_models.py`; weights are scaled so that greedy tokens vary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny_tokenizer import NUM_TOKENS, TOKEN_IDS, save_tokenizer

ARCHITECTURES = {
    "dots1": "Dots1ForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral": "MinistralForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
MIXTURES: dict[str, dict[str, Any]] = {
    "dots1": {
        "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 32,
        "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
        "first_k_dense_replace": 1, "sliding_window": None, "num_hidden_layers": 3,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 56, "norm_topk_prob": False, "use_sliding_window": False,
    },
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
}  # fmt: skip
GATED = ("gate_proj", "up_proj", "down_proj")
DEFAULTS: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "vocab_size": NUM_TOKENS + 10,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}


def make_text_model(folder: Path, family: str, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a random checkpoint of a family of ARCHITECTURES with fields of its config.json overridden."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **DEFAULTS,
        **MIXTURES.get(family, {}),
        **overrides,
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
    }
    config |= {"bos_token_id": TOKEN_IDS["<|endoftext|>"], "eos_token_id": TOKEN_IDS["<|im_end|>"]}
    if family.startswith(("qwen3", "dots1", "ministral")):  # its format names the size of a head
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if family.startswith("qwen2"):
        del config["attention_bias"]  # the format has none: query, key and value always have a bias
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_tokenizer(folder)
    dtype = getattr(torch, config["torch_dtype"])
    tensors = {name: tensor.to(dtype) for name, tensor in text_weights(family, config, seed)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def text_reference(folder: Path) -> Any:
    """transformers' own model on `folder`, in eval mode; every checkpoint key must be known to it and none missing."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    problems = {key: value for key, value in info.items() if value}
    assert not problems, f"transformers does not read {folder}: {problems}"
    return model.eval()


def text_weights(family: str, config: dict[str, Any], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The published tensors of a family of ARCHITECTURES, with the experts that `config` counts."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))

    def vector(size: int, mean: float = 0.0) -> torch.Tensor:
        return mean + 0.2 * torch.randn(size, generator=generator)

    width, vocab = config["hidden_size"], config["vocab_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    sizes = {"q": config["num_attention_heads"] * head} | dict.fromkeys("kv", config["num_key_value_heads"] * head)
    tied, has_bias = config["tie_word_embeddings"], config.get("attention_bias", False)
    yield "model.embed_tokens.weight", matrix(vocab, width, gain=0.5 if tied else 2.0)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, rows in sizes.items():
            yield f"{layer}.self_attn.{name}_proj.weight", matrix(rows, width)
            if has_bias or family.startswith("qwen2"):
                yield f"{layer}.self_attn.{name}_proj.bias", vector(rows)
        yield f"{layer}.self_attn.o_proj.weight", matrix(width, sizes["q"])
        if has_bias:
            yield f"{layer}.self_attn.o_proj.bias", vector(width)
        if family.startswith(("qwen3", "dots1")):
            yield f"{layer}.self_attn.q_norm.weight", vector(head, mean=1.0)
            yield f"{layer}.self_attn.k_norm.weight", vector(head, mean=1.0)
        for name, (rows, columns) in _mlp_shapes(family, config, i):
            yield f"{layer}.{name}.weight", matrix(rows, columns, gain=2.0 if name.endswith("gate") else 1.0)
            if family == "dots1" and name == "mlp.gate":
                yield f"{layer}.{name}.e_score_correction_bias", vector(rows)
        yield f"{layer}.input_layernorm.weight", vector(width, mean=1.0)
        yield f"{layer}.post_attention_layernorm.weight", vector(width, mean=1.0)
    yield "model.norm.weight", vector(width, mean=4.0 if tied else 1.0)
    if not tied:
        yield "lm_head.weight", matrix(vocab, width, gain=2.0)


def _mlp_shapes(family: str, config: dict[str, Any], layer: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name without `.weight`, shape) of what follows attention in one layer."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    step, listed = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers", ())
    counts = ("num_local_experts", "num_experts", "n_routed_experts")
    num_experts = next((config[name] for name in counts if name in config), 0)
    if not num_experts or layer in listed or (layer + 1) % step or layer < config.get("first_k_dense_replace", 0):
        yield from _gated("mlp.", width, inner)
        return
    mixture = "block_sparse_moe" if family == "mixtral" else "mlp"
    yield f"{mixture}.gate", (num_experts, width)
    parts = ("w1", "w3", "w2") if family == "mixtral" else GATED
    for i in range(num_experts):
        yield from _gated(f"{mixture}.experts.{i}.", width, config.get("moe_intermediate_size", inner), parts)
    if family == "dots1":
        yield from _gated("mlp.shared_experts.", width, config["n_shared_experts"] * config["moe_intermediate_size"])
        return
    for i in range(config.get("n_shared_experts", 0)):
        yield from _gated(f"mlp.shared_experts.{i}.", width, inner)
    if family == "qwen2_moe":
        yield from _gated("mlp.shared_expert.", width, config["shared_expert_intermediate_size"])
        yield "mlp.shared_expert_gate", (1, width)


def _gated(
    prefix: str, width: int, inner: int, parts: tuple[str, ...] = GATED
) -> Iterator[tuple[str, tuple[int, int]]]:
    for part, shape in zip(parts, ((inner, width), (inner, width), (width, inner)), strict=True):
        yield prefix + part, shape
