"""Random tiny LLaDA-V checkpoints, and the reference for both halves of them or of any other.

The rows of an image are those of transformers' LLaVA-OneVision, whose tower, squares and newlines are the same: its
processor, its SigLIP, its projector and its packing. The tokens are those of the restated LLaDA loop, in whose table of
embeddings every image row stands as one more token.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from examples.sums import build_tokenizer, save_tokenizer
from tests.oracles_llada import LladaOracle
from tests.tiny_llada import CONFIG, LLAMA_CONFIG, LLAMA_NAMES, MASK_ID, NUM_TOKENS, llama_name, make_llada, save_shards

IMAGE_TOKEN = "<|reserved_token_0|>"
IMAGE_ID = NUM_TOKENS
UNSPOKEN = ("<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>")
TOWER = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 30, "patch_size": 7, "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6, "num_channels": 3,
}  # fmt: skip
SIDE = TOWER["image_size"]
PINPOINTS = [[x * SIDE, y * SIDE] for x in range(1, 4) for y in range(1, 5)]  # (width, height), as LLaVA writes them
MM_CONFIG: dict[str, Any] = {
    "architectures": ["LlavaLLaDAModelLM"],
    "model_type": "llava_llada",
    "image_aspect_ratio": "anyres_max_2",
    "image_grid_pinpoints": PINPOINTS,
    "image_token_id": IMAGE_ID,
    "mm_hidden_size": TOWER["hidden_size"],
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip2-so400m-patch14-384",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """A checkpoint and what the reference needs of it. text: the same text half under LLaDA's own names."""

    folder: Path
    text: Path
    vision: Any
    side: int = SIDE

    def never_ids(self) -> tuple[int, ...]:
        """What is not chosen, the mask first."""
        tokenizer = llada_v_tokenizer()
        padding = range(NUM_TOKENS + 1, CONFIG["embedding_size"])
        return (MASK_ID, *(tokenizer.token_to_id(token) for token in UNSPOKEN), *padding)

    def image_rows(self, images: Sequence[Image.Image]) -> list[torch.Tensor]:
        """[rows, hidden] of each image."""
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )

        config = json.loads((self.folder / "config.json").read_text())
        size = {"height": self.side, "width": self.side}
        processor = LlavaOnevisionImageProcessorPil(
            image_grid_pinpoints=[[height, width] for width, height in config["image_grid_pinpoints"]],
            size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3,
        )  # fmt: skip
        rows = []
        for image in images:  # one at a time: together they would be padded
            inputs = processor(images=[image], return_tensors="pt")
            with torch.no_grad():
                found = self.vision.get_image_features(
                    inputs["pixel_values"], inputs["image_sizes"], vision_feature_layer=-2,
                    vision_feature_select_strategy="full", vision_aspect_ratio=config["image_aspect_ratio"],
                )  # fmt: skip
            rows.append(found.pooler_output[0])
        return rows

    def oracle(
        self, token_ids: Sequence[int], images: Sequence[Image.Image], image_id: int = IMAGE_ID
    ) -> tuple[LladaOracle, list[int]]:
        """The text half that knows the images' rows as further tokens, and the prompt made of these."""
        oracle, rows = LladaOracle(self.text), iter(self.image_rows(images))
        table, prompt = [oracle.weights["model.transformer.wte.weight"]], []
        num_known = table[0].shape[0]
        for token_id in token_ids:
            if token_id != image_id:
                prompt.append(token_id)
                continue
            table.append(next(rows).to(oracle.dtype))
            prompt += range(num_known, num_known + len(table[-1]))
            num_known += len(table[-1])
        oracle.weights["model.transformer.wte.weight"] = torch.cat(table)
        return oracle, prompt


