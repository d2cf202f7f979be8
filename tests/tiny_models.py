"""Random tiny checkpoints in the published Hugging Face layout, and the reference model and inputs for them.

`make_qwen2_5_vl` writes a whole model folder (config, weights, tokenizer, processor) without using transformers;
`reference` and `reference_inputs` load the same folder with transformers. Linear weights have standard deviation
`1/sqrt(fan_in)`, so that logits spread over several units and greedy tokens vary with the prompt and the image.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.tiny_tokenizer import NUM_TOKENS, TOKEN_IDS, save_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TinyQwen25VL:
    """Every knob of a tiny Qwen2.5-VL checkpoint. `attention_bias=False` writes zero biases (the format has them)."""

    seed: int = 0
    hidden_size: int = 64
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    num_hidden_layers: int = 2
    intermediate_size: int = 96
    vocab_size: int = NUM_TOKENS + 10
    max_position_embeddings: int = 8192
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    vision_depth: int = 3
    vision_hidden_size: int = 32
    vision_num_heads: int = 2
    vision_intermediate_size: int = 48
    patch_size: int = 14
    window_size: int = 56
    fullatt_block_indexes: tuple[int, ...] = (1,)
    min_pixels: int = 28 * 28
    max_pixels: int = 28 * 28 * 64
    size_style: str = "pixels"  # "pixels": min_pixels/max_pixels; "size": {"shortest_edge", "longest_edge"}
    layout: str = "published"  # "published": visual.*, model.layers.*; "nested": model.visual.*, model.language_model.*
    num_shards: int = 1
    torch_dtype: str = "float32"


QWEN2_5_VL_CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4, "tie_word_embeddings": True},
    {"num_key_value_heads": 1, "attention_bias": False},
    {"num_hidden_layers": 1, "vision_depth": 1, "fullatt_block_indexes": (0,)},
    {"num_hidden_layers": 3, "vision_depth": 4, "fullatt_block_indexes": (1, 3), "window_size": 112},
    {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "vision_num_heads": 4},
    {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
    {"fullatt_block_indexes": (), "window_size": 84},
    {"fullatt_block_indexes": (0, 1, 2)},
    {"window_size": 28, "vision_depth": 2},
    {"window_size": 140, "vision_hidden_size": 48, "vision_num_heads": 3},
    {"rope_theta": 10_000.0, "rms_norm_eps": 1e-5, "size_style": "size"},
    {"vision_hidden_size": 64, "vision_num_heads": 2, "vision_intermediate_size": 51, "layout": "nested"},
    {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4},
    {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 77},
    {"num_shards": 3, "tie_word_embeddings": True, "attention_bias": False},
    {"num_shards": 4, "layout": "nested", "num_hidden_layers": 3},
    {"vision_depth": 5, "fullatt_block_indexes": (2, 4), "window_size": 112, "min_pixels": 56 * 56},
    {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "vision_hidden_size": 40},
    {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vision_num_heads": 8},
    {"max_pixels": 28 * 28 * 16, "window_size": 84, "fullatt_block_indexes": (2,)},
    {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": NUM_TOKENS, "layout": "nested"},
)


def make_qwen2_5_vl(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a random checkpoint with the fields of `TinyQwen25VL` overridden; returns `folder`."""
    tiny = TinyQwen25VL(seed=seed, **overrides)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_config(tiny), indent=2), encoding="utf-8")
    (folder / "preprocessor_config.json").write_text(json.dumps(_preprocessor(tiny), indent=2), encoding="utf-8")
    generation = {
        "bos_token_id": TOKEN_IDS["<|endoftext|>"],
        "do_sample": False,
        "eos_token_id": [TOKEN_IDS["<|im_end|>"], TOKEN_IDS["<|endoftext|>"]],
        "pad_token_id": TOKEN_IDS["<|endoftext|>"],
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
    save_tokenizer(folder)
    dtype = getattr(torch, tiny.torch_dtype)
    tensors = {_rename(name, tiny.layout): tensor.to(dtype) for name, tensor in _weights(tiny)}
    _save_shards(folder, tensors, tiny.num_shards)
    return folder


def _config(tiny: TinyQwen25VL) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": TOKEN_IDS["<|endoftext|>"],
        "eos_token_id": TOKEN_IDS["<|im_end|>"],
        "vision_start_token_id": TOKEN_IDS["<|vision_start|>"],
        "vision_end_token_id": TOKEN_IDS["<|vision_end|>"],
        "vision_token_id": TOKEN_IDS["<|vision_pad|>"],
        "image_token_id": TOKEN_IDS["<|image_pad|>"],
        "video_token_id": TOKEN_IDS["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": tiny.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": tiny.intermediate_size,
        "max_position_embeddings": tiny.max_position_embeddings,
        "max_window_layers": tiny.num_hidden_layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": tiny.num_attention_heads,
        "num_hidden_layers": tiny.num_hidden_layers,
        "num_key_value_heads": tiny.num_key_value_heads,
        "rms_norm_eps": tiny.rms_norm_eps,
        "rope_theta": tiny.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": mrope_section(tiny)},
        "sliding_window": 32768,
        "tie_word_embeddings": tiny.tie_word_embeddings,
        "torch_dtype": tiny.torch_dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": tiny.vocab_size,
        "vision_config": {
            "depth": tiny.vision_depth,
            "fullatt_block_indexes": list(tiny.fullatt_block_indexes),
            "hidden_act": "silu",
            "hidden_size": tiny.vision_hidden_size,
            "in_chans": 3,
            "intermediate_size": tiny.vision_intermediate_size,
            "model_type": "qwen2_5_vl",
            "num_heads": tiny.vision_num_heads,
            "out_hidden_size": tiny.hidden_size,
            "patch_size": tiny.patch_size,
            "spatial_merge_size": 2,
            "spatial_patch_size": tiny.patch_size,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": tiny.window_size,
        },
    }


def mrope_section(tiny: TinyQwen25VL) -> list[int]:
    """Three sections that share half a head, split 2:3:3 as the published [16, 24, 24]."""
    half = tiny.hidden_size // tiny.num_attention_heads // 2
    temporal = max(1, half // 4)
    height = (half - temporal + 1) // 2
    return [temporal, height, half - temporal - height]


def _preprocessor(tiny: TinyQwen25VL) -> dict[str, Any]:
    config: dict[str, Any] = {
        "patch_size": tiny.patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    if tiny.size_style == "pixels":
        return {"min_pixels": tiny.min_pixels, "max_pixels": tiny.max_pixels, **config}
    return {"size": {"shortest_edge": tiny.min_pixels, "longest_edge": tiny.max_pixels}, **config}


def _rename(name: str, layout: str) -> str:
    if layout == "published":
        return name
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1)


def _weights(tiny: TinyQwen25VL) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(tiny.seed)
    yield from _vision_weights(tiny, generator)
    yield from _text_weights(tiny, generator)


def _matrix(generator: torch.Generator, rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))


def _vector(generator: torch.Generator, size: int, mean: float = 0.0, std: float = 0.1) -> torch.Tensor:
    return mean + std * torch.randn(size, generator=generator)


def _linear(
    generator: torch.Generator, name: str, rows: int, columns: int, bias: bool = True
) -> Iterator[tuple[str, torch.Tensor]]:
    yield f"{name}.weight", _matrix(generator, rows, columns)
    if bias:
        yield f"{name}.bias", _vector(generator, rows)


def _vision_weights(tiny: TinyQwen25VL, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    width, inner = tiny.vision_hidden_size, tiny.vision_intermediate_size
    patch = _matrix(generator, width, 3 * 2 * tiny.patch_size**2)
    yield "visual.patch_embed.proj.weight", patch.view(width, 3, 2, tiny.patch_size, tiny.patch_size)
    for i in range(tiny.vision_depth):
        block = f"visual.blocks.{i}"
        yield f"{block}.norm1.weight", _vector(generator, width, mean=1.0)
        yield f"{block}.norm2.weight", _vector(generator, width, mean=1.0)
        yield from _linear(generator, f"{block}.attn.qkv", 3 * width, width)
        yield from _linear(generator, f"{block}.attn.proj", width, width)
        yield from _linear(generator, f"{block}.mlp.gate_proj", inner, width)
        yield from _linear(generator, f"{block}.mlp.up_proj", inner, width)
        yield from _linear(generator, f"{block}.mlp.down_proj", width, inner)
    yield "visual.merger.ln_q.weight", _vector(generator, width, mean=1.0)
    yield from _linear(generator, "visual.merger.mlp.0", 4 * width, 4 * width)
    yield from _linear(generator, "visual.merger.mlp.2", tiny.hidden_size, 4 * width)


def _vocabulary(generator: torch.Generator, tiny: TinyQwen25VL, gain: float) -> torch.Tensor:
    """A row per token id. Rows beyond the tokenizer's are zero, as if never trained: transformers would choose them."""
    rows = _matrix(generator, tiny.vocab_size, tiny.hidden_size, gain)
    rows[NUM_TOKENS:] = 0
    return rows


def _text_weights(tiny: TinyQwen25VL, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    width, inner = tiny.hidden_size, tiny.intermediate_size
    head = width // tiny.num_attention_heads
    kv_width = head * tiny.num_key_value_heads
    # A tied matrix is both: kept small, else the last input token would win every time; the final norm scales it up.
    tied = tiny.tie_word_embeddings
    yield "model.embed_tokens.weight", _vocabulary(generator, tiny, gain=0.5 if tied else 2.0)
    for i in range(tiny.num_hidden_layers):
        layer = f"model.layers.{i}"
        for name, rows in (("q", width), ("k", kv_width), ("v", kv_width)):
            yield f"{layer}.self_attn.{name}_proj.weight", _matrix(generator, rows, width)
            bias = _vector(generator, rows)
            yield f"{layer}.self_attn.{name}_proj.bias", bias if tiny.attention_bias else torch.zeros(rows)
        yield f"{layer}.self_attn.o_proj.weight", _matrix(generator, width, width)
        yield f"{layer}.mlp.gate_proj.weight", _matrix(generator, inner, width)
        yield f"{layer}.mlp.up_proj.weight", _matrix(generator, inner, width)
        yield f"{layer}.mlp.down_proj.weight", _matrix(generator, width, inner)
        yield f"{layer}.input_layernorm.weight", _vector(generator, width, mean=1.0)
        yield f"{layer}.post_attention_layernorm.weight", _vector(generator, width, mean=1.0)
    yield "model.norm.weight", _vector(generator, width, mean=4.0 if tied else 1.0)
    if not tied:
        yield "lm_head.weight", _vocabulary(generator, tiny, gain=2.0)


def _save_shards(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> None:
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    random.Random(num_shards).shuffle(names)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[shard::num_shards]
        save_file({name: tensors[name] for name in part}, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def random_image(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """An RGB image with structure at several scales (smooth waves plus noise), so that features differ by place."""
    rng = np.random.default_rng((seed, width, height))
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    channels = []
    for _ in range(3):
        fx, fy, phase = rng.uniform((0.02, 0.02, 0.0), (0.4, 0.4, 6.28))
        channels.append(127 + 80 * np.sin(fx * x + fy * y + phase) + rng.normal(0, 25, (height, width)))
    return Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8), "RGB")


def reference(folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own model on `folder`, in eval mode; every checkpoint key must be known to it and none missing."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
    )
    problems = {key: value for key, value in info.items() if value}
    assert not problems, f"transformers does not read {folder}: {problems}"
    return model.eval()


def reference_processor(folder: Path) -> Any:
    """transformers' PIL image processor with the settings of `folder`."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil.from_pretrained(folder)


def reference_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer for `folder`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def reference_inputs(folder: Path, pieces: Sequence[str | Image.Image]) -> dict[str, torch.Tensor]:
    """Model inputs of one prompt of text and images, in order, each image in its vision start and end tokens.

    Returns input_ids [1, T], attention_mask [1, T], mm_token_type_ids [1, T] and, with images, pixel_values
    [patches, 1176] float32 and image_grid_thw [images, 3].
    """
    processor = reference_processor(folder)
    inputs: dict[str, torch.Tensor] = {}
    images = [piece for piece in pieces if not isinstance(piece, str)]
    counts: Iterator[int] = iter(())
    if images:
        features = processor(images=images, return_tensors="pt")
        inputs |= {"pixel_values": features["pixel_values"], "image_grid_thw": features["image_grid_thw"]}
        counts = iter((features["image_grid_thw"].prod(-1) // processor.merge_size**2).tolist())
    text = "".join(
        piece if isinstance(piece, str) else f"<|vision_start|>{'<|image_pad|>' * next(counts)}<|vision_end|>"
        for piece in pieces
    )
    ids = reference_tokenizer(folder)(text, return_tensors="pt")["input_ids"]
    inputs["input_ids"] = ids
    inputs["attention_mask"] = torch.ones_like(ids)
    inputs["mm_token_type_ids"] = (ids == TOKEN_IDS["<|image_pad|>"]).to(torch.int32)
    return inputs
