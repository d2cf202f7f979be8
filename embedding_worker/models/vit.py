"""A plain vision transformer over one square image: SigLIP's, or CLIP's with its class token.

    patches + positions -> layers of (norm, attention, norm, MLP) -> features of every patch

SigLIP's features are behind its last norm, or, for models that were made so, in front of it; CLIP has a norm in front,
and its features are those of the last layer, without the class token's. SigLIP 2 NaFlex has the same weights, and sees
images of any shape (`naflex.py`). Knows no model that it is a part of.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kernels.activation import gelu, gelu_sigmoid, gelu_tanh
from kernels.linear import linear
from kernels.norm import layer_norm
from kernels.varlen_attention import Segments, varlen_attention
from transfer.checkpoint import Checkpoint
from transfer.checkpoint_json import is_kind
from transfer.checkpoint_rules import Rule

IN_MINIMIND = r"(?:vision_encoder\.)?"  # before an encoder's names, where it is part of MiniMind-V's own file
ACTIVATIONS = {"gelu_pytorch_tanh": gelu_tanh, "quick_gelu": gelu_sigmoid, "gelu": gelu}
CLIP_DEFAULTS = {"patch_size": 32, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
SIGLIP_DEFAULTS = {"patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
KINDS = {  # of config.json -> what it is
    "siglip_vision_model": "siglip", "siglip": "siglip", "clip_vision_model": "clip", "clip": "clip",
    "siglip2_vision_model": "naflex", "siglip2": "naflex",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """The config.json of the encoder's folder. is_clip: with a class token, a norm in front, and none used behind.
    is_flexible: NaFlex, whose images have any shape; image_size is then of the square that its positions are for.
    has_last_norm: features are those behind it."""

    is_clip: bool
    is_flexible: bool
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    image_size: int
    patch_size: int
    eps: float
    activation: str
    has_last_norm: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> EncoderConfig:
        """Raises ValueError naming what is missing or unusable."""
        kind = config.get("model_type")
        if kind not in KINDS:
            raise ValueError(f"the vision encoder is {kind!r}; served are {', '.join(KINDS)}")
        is_clip, is_flexible = KINDS[kind] == "clip", KINDS[kind] == "naflex"
        vision = {**(CLIP_DEFAULTS if is_clip else SIGLIP_DEFAULTS), **(config.get("vision_config") or config)}
        if is_flexible:
            vision["image_size"] = _square_of_positions(vision)
        sizes = {
            "depth": "num_hidden_layers", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size",
            "num_heads": "num_attention_heads", "image_size": "image_size", "patch_size": "patch_size",
        }  # fmt: skip
        defaults = {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        values = {field: vision.get(name, defaults.get(name, 224)) for field, name in sizes.items()}
        if wrong := [name for field, name in sizes.items() if not is_kind(values[field], "size")]:
            raise ValueError(f"the vision encoder's config.json needs positive integers for {', '.join(wrong)}")
        if str(vision["hidden_act"]) not in ACTIVATIONS or vision.get("num_channels", 3) != 3:
            raise ValueError(
                f"the vision encoder has {vision.get('num_channels', 3)} channels and hidden_act "
                f"{vision['hidden_act']!r}; served are 3 and {', '.join(ACTIVATIONS)}"
            )
        if values["hidden_size"] % values["num_heads"] or values["image_size"] < values["patch_size"]:
            raise ValueError(f"the vision encoder's sizes do not fit each other: {values}")
        if not is_kind(vision["layer_norm_eps"], "amount"):
            raise ValueError(f"the vision encoder's layer_norm_eps is {vision['layer_norm_eps']!r}; a number is needed")
        return cls(
            is_clip=is_clip,
            is_flexible=is_flexible,
            has_last_norm=not is_clip,
            eps=float(vision["layer_norm_eps"]),
            activation=vision["hidden_act"],
            **values,
        )

    @property
    def side(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // self.patch_size

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2


def _square_of_positions(vision: Mapping[str, Any]) -> int:
    """Pixels along the square that NaFlex has one position for every patch of. Raises ValueError."""
    num_patches, patch_size = vision.get("num_patches", 256), vision["patch_size"]
    if (
        not (is_kind(num_patches, "size") and is_kind(patch_size, "size"))
        or math.isqrt(num_patches) ** 2 != num_patches
    ):
        raise ValueError(
            f"the vision encoder's config.json has num_patches {num_patches!r} and patch_size {patch_size!r}; a square "
            "number and a positive integer are needed"
        )
    return math.isqrt(num_patches) * int(patch_size)


def encoder_folders(folder: Path) -> list[Path]:
    """Folders within a model's folder that hold a vision encoder. Raises CheckpointError on an unreadable one."""
    places = sorted({*folder.glob("*/config.json"), *folder.glob("*/*/config.json")})
    opened = [Checkpoint(folder=path.parent, tensors={}) for path in places]
    return [checkpoint.folder for checkpoint in opened if checkpoint.config().get("model_type") in KINDS]


def unused_names(config: EncoderConfig, place: str = IN_MINIMIND) -> tuple[str, ...]:
    """Patterns of what published files hold besides, and features do not depend on."""
    prefix = place + r"(?:vision_model\.)?"
    both_halves = r"(?:text_model\..*|logit_scale|logit_bias|visual_projection\.weight|text_projection\.weight)"
    unused = (prefix + r"(?:head\..*|embeddings\.position_ids)", place + both_halves)
    return unused if config.has_last_norm else (*unused, prefix + r"post_layernorm\..*")