def llada_v_tokenizer() -> Any:
    """The text model's, with a reserved token."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    return tokenizer


def make_llada_v(folder: Path, *, seed: int = 0, own_tower: bool = True, num_shards: int = 1, **overrides: Any) -> Made:
    """Write a checkpoint as published, or with the whole tower in a folder of its own. overrides: of config.json."""
    text = make_llada(folder / "text-with-own-names", seed=seed)
    model = folder / "model"
    model.mkdir()
    save_tokenizer(llada_v_tokenizer(), model)
    config = {LLAMA_CONFIG.get(name, name): value for name, value in CONFIG.items()} | MM_CONFIG | overrides
    vision = _reference(seed, config["hidden_size"], TOWER, PINPOINTS)
    named = {llama_name(name): tensor for name, tensor in load_file(text / "model.safetensors").items()}
    for part, index in (("linear_1", 0), ("linear_2", 2)):
        linear = getattr(vision.multi_modal_projector, part)
        named |= {f"model.mm_projector.{index}.{n}": p.detach().clone() for n, p in linear.named_parameters()}
    named["model.image_newline"] = vision.image_newline.detach().clone()
    tower = {f"vision_model.{n}": p.detach().clone() for n, p in vision.vision_tower.named_parameters()}
    if own_tower:
        config["mm_vision_config"] = {name: value for name, value in TOWER.items() if name != "model_type"}
        named |= {f"model.vision_tower.vision_tower.{n}": p for n, p in tower.items() if ".layers.2." not in n}
    else:
        (model / "tower").mkdir()
        (model / "tower" / "config.json").write_text(json.dumps(TOWER), encoding="utf-8")
        save_file(tower | {"vision_model.head.probe": torch.zeros(1, 1, 32)}, model / "tower" / "model.safetensors")
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_shards(model, named, num_shards, seed)
    return Made(folder=model, text=text, vision=vision)


def read_llada_v(folder: Path, text: Path) -> Made:
    """The reference for a checkpoint that has its tower among its tensors; `text` becomes the text half's folder."""
    config = json.loads((folder / "config.json").read_text())
    stored = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    tower = config["mm_vision_config"]
    vision = _reference(0, config["hidden_size"], tower, config["image_grid_pinpoints"])
    unused = (f"encoder.layers.{tower['num_hidden_layers'] - 1}.", "post_layernorm.")
    with torch.no_grad():
        vision.image_newline.copy_(stored.pop("model.image_newline"))
        for part, index in (("linear_1", 0), ("linear_2", 2)):
            for name, parameter in getattr(vision.multi_modal_projector, part).named_parameters():
                parameter.copy_(stored.pop(f"model.mm_projector.{index}.{name}"))
        for name, parameter in vision.vision_tower.named_parameters():
            if not name.startswith(unused):
                parameter.copy_(stored.pop(f"model.vision_tower.vision_tower.vision_model.{name}"))
    own = {llama_name(f"model.transformer.{name}.weight"): name for name in ("wte", "ln_f", "ff_out")}
    for layer in range(config["num_hidden_layers"]):
        blocks = (f"blocks.{layer}.{part}" for part in LLAMA_NAMES)
        own |= {llama_name(f"model.transformer.{name}.weight"): name for name in blocks}
    text.mkdir(parents=True)
    save_file({f"model.transformer.{own[name]}.weight": t for name, t in stored.items()}, text / "model.safetensors")
    back = {llama: own_key for own_key, llama in LLAMA_CONFIG.items()}
    (text / "config.json").write_text(json.dumps({back.get(key, key): value for key, value in config.items()}))
    return Made(folder=folder, text=text, vision=vision, side=tower["image_size"])


def _reference(seed: int, hidden_size: int, tower: Mapping[str, Any], pinpoints: Sequence[Sequence[int]]) -> Any:
    from transformers import LlamaConfig, LlavaOnevisionConfig, SiglipVisionConfig
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    plain = {name: value for name, value in tower.items() if name != "model_type"}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**plain, vision_use_head=False),
        text_config=LlamaConfig(
            hidden_size=hidden_size, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8
        ),
        image_grid_pinpoints=[[height, width] for width, height in pinpoints],
    )
    torch.manual_seed(seed)
    made = LlavaOnevisionModel(config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            scale = 0.2 if "projector" in name else 0.15
            parameter.copy_(base + torch.randn_like(parameter) * (scale if parameter.dim() > 1 else 0.1))
    return made.eval()
