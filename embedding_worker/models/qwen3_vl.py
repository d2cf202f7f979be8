"""The vision tower of Qwen3-VL: patches to merged rows with their deepstack planes, several images in one pass.

Every block attends to the whole frame. A learned square of position embeddings is stretched over each image's patches;
positions are rotated in besides. Some blocks hand what they have so far to a merger of their own: a further plane of
every row. Only `visual.*` tensors are read; the text half is foreign here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from embedding_worker.models.base import PLANE, Grid
from embedding_worker.models.qwen_vision import NORM_EPS, ROPE_THETA, QwenVision, Shapes, TowerConfig
from kernels.activation import gelu, gelu_tanh
from kernels.norm import layer_norm
from kernels.rotary import RotaryTable, rotary_2d_cos_sin, rotary_table, rotate
from kernels.varlen_attention import Segments, varlen_attention
from transfer.checkpoint import Checkpoint
from transfer.checkpoint_rules import Rule


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig(TowerConfig):
    """The `vision_config` of a Qwen3-VL config.json. deep_blocks: whose outputs are merged too, the i-th
    by the i-th merger."""

    num_position_embeddings: int
    deep_blocks: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VisionConfig:
        """Read a model's config.json. Raises ValueError naming what is missing or unusable."""
        vision, sizes = cls.read(config, activation="gelu_pytorch_tanh", patch_size=16)
        made = cls(
            **sizes,
            num_position_embeddings=vision.get("num_position_embeddings", 2304),
            deep_blocks=tuple(vision.get("deepstack_visual_indexes", (8, 16, 24))),
        )
        made.check_heads()
        made.check_positions()
        return made

    def check_positions(self) -> None:
        """Raise ValueError on position embeddings that are no square, and on blocks that are not there."""
        if self.grid_side**2 != self.num_position_embeddings or self.grid_side < 1:
            raise ValueError(f"vision_config: num_position_embeddings {self.num_position_embeddings} is no square")
        if len(set(self.deep_blocks)) < len(self.deep_blocks) or not set(self.deep_blocks) <= set(range(self.depth)):
            raise ValueError(
                f"vision_config: deepstack_visual_indexes {list(self.deep_blocks)} must be different blocks of "
                f"{self.depth}"
            )

    @property
    def grid_side(self) -> int:
        """Position embeddings along one side of their square."""
        return math.isqrt(self.num_position_embeddings)


def rules() -> list[Rule]:
    """Where the published tensors go; both `visual.*` and `model.visual.*` are read."""
    prefix = r"(?:model\.)?visual\."
    block = prefix + r"blocks\.(\d+)\."
    parts = r"(norm|linear_fc1|linear_fc2)\.(weight|bias)"
    return [
        Rule(
            pattern=prefix + r"patch_embed\.proj\.weight",
            target="patch_embed.weight",
            transform=lambda weight: weight.flatten(1),
        ),
        Rule(pattern=prefix + r"patch_embed\.proj\.bias", target="patch_embed.bias"),
        Rule(pattern=prefix + r"pos_embed\.weight", target="pos_embed"),
        Rule(pattern=block + r"(norm1|norm2)\.(weight|bias)", target=r"blocks.\1.\2.\3"),
        Rule(pattern=block + r"attn\.(qkv|proj)\.(weight|bias)", target=r"blocks.\1.\2.\3"),
        Rule(pattern=block + r"mlp\.(linear_fc1|linear_fc2)\.(weight|bias)", target=r"blocks.\1.\2.\3"),
        Rule(pattern=prefix + r"merger\." + parts, target=r"merger.\1.\2"),
        Rule(pattern=prefix + r"deepstack_merger_list\.(\d+)\." + parts, target=r"deep.\1.\2.\3"),
    ]


def weight_shapes(config: VisionConfig) -> Shapes:
    """Every destination and its shape."""
    width, inner, merged = config.hidden_size, config.intermediate_size, config.merged_size
    shapes: Shapes = {"pos_embed": (config.num_position_embeddings, width)}
    linears = {"patch_embed": (width, config.patch_dim)}
    mergers = {"merger": width} | {f"deep.{i}": merged for i in range(len(config.deep_blocks))}
    for i in range(config.depth):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.weight": (width,), f"blocks.{i}.{norm}.bias": (width,)}
        linears |= {f"blocks.{i}.qkv": (3 * width, width), f"blocks.{i}.proj": (width, width)}
        linears |= {f"blocks.{i}.linear_fc1": (inner, width), f"blocks.{i}.linear_fc2": (width, inner)}
    for name, normed in mergers.items():
        shapes |= {f"{name}.norm.weight": (normed,), f"{name}.norm.bias": (normed,)}
        linears |= {f"{name}.linear_fc1": (merged, merged), f"{name}.linear_fc2": (config.out_hidden_size, merged)}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FrameLayout:
    """Where the patches of one frame lie, those of one merged unit side by side: [rows * columns, ...].

    positions: (row, column) of each. corners: the four position embeddings that it lies between, [..., 4] int64;
    shares: how much of each, [..., 4] float32.
    """

    positions: torch.Tensor
    corners: torch.Tensor
    shares: torch.Tensor


