"""Random tiny LLaDA checkpoints in both published layouts. Made without transformers; knows nothing of decoding."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from examples.sums import build_tokenizer, save_tokenizer

TOKENIZER = build_tokenizer()
MASK_ID, END_ID, TURN_ID = (TOKENIZER.token_to_id(t) for t in ("<|mdm_mask|>", "<|endoftext|>", "<|eot_id|>"))
NUM_TOKENS = TOKENIZER.get_vocab_size()
CONFIG: dict[str, Any] = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "activation_type": "silu",
    "alibi": False,
    "block_type": "llama",
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 48,
    "vocab_size": NUM_TOKENS + 10,
    "embedding_size": NUM_TOKENS + 10,
    "max_sequence_length": 512,
    "rope": True,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "layer_norm_type": "rms",
    "include_bias": False,
    "include_qkv_bias": False,
    "weight_tying": False,
    "mask_token_id": MASK_ID,
    "eos_token_id": END_ID,
    "pad_token_id": END_ID,
    "torch_dtype": "float32",
}
LLAMA_CONFIG = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
}
LLAMA_NAMES = {
    "attn_out": "self_attn.o_proj",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def make_llada(folder: Path, *, layout: str = "own", seed: int = 0, num_shards: int = 1, **overrides: Any) -> Path:
    """Write a random checkpoint; layout "own" or "llama". overrides: fields of config.json by their own names."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **overrides}
    tensors = dict(_weights(config, seed))
    if layout == "llama":
        tensors = {llama_name(name): tensor for name, tensor in tensors.items()}
        config = {LLAMA_CONFIG.get(name, name): value for name, value in config.items()}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_tokenizer(TOKENIZER, folder)
    save_shards(folder, tensors, num_shards, seed)
    return folder


def save_shards(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int, seed: int = 0) -> None:
    """One file, or several with the tensors dealt out at random."""
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    order = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(seed)).tolist()
    names = [list(tensors)[i] for i in order]
    weight_map = {name: f"model-{i % num_shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def llama_name(name: str) -> str:
    """Hugging Face's name of a tensor with LLaDA's own."""
    parts = name.removeprefix("model.transformer.").split(".")
    if parts[0] != "blocks":
        return {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}[parts[0]] + ".weight"
    return f"model.layers.{parts[1]}.{LLAMA_NAMES[parts[2]]}.weight"


def _weights(config: dict[str, Any], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))

    def norm(size: int) -> torch.Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    width, inner, vocab = config["d_model"], config["mlp_hidden_size"], config["embedding_size"]
    kv = width // config["n_heads"] * (config.get("n_kv_heads") or config["n_heads"])
    tied = config["weight_tying"]
    yield "model.transformer.wte.weight", matrix(vocab, width, gain=1.0 if tied else 2.0)
    yield "model.transformer.ln_f.weight", norm(width)
    if not tied:
        yield "model.transformer.ff_out.weight", matrix(vocab, width, gain=2.0)
    for i in range(config["n_layers"]):
        layer = f"model.transformer.blocks.{i}"
        for name, rows in (("q_proj", width), ("k_proj", kv), ("v_proj", kv), ("attn_out", width)):
            yield f"{layer}.{name}.weight", matrix(rows, width, gain=2.0)
        yield f"{layer}.ff_proj.weight", matrix(inner, width)
        yield f"{layer}.up_proj.weight", matrix(inner, width)
        yield f"{layer}.ff_out.weight", matrix(width, inner)
        yield f"{layer}.attn_norm.weight", norm(width)
        yield f"{layer}.ff_norm.weight", norm(width)
