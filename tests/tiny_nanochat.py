"""Random tiny nanochat checkpoints in both layouts, and a plain restatement of every generation to judge them by.

The restatement is dense float64 torch, one position's keys at a time where that matters, straight from the description
of each generation: no pages, no chunks, no code of the engine.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny_tokenizer import NUM_TOKENS, TOKEN_IDS, save_tokenizer

HF_DEFAULTS: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "vocab_size": NUM_TOKENS + 10,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 15.0,
    "hidden_act": "relu2",
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
}


def make_hf_nanochat(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A random generation-0 checkpoint as transformers publishes it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**HF_DEFAULTS, **overrides, "architectures": ["NanoChatForCausalLM"], "model_type": "nanochat"}
    config |= {"bos_token_id": TOKEN_IDS["<|endoftext|>"], "eos_token_id": TOKEN_IDS["<|im_end|>"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_tokenizer(folder)
    matrix = _matrices(seed)
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    rows, kv_rows = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    tensors = {"model.embed_tokens.weight": matrix(vocab, width), "lm_head.weight": matrix(vocab, width, gain=8.0)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, size in (("q", rows), ("k", kv_rows), ("v", kv_rows)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = matrix(size, width)
        tensors[f"{layer}.self_attn.o_proj.weight"] = matrix(width, rows)
        tensors[f"{layer}.mlp.fc1.weight"] = matrix(inner, width)
        tensors[f"{layer}.mlp.fc2.weight"] = matrix(width, inner)
    dtype = getattr(torch, config["torch_dtype"])
    save_file(
        {name: t.to(dtype) for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


def _matrices(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))

    return matrix
