"""Random tiny MiniMind-V checkpoints and the reference answer for them: current ("siglip"), of April 2026 ("naflex")
and first ("clip").

The reference is put together from transformers' parts: the vision encoder, a plain projector, and the language model
fed with embeddings in which every image's rows stand where it stood.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from tests.tiny_minimind import minimind_config, minimind_reference, minimind_weights
from tests.tiny_tokenizer import NUM_TOKENS, TOKEN_IDS, save_tokenizer

IMAGE_ID = TOKEN_IDS["<|image_pad|>"]
PADDING_ID = TOKEN_IDS["<|endoftext|>"]
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 64, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6, "num_channels": 3,
}  # fmt: skip
CLIP = {
    **SIGLIP, "model_type": "clip_vision_model", "image_size": 56, "patch_size": 8, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}  # fmt: skip
NAFLEX = {**SIGLIP, "model_type": "siglip2_vision_model", "num_patches": 25, "patch_size": 8}
del NAFLEX["image_size"]
ENCODERS = {"siglip": SIGLIP, "naflex": NAFLEX, "clip": CLIP}
NAFLEX_ROWS, MERGED = 16, 4  # rows of an image of any shape, and features that one is made of; 64 and 4 as published
PREPROCESSORS: dict[str, dict[str, Any]] = {
    "siglip": {
        "do_convert_rgb": None, "do_resize": True, "size": {"height": 64, "width": 64}, "resample": 2,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "image_processor_type": "SiglipImageProcessor",
    },
    "naflex": {
        "do_convert_rgb": None, "do_resize": True, "resample": 2, "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5], "patch_size": 8, "max_num_patches": NAFLEX_ROWS * MERGED,
        "image_processor_type": "Siglip2ImageProcessor",
    },
    "clip": {
        "do_center_crop": True, "crop_size": {"height": 56, "width": 56}, "size": {"shortest_edge": 56}, "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "CLIPImageProcessor",
    },
}  # fmt: skip
FOLDERS = {
    "siglip": "siglip2-base-p32-256-ve", "naflex": "siglip2-base-p16-ve", "clip": "vision_model/clip-vit-base-patch16",
}  # fmt: skip
MARKS = {"siglip": IMAGE_ID, "naflex": IMAGE_ID, "clip": PADDING_ID}  # what stands for an image in a prompt


def make_minimind_v(
    folder: Path,
    kind: str,
    *,
    variant: str = "3",
    layout: str = "pth",
    seed: int = 0,
    own_encoder: bool = False,
    as_published: bool = False,
    sizes: Mapping[str, int] = MappingProxyType({}),
    **overrides: Any,
) -> dict[str, Any]:
    """Write a checkpoint of a kind in layout "pth" or "bin"; returns all that the reference needs. as_published: of
    "naflex", with as many rows and patches, so that nothing says how many. sizes: other ones of the encoder's."""
    folder = Path(folder)
    encoder_folder = folder / FOLDERS[kind]
    encoder_folder.mkdir(parents=True)
    encoder_config, preprocessor = {**ENCODERS[kind], **sizes}, {**PREPROCESSORS[kind]}
    if kind == "naflex":
        preprocessor["patch_size"] = encoder_config["patch_size"]
    if as_published:
        encoder_config["patch_size"] = 16
        del preprocessor["max_num_patches"], preprocessor["patch_size"], encoder_config["num_patches"]
    (encoder_folder / "config.json").write_text(json.dumps(encoder_config), encoding="utf-8")
    (encoder_folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    encoder = _encoder(kind, encoder_config, seed)
    stored = {f"vision_model.{name}": tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    if kind != "clip":
        stored["vision_model.head.probe"] = torch.zeros(1, 1, 32)  # the pooling head, of which nothing is used
    save_file(stored, encoder_folder / "model.safetensors")
    marks = [34] * 49 if kind == "clip" else [IMAGE_ID]
    config = minimind_config(variant, model_type="minimind-v", architectures=["MiniMindVLM"], **overrides)
    rows = {} if kind != "naflex" or as_published else {"image_token_len": NAFLEX_ROWS}
    config |= {"image_ids": marks, "pad_token_id": PADDING_ID, **rows}
    projector = _projector(kind, config["hidden_size"], seed)
    tensors = minimind_weights(variant, config, seed)
    tensors |= {f"vision_proj.{name}": tensor for name, tensor in projector.items()}
    if own_encoder:
        tensors |= {name.replace("vision_model.", "vision_encoder.vision_model."): t for name, t in stored.items()}
    save_tokenizer(folder)
    if layout == "bin":
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    else:  # this tokenizer's placeholder is another than the project's
        beside = {"pad_token_id": PADDING_ID} if kind == "clip" else {"image_ids": marks, **rows}
        (folder / "config.json").write_text(json.dumps(beside), encoding="utf-8")
    torch.save(tensors, folder / ("pytorch_model.bin" if layout == "bin" else f"sft_vlm_{config['hidden_size']}.pth"))
    return {
        "kind": kind,
        "variant": variant,
        "seed": seed,
        "config": config,
        "encoder": encoder,
        "preprocessor": preprocessor,
        "projector": projector,
    }


def _encoder(kind: str, config: dict[str, Any], seed: int) -> Any:
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        Siglip2VisionConfig,
        Siglip2VisionModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    plain = {name: value for name, value in config.items() if name != "model_type"}
    torch.manual_seed(seed)
    if kind == "siglip":
        made: Any = SiglipVisionModel(SiglipVisionConfig(**plain, vision_use_head=False))
    elif kind == "naflex":
        made = Siglip2VisionModel(Siglip2VisionConfig(**plain, vision_use_head=False))
    else:
        made = CLIPVisionModel(CLIPVisionConfig(**plain))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(base + torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.1))
    return made.eval()


def _projector(kind: str, hidden_size: int, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed + 1)
    if kind == "clip":
        return {"vision_proj.0.weight": torch.randn(hidden_size, 32), "vision_proj.0.bias": torch.randn(hidden_size)}
    if kind == "naflex":
        return {
            "mlp.0.weight": torch.randn(hidden_size, 32 * MERGED) / 8,
            "mlp.0.bias": torch.randn(hidden_size),
            "mlp.2.weight": torch.randn(hidden_size, hidden_size) / 4,
            "mlp.2.bias": torch.randn(hidden_size),
        }
    return {
        "mlp.0.weight": 1 + 0.1 * torch.randn(32),
        "mlp.0.bias": 0.1 * torch.randn(32),
        "mlp.1.weight": torch.randn(hidden_size, 32) / 5,
        "mlp.1.bias": torch.randn(hidden_size),
        "mlp.3.weight": torch.randn(hidden_size, hidden_size) / 4,
        "mlp.3.bias": torch.randn(hidden_size),
    }


def image_rows(made: dict[str, Any], images: Sequence[Image.Image]) -> torch.Tensor:
    """[images, rows, hidden] by the reference's preprocessing and encoder."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    kind, projector = made["kind"], made["projector"]
    settings = {name: value for name, value in made["preprocessor"].items() if value is not None}
    processors = {"siglip": SiglipImageProcessorPil, "naflex": Siglip2ImageProcessorPil, "clip": CLIPImageProcessorPil}
    with torch.no_grad():
        features = made["encoder"](**processors[kind](**settings)(images=list(images), return_tensors="pt"))[0]
    if kind == "naflex":
        merged = features.reshape(len(images), -1, 32 * MERGED)
        inner = torch.nn.functional.gelu(merged @ projector["mlp.0.weight"].T + projector["mlp.0.bias"])
        return inner @ projector["mlp.2.weight"].T + projector["mlp.2.bias"]
    if kind == "clip":
        return features[:, 1:] @ projector["vision_proj.0.weight"].T + projector["vision_proj.0.bias"]
    normed = torch.nn.functional.layer_norm(features, (32,), projector["mlp.0.weight"], projector["mlp.0.bias"])
    inner = torch.nn.functional.gelu(normed @ projector["mlp.1.weight"].T + projector["mlp.1.bias"])
    return inner @ projector["mlp.3.weight"].T + projector["mlp.3.bias"]


def reference_answer(
    made: dict[str, Any], token_ids: Sequence[int], images: Sequence[Image.Image], placeholder: int, num_new: int
) -> tuple[torch.Tensor, list[int]]:
    """(logits of every position, greedy tokens) of a prompt with one placeholder for each image."""
    model = minimind_reference(made["variant"], made["config"], made["seed"])
    rows = iter(image_rows(made, images)) if images else iter(())
    table = model.get_input_embeddings().weight
    parts = [next(rows) if token == placeholder else table[token][None] for token in token_ids]
    embedded = torch.cat(parts)[None].detach()
    logits, tokens = None, []
    with torch.no_grad():
        for _ in range(num_new):
            found = model(inputs_embeds=embedded).logits[0]
            logits = found if logits is None else logits
            tokens.append(int(found[-1, :NUM_TOKENS].argmax()))
            embedded = torch.cat((embedded, table[tokens[-1]][None, None]), dim=1)
    assert logits is not None
    return logits, tokens
