"""The shipped diffusion model: a LLaDA in plain torch with the published tensor names, so that `state_dict()` is saved.

Written as published folders look; readers of one need to know nothing about this code, and serving shares none of it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from examples.sums import END, END_OF_TURN, MASK, save_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes, as config.json has them."""

    vocab_size: int
    d_model: int = 64
    n_heads: int = 4
    n_layers: int = 4
    mlp_hidden_size: int = 192
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, inner = shape.d_model, shape.mlp_hidden_size
        self.num_heads, eps = shape.n_heads, shape.rms_norm_eps
        self.attn_norm, self.ff_norm = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.ff_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.ff_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        normed = self.attn_norm(x)
        q, k, v = (
            proj(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(_rotated(q, cos, sin), _rotated(k, cos, sin), v, attn_mask=mask)
        x = x + self.attn_out(mixed.transpose(1, 2).flatten(2))
        normed = self.ff_norm(x)
        out: Tensor = x + self.ff_out(functional.silu(self.ff_proj(normed)) * self.up_proj(normed))
        return out


class Llada(nn.Module):
    """Attention looks both ways; logits at a position are for that position."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        parts = {
            "wte": nn.Embedding(shape.vocab_size, shape.d_model),
            "blocks": nn.ModuleList(Block(shape) for _ in range(shape.n_layers)),
            "ln_f": nn.RMSNorm(shape.d_model, shape.rms_norm_eps),
            "ff_out": nn.Linear(shape.d_model, shape.vocab_size, bias=False),
        }
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))

    def forward(self, token_ids: Tensor, is_real: Tensor) -> Tensor:
        """token_ids, is_real [B, L] -> logits [B, L, V]; nobody looks at what is not real."""
        return self.logits(self.hidden(self.model["transformer"]["wte"](token_ids), is_real))

    def hidden(self, x: Tensor, is_real: Tensor) -> Tensor:
        """Embeddings [B, L, width] to what the head reads."""
        parts: Any = self.model["transformer"]
        head = self.shape.d_model // self.shape.n_heads
        frequencies = self.shape.rope_theta ** (-torch.arange(0, head, 2) / head)
        angles = (torch.arange(x.shape[1])[:, None] * frequencies).repeat(1, 2)
        for block in parts["blocks"]:
            x = block(x, angles.cos(), angles.sin(), is_real[:, None, None])
        normed: Tensor = parts["ln_f"](x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model["transformer"]["ff_out"](hidden)
        return logits


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def save(model: Llada, tokenizer: Tokenizer, folder: Path) -> int:
    """Write the folder as published ones look; returns the size of the weights in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    end = tokenizer.token_to_id(END)
    (folder / "config.json").write_text(json.dumps(_config(model.shape, tokenizer), indent=2) + "\n", encoding="utf-8")
    generation = {"eos_token_id": [end, tokenizer.token_to_id(END_OF_TURN)], "pad_token_id": end}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in sorted(model.state_dict().items())}
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # it is written for its owner alone, but ships in a package
    return weights.stat().st_size


def round_to_saved(model: Llada) -> None:
    """Give the weights in memory the values that the file holds."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())


def _config(shape: Shape, tokenizer: Tokenizer) -> dict[str, Any]:
    end = tokenizer.token_to_id(END)
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "activation_type": "silu",
        "alibi": False,
        "attention_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": shape.d_model,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_heads,
        "n_layers": shape.n_layers,
        "mlp_hidden_size": shape.mlp_hidden_size,
        "mlp_ratio": shape.mlp_hidden_size // shape.d_model,
        "vocab_size": shape.vocab_size,
        "embedding_size": shape.vocab_size,
        "max_sequence_length": 512,
        "rope": True,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.rms_norm_eps,
        "layer_norm_type": "rms",
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": False,
        "scale_logits": False,
        "input_emb_norm": False,
        "mask_token_id": tokenizer.token_to_id(MASK),
        "eos_token_id": end,
        "pad_token_id": end,
        "torch_dtype": "bfloat16",
    }
