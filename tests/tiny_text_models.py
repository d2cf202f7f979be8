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

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
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
    """Write a random checkpoint of "llama", "qwen2" or "qwen3" with fields of its config.json overridden."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**DEFAULTS, **overrides, "architectures": [ARCHITECTURES[family]], "model_type": family}
    config |= {"bos_token_id": TOKEN_IDS["<|endoftext|>"], "eos_token_id": TOKEN_IDS["<|im_end|>"]}
    if family == "qwen3":  # its format names the size of a head
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if family == "qwen2":
        del config["attention_bias"]  # the format has none: query, key and value always have a bias
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_tokenizer(folder)
    dtype = getattr(torch, config["torch_dtype"])
    tensors = {name: tensor.to(dtype) for name, tensor in _weights(family, config, seed)}
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


def _weights(family: str, config: dict[str, Any], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))

    def vector(size: int, mean: float = 0.0) -> torch.Tensor:
        return mean + 0.2 * torch.randn(size, generator=generator)

    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    sizes = {"q": config["num_attention_heads"] * head} | dict.fromkeys("kv", config["num_key_value_heads"] * head)
    tied, has_bias = config["tie_word_embeddings"], config.get("attention_bias", False)
    yield "model.embed_tokens.weight", matrix(vocab, width, gain=0.5 if tied else 2.0)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, rows in sizes.items():
            yield f"{layer}.self_attn.{name}_proj.weight", matrix(rows, width)
            if has_bias or family == "qwen2":
                yield f"{layer}.self_attn.{name}_proj.bias", vector(rows)
        yield f"{layer}.self_attn.o_proj.weight", matrix(width, sizes["q"])
        if has_bias:
            yield f"{layer}.self_attn.o_proj.bias", vector(width)
        if family == "qwen3":
            yield f"{layer}.self_attn.q_norm.weight", vector(head, mean=1.0)
            yield f"{layer}.self_attn.k_norm.weight", vector(head, mean=1.0)
        yield f"{layer}.mlp.gate_proj.weight", matrix(inner, width)
        yield f"{layer}.mlp.up_proj.weight", matrix(inner, width)
        yield f"{layer}.mlp.down_proj.weight", matrix(width, inner)
        yield f"{layer}.input_layernorm.weight", vector(width, mean=1.0)
        yield f"{layer}.post_attention_layernorm.weight", vector(width, mean=1.0)
    yield "model.norm.weight", vector(width, mean=4.0 if tied else 1.0)
    if not tied:
        yield "lm_head.weight", matrix(vocab, width, gain=2.0)