def encoder_rules(config: EncoderConfig, place: str = IN_MINIMIND) -> list[Rule]:
    """Where the encoder's published tensors go; `vision_model.` in front of them is optional. place: what else is."""
    prefix, width = place + r"(?:vision_model\.)?", config.hidden_size
    layer = prefix + r"encoder\.layers\.(\d+)\."
    rules = [
        Rule(
            pattern=prefix + r"embeddings\.patch_embedding\.weight",
            target="patch_embed.weight",
            transform=lambda weight: _by_channel(weight, config) if config.is_flexible else weight.flatten(1),
        ),
        Rule(pattern=prefix + r"embeddings\.position_embedding\.weight", target="positions"),
        Rule(pattern=layer + r"layer_norm1\.(weight|bias)", target=r"layers.\1.norm1.\2"),
        Rule(pattern=layer + r"layer_norm2\.(weight|bias)", target=r"layers.\1.norm2.\2"),
        Rule(pattern=layer + r"self_attn\.out_proj\.(weight|bias)", target=r"layers.\1.out.\2"),
        Rule(pattern=layer + r"mlp\.(fc1|fc2)\.(weight|bias)", target=r"layers.\1.\2.\3"),
    ]
    for i, name in enumerate("qkv"):
        rows = (i * width, (i + 1) * width)
        rules.append(
            Rule(pattern=layer + rf"self_attn\.{name}_proj\.(weight|bias)", target=r"layers.\1.qkv.\2", rows=rows)
        )
    if config.is_clip:
        rules.append(Rule(pattern=prefix + r"embeddings\.class_embedding", target="class_token"))
        rules.append(Rule(pattern=prefix + r"pre_layrnorm\.(weight|bias)", target=r"first_norm.\1"))
    else:
        rules.append(Rule(pattern=prefix + r"embeddings\.patch_embedding\.bias", target="patch_embed.bias"))
    if config.has_last_norm:
        rules.append(Rule(pattern=prefix + r"post_layernorm\.(weight|bias)", target=r"last_norm.\1"))
    return rules


def _by_channel(weight: torch.Tensor, config: EncoderConfig) -> torch.Tensor:
    """NaFlex's weights of patches, stored pixel by pixel, with all numbers of a channel side by side."""
    return torch.unflatten(weight, 1, (config.patch_size, config.patch_size, 3)).permute(0, 3, 1, 2).flatten(1)


def encoder_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Every destination and its shape."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.weight": (width, config.patch_dim),
        "positions": (config.side**2 + config.is_clip, width),
    }
    shapes |= {"class_token": (width,)} if config.is_clip else {"patch_embed.bias": (width,)}
    norms = ["first_norm"] * config.is_clip + ["last_norm"] * config.has_last_norm
    for i in range(config.depth):
        norms += [f"layers.{i}.norm1", f"layers.{i}.norm2"]
        linears = {"qkv": (3 * width, width), "out": (width, width), "fc1": (inner, width), "fc2": (width, inner)}
        for name, shape in linears.items():
            shapes |= {f"layers.{i}.{name}.weight": shape, f"layers.{i}.{name}.bias": shape[:1]}
    return shapes | {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}


class Encoder:
    """The loaded transformer; weights by the names of `encoder_shapes`."""

    def __init__(self, config: EncoderConfig, weights: Mapping[str, torch.Tensor]) -> None:
        self.config = config
        self._weights = weights

    def features(self, patches: torch.Tensor) -> torch.Tensor:
        """patches [images * side^2, patch_dim] of any dtype and device -> features [images * side^2, hidden]."""
        config, weights, num_patches = self.config, self._weights, self.config.side**2
        stream = self._embedded(patches).view(-1, num_patches, config.hidden_size)
        num_images = stream.shape[0]
        if config.is_clip:
            stream = torch.cat((weights["class_token"].expand(num_images, 1, -1), stream), dim=1)
        stream = (stream + weights["positions"]).flatten(0, 1)
        if config.is_clip:
            stream = self._norm("first_norm", stream)
        behind = self._behind_layers(stream, Segments.from_lengths([num_patches + config.is_clip] * num_images))
        return behind.view(num_images, num_patches + 1, -1)[:, 1:].flatten(0, 1) if config.is_clip else behind

    def _embedded(self, patches: torch.Tensor) -> torch.Tensor:
        """patches [N, patch_dim] of any dtype and device -> [N, hidden], without positions."""
        embed = self._weights["patch_embed.weight"]
        return linear(patches.to(embed.device, embed.dtype), embed, self._weights.get("patch_embed.bias"))

    def _behind_layers(self, stream: torch.Tensor, segments: Segments) -> torch.Tensor:
        """Features of every token; `stream` [N, hidden] is overwritten."""
        for i in range(self.config.depth):
            self._layer(f"layers.{i}.", stream, segments)
        return self._norm("last_norm", stream) if self.config.has_last_norm else stream

    def _layer(self, name: str, stream: torch.Tensor, segments: Segments) -> None:
        """One layer, added into `stream` [N, width] in place."""
        config = self.config
        qkv = self._linear(name + "qkv", self._norm(name + "norm1", stream))
        query, key, value = qkv.view(-1, 3, config.num_heads, config.hidden_size // config.num_heads).unbind(1)
        stream.add_(self._linear(name + "out", varlen_attention(query, key, value, segments).flatten(1)))
        inner = self._linear(name + "fc1", self._norm(name + "norm2", stream))
        stream.add_(self._linear(name + "fc2", ACTIVATIONS[config.activation](inner)))

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self._weights[name + ".weight"], self._weights[name + ".bias"])

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self._weights[name + ".weight"], self._weights[name + ".bias"], self.config.eps)
