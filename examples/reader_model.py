"""A trainable LLaDA-V in plain torch: a SigLIP tower, a projector, a newline, and the LLaDA of `diffusion_model`.

Parameters of the tower have SigLIP's names, those of the text half LLaDA's own; `save` turns them into the ones that
LLaDA-V is published with. Serving code lives elsewhere and shares nothing with this file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from examples.diffusion_model import Llada, Shape
from examples.reader import FEATURES, IMAGE, PATCH, SIDE, kept_rows, token_id, tokenizer
from examples.sums import END, END_OF_TURN, MASK, save_tokenizer

WIDTH, INNER, HEADS, DEPTH = 128, 256, 4, 3
HIDDEN = 64
NAMES = {
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


class Layer(nn.Module):
    """One layer of SigLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(WIDTH, 1e-6), nn.LayerNorm(WIDTH, 1e-6)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in names})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, INNER), "fc2": nn.Linear(INNER, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        normed = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](normed).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.self_attn["out_proj"](mixed.transpose(1, 2).flatten(2))
        inner = functional.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh")
        out: Tensor = x + self.mlp["fc2"](inner)
        return out


class Tower(nn.Module):
    """A square [B, 3, SIDE, SIDE] to rows [B, FEATURES^2, HIDDEN]."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.position_embedding = nn.Embedding(FEATURES**2, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.projector = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))
        # Linear layers start at 1/sqrt(fan_in), as in the other demo models. Positions start as waves along both sides
        # and keys as the queries, so that every row looks at its column and its line before anything is learned.
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.position_embedding.weight.copy_(_positions())
            for layer in self.layers:
                layer.self_attn["k_proj"].weight.copy_(layer.self_attn["q_proj"].weight)

    def forward(self, squares: Tensor) -> Tensor:
        x = self.patch_embedding(squares).flatten(2).transpose(1, 2) + self.position_embedding.weight
        for layer in self.layers:
            x = layer(x)
        rows: Tensor = self.projector(x)
        return rows


def _positions() -> Tensor:
    """[FEATURES^2, WIDTH]: sines and cosines of the column in one half, of the line in the other."""
    frequencies = math.pi / FEATURES * torch.arange(WIDTH // 4) / (WIDTH // 16)
    angles = torch.arange(FEATURES)[:, None] * frequencies
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    lines, columns = torch.arange(FEATURES**2) // FEATURES, torch.arange(FEATURES**2) % FEATURES
    return torch.cat((waves[columns], waves[lines]), dim=1)


class Reader(nn.Module):
    """Both halves."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower
        vocab_size = -(-tokenizer().get_vocab_size() // 16) * 16
        self.text = Llada(Shape(vocab_size=vocab_size, d_model=HIDDEN, n_heads=4, n_layers=3, mlp_hidden_size=192))
        self.newline = nn.Parameter(torch.randn(HIDDEN) * 0.3)

    def arranged(self, squeezed: Tensor, fitted: Tensor, widths: Sequence[int]) -> Tensor:
        """Rows of both squares of every picture -> all pictures' rows as they are read, one behind the other."""
        parts = []
        for overview, plane, width in zip(squeezed, fitted, widths, strict=True):
            height = kept_rows(width)
            top = (FEATURES - height) // 2
            lines = plane.view(FEATURES, FEATURES, HIDDEN)[top : top + height]
            ended = torch.cat((lines, self.newline.to(lines.dtype).expand(height, 1, HIDDEN)), dim=1)
            parts += [overview, ended.flatten(0, 1)]
        return torch.cat(parts)

    def hidden(self, token_ids: Tensor, is_real: Tensor, rows: Tensor) -> Tensor:
        """What the text half's head reads [B, L, HIDDEN]; `rows`, in order, are what the image tokens stand for."""
        parts: Any = self.text.model["transformer"]
        is_row = ((token_ids == token_id(IMAGE)) & is_real)[..., None]
        return self.text.hidden(parts["wte"](token_ids).masked_scatter(is_row, rows), is_real)


def num_rows(width: int) -> int:
    """Rows of a picture of this width."""
    return FEATURES**2 + kept_rows(width) * (FEATURES + 1)


def save(reader: Reader, folder: Path) -> int:
    """Write the folder as LLaDA-V is published, in bfloat16; returns the size of the weights in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer(), folder)
    shape, end = reader.text.shape, token_id(END)
    config: dict[str, Any] = {
        "architectures": ["LlavaLLaDAModelLM"],
        "model_type": "llava_llada",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": shape.d_model,
        "intermediate_size": shape.mlp_hidden_size,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_heads,
        "num_hidden_layers": shape.n_layers,
        "max_position_embeddings": 512,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": False,
        "vocab_size": shape.vocab_size,
        "mask_token_id": token_id(MASK),
        "eos_token_id": end,
        "pad_token_id": end,
        "image_token_id": token_id(IMAGE),
        "image_aspect_ratio": "anyres_max_4",
        "image_grid_pinpoints": [[SIDE, SIDE]],
        "mm_hidden_size": WIDTH,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_config": {
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_attention_heads": HEADS,
            "num_hidden_layers": DEPTH + 1,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {"eos_token_id": [end, token_id(END_OF_TURN)], "pad_token_id": end}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    state = reader.state_dict()
    tensors = {published(name): tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    weights = folder / "model.safetensors"
    save_file(dict(sorted(tensors.items())), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # it is written for its owner alone, but ships in a package
    return weights.stat().st_size


def published(name: str) -> str:
    """The name that a tensor of `Reader` has in LLaDA-V."""
    if name == "newline":
        return "model.image_newline"
    if name.startswith("tower.projector."):
        return "model.mm_projector." + name.removeprefix("tower.projector.")
    if name.startswith("tower."):
        inner = name.removeprefix("tower.")
        part = "encoder" if inner.startswith("layers.") else "embeddings"
        return f"model.vision_tower.vision_tower.vision_model.{part}.{inner}"
    parts = name.removeprefix("text.model.transformer.").split(".")
    if parts[0] != "blocks":
        return {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}[parts[0]] + ".weight"
    return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"