@functools.lru_cache(maxsize=64)
def frame_layout(rows: int, columns: int, merge: int, side: int) -> FrameLayout:
    """Lay `side` x `side` position embeddings over a frame, the outermost over the frame's corners."""
    row, column = (torch.arange(size).view(-1, merge) for size in (rows, columns))
    shape = (rows // merge, columns // merge, merge, merge)
    row = row[:, None, :, None].expand(shape).reshape(-1)
    column = column[None, :, None, :].expand(shape).reshape(-1)
    top, down = _stretched(rows, side)
    left, right = _stretched(columns, side)
    corners, shares = [], []
    for i, vertical in ((top, 1 - down), (top + 1, down)):
        for j, horizontal in ((left, 1 - right), (left + 1, right)):
            corners.append(i.clamp(max=side - 1)[row] * side + j.clamp(max=side - 1)[column])
            shares.append(vertical[row] * horizontal[column])
    return FrameLayout(
        positions=torch.stack((row, column), -1), corners=torch.stack(corners, -1), shares=torch.stack(shares, -1)
    )


def _stretched(size: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `size` places stretched over `side` points: the point before each [size] int64, and how far behind it."""
    places = torch.linspace(0, side - 1, size)
    before = places.to(torch.int64)
    return before, places - before


class Qwen3VLVision(QwenVision):
    """The loaded tower. See `VisionModel` for the contract."""

    config: VisionConfig

    def __init__(self, config: VisionConfig, weights: Mapping[str, torch.Tensor], fingerprint: str) -> None:
        super().__init__(config, weights, fingerprint)
        self.planes = (PLANE, *(f"deepstack.{i}" for i in range(len(config.deep_blocks))))

    @classmethod
    def parts(cls, checkpoint: Checkpoint) -> tuple[TowerConfig, Shapes, list[Rule]]:
        config = VisionConfig.from_config(checkpoint.config())
        return config, weight_shapes(config), rules()

    @torch.inference_mode()
    def encode(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        self._count(patches, grids)
        config, embedding = self.config, self._weights["pos_embed"]
        frames = [frame_layout(h, w, config.merge_size, config.grid_side) for t, h, w in grids for _ in range(t)]
        device = embedding.device
        corners = torch.cat([frame.corners for frame in frames]).to(device)
        shares = torch.cat([frame.shares for frame in frames]).to(device, embedding.dtype)
        positions = torch.cat([frame.positions for frame in frames]).to(device)
        stream = self._linear("patch_embed", patches.to(device, embedding.dtype))
        stream += (embedding[corners] * shares[:, :, None]).sum(1)
        table = rotary_table(*rotary_2d_cos_sin(positions, config.head_dim, ROPE_THETA))
        segments = Segments.from_lengths([h * w for t, h, w in grids for _ in range(t)])
        deep = []  # in the order of the blocks, whatever the order in which they are listed
        for i in range(config.depth):
            self._block(i, stream, table, segments)
            if i in config.deep_blocks:
                name = f"deep.{config.deep_blocks.index(i)}"
                deep.append(self._merge(name, stream.view(-1, config.merged_size)))
        rows = self._merge("merger", stream)
        return torch.stack((rows, *deep)).transpose(0, 1) if deep else rows

    def _block(self, i: int, stream: torch.Tensor, table: RotaryTable, segments: Segments) -> None:
        """One transformer block, added into `stream` [N, width] in place."""
        name, num_heads = f"blocks.{i}.", self.config.num_heads
        qkv = self._linear(name + "qkv", self._norm(name + "norm1", stream))
        heads = qkv.view(-1, 3 * num_heads, self.config.head_dim)
        turned = rotate(heads[:, : 2 * num_heads], table)
        attended = varlen_attention(turned[:, :num_heads], turned[:, num_heads:], heads[:, 2 * num_heads :], segments)
        stream.add_(self._linear(name + "proj", attended.flatten(1)))
        inner = gelu_tanh(self._linear(name + "linear_fc1", self._norm(name + "norm2", stream)))
        stream.add_(self._linear(name + "linear_fc2", inner))

    def _merge(self, name: str, stream: torch.Tensor) -> torch.Tensor:
        """Rows [units, out] of a stream that is normalised in the width it comes in."""
        normed = self._norm(name + ".norm", stream).view(-1, self.config.merged_size)
        return self._linear(name + ".linear_fc2", gelu(self._linear(name + ".linear_fc1", normed)))

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self._weights[name + ".weight"], self._weights[name + ".bias"], NORM_EPS)
