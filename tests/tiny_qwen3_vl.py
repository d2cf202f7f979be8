"""Random tiny Qwen3-VL checkpoints in the published layout, and the reference model for them.

Written without transformers, like those of `tiny_models.py`, whose inputs, images and tokenizer serve here too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny_text_models import text_weights
from tests.tiny_tokenizer import NUM_TOKENS, TOKEN_IDS, save_tokenizer

TEXT: dict[str, Any] = {
    "model_type": "qwen3_vl_text",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "vocab_size": NUM_TOKENS,
    "max_position_embeddings": 8192,
    "rope_theta": 5_000_000.0,
    "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]},
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": TOKEN_IDS["<|endoftext|>"],
    "eos_token_id": TOKEN_IDS["<|im_end|>"],
}
VISION: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 2],
}
QWEN3_VL_CONFIGS: tuple[dict[str, dict[str, Any]], ...] = (
    {},
    {"text": {"tie_word_embeddings": True, "num_key_value_heads": 4}},
    {"vision": {"deepstack_visual_indexes": [1, 2, 3], "num_position_embeddings": 49}},
    {"vision": {"deepstack_visual_indexes": [2, 1]}, "text": {"num_hidden_layers": 2}},
    {"vision": {"deepstack_visual_indexes": []}},
    {"text": {"head_dim": 32, "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5]}}},
    {"text": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 4}},
    {"vision": {"hidden_size": 48, "num_heads": 3, "depth": 2, "deepstack_visual_indexes": [0]}},
    {"vision": {"patch_size": 8, "num_position_embeddings": 4}, "text": {"rope_theta": 10_000.0}},
    {"vision": {"num_heads": 4, "depth": 6, "deepstack_visual_indexes": [1, 3, 5], "num_position_embeddings": 256}},
)


def make_qwen3_vl(
    folder: Path, *, seed: int = 0, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None
) -> Path:
    """Write a random checkpoint with fields of its two configs overridden; returns `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text_config = {**TEXT, **(text or {})}
    vision_config = {**VISION, **(vision or {}), "out_hidden_size": text_config["hidden_size"]}
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": TOKEN_IDS["<|image_pad|>"],
        "video_token_id": TOKEN_IDS["<|video_pad|>"],
        "vision_start_token_id": TOKEN_IDS["<|vision_start|>"],
        "vision_end_token_id": TOKEN_IDS["<|vision_end|>"],
        "tie_word_embeddings": text_config["tie_word_embeddings"],
        "text_config": text_config,
        "vision_config": vision_config,
    }
    preprocessor = {
        "size": {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 64},
        "patch_size": vision_config["patch_size"],
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2), encoding="utf-8")
    save_tokenizer(folder)
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in text_weights("qwen3", text_config, seed)
    }
    tensors |= dict(_vision_weights(vision_config, seed))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _vision_weights(vision: dict[str, Any], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed + 1000)
    width, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged, out = 4 * width, vision["out_hidden_size"]

    def linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"model.visual.{name}.weight", torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
        yield f"model.visual.{name}.bias", 0.1 * torch.randn(rows, generator=generator)

    def norm(name: str, size: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"model.visual.{name}.weight", 1 + 0.1 * torch.randn(size, generator=generator)
        yield f"model.visual.{name}.bias", 0.1 * torch.randn(size, generator=generator)

    (name, weight), bias = linear("patch_embed.proj", width, 3 * 2 * patch**2)
    yield name, weight.view(width, 3, 2, patch, patch)
    yield bias
    yield "model.visual.pos_embed.weight", torch.randn(vision["num_position_embeddings"], width, generator=generator)
    for i in range(vision["depth"]):
        yield from norm(f"blocks.{i}.norm1", width)
        yield from norm(f"blocks.{i}.norm2", width)
        yield from linear(f"blocks.{i}.attn.qkv", 3 * width, width)
        yield from linear(f"blocks.{i}.attn.proj", width, width)
        yield from linear(f"blocks.{i}.mlp.linear_fc1", inner, width)
        yield from linear(f"blocks.{i}.mlp.linear_fc2", width, inner)
    deep = [f"deepstack_merger_list.{i}" for i in range(len(vision["deepstack_visual_indexes"]))]
    for merger, normed in (("merger", width), *((name, merged) for name in deep)):
        yield from norm(f"{merger}.norm", normed)
        yield from linear(f"{merger}.linear_fc1", merged, merged)
        yield from linear(f"{merger}.linear_fc2", out, merged)


def qwen3_vl_reference(folder: Path) -> Any:
    """transformers' own model on `folder`, in eval mode; every checkpoint key must be known to it and none missing."""
    from transformers import Qwen3VLForConditionalGeneration
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model, info = Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    problems = {key: value for key, value in info.items() if value}
    assert not problems, f"transformers does not read {folder}: {problems}"
    return model.eval()
