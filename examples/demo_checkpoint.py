"""Writes the trained model as a Qwen2.5-VL folder exactly as published ones look.

Flat text fields in config.json, published tensor names, tied language head left out, bfloat16 weights. Readers
of the folder need to know nothing about this training code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from examples.augment import IMAGE_MEAN, IMAGE_STD
from examples.demo_tokenizer import save_tokenizer
from examples.train_model import TextShape, TinyQwen, VisionShape


def save_checkpoint(model: TinyQwen, tokenizer: Tokenizer, folder: Path) -> int:
    """Write every file of the folder and return the size of the weights in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    _write_json(folder / "config.json", _model_config(model.visual.shape, model.model.shape, tokenizer))
    _write_json(folder / "preprocessor_config.json", _preprocessor_config(model.visual.shape))
    _write_json(folder / "generation_config.json", _generation_config(tokenizer))
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in sorted(model.state_dict().items())}
    weights = folder / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # it is written for its owner alone, but ships in a package
    return weights.stat().st_size


def round_to_saved(model: TinyQwen) -> None:
    """Give the weights in memory the values that the file holds."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())


def _model_config(vision: VisionShape, text: TextShape, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": 4096,
        "max_window_layers": text.num_hidden_layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": _vision_config(vision, text.hidden_size),
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_section)},
        "vocab_size": text.vocab_size,
    }


def _vision_config(vision: VisionShape, out_size: int) -> dict[str, Any]:
    return {
        "depth": vision.depth,
        "hidden_act": "silu",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_heads": vision.num_heads,
        "in_chans": 3,
        "out_hidden_size": out_size,
        "patch_size": vision.patch_size,
        "spatial_merge_size": vision.spatial_merge_size,
        "spatial_patch_size": vision.patch_size,
        "window_size": vision.window_size,
        "fullatt_block_indexes": list(vision.fullatt_block_indexes),
        "tokens_per_second": 2,
        "temporal_patch_size": vision.temporal_patch_size,
    }


def _preprocessor_config(vision: VisionShape) -> dict[str, Any]:
    return {
        "min_pixels": 56 * 56,
        "max_pixels": 448 * 448,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    return {"bos_token_id": pad, "pad_token_id": pad, "do_sample": False, "eos_token_id": [end, pad]}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
