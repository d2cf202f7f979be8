"""The vision tower of Qwen2.5-VL: patches to merged embedding rows, several images in one pass.

Blocks attend inside square windows, except some that attend to the whole frame. Tokens are put in window order once,
windows of equal size side by side, and the rows are put back after the merger; attention does not mind the order,
because positions are rotated in. Only `visual.*` tensors are read; the text half is foreign here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from embedding_worker.models.base import Grid
from embedding_worker.models.qwen_vision import NORM_EPS, ROPE_THETA, QwenVision, Shapes, TowerConfig
from kernels.activation import gelu, swiglu
from kernels.linear import linear
from kernels.norm import add_rms_norm, rms_norm
from kernels.rotary import RotaryTable, rotary_2d_cos_sin, rotary_table, rotate
from kernels.varlen_attention import Segments, varlen_attention
from transfer.checkpoint import Checkpoint
from transfer.checkpoint_rules import Rule


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig(TowerConfig):
    """The `vision_config` of a Qwen2.5-VL config.json. window_size is in pixels; full_blocks attend to the frame."""

    full_blocks: tuple[int, ...]
    window_size: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VisionConfig:
        """Read a model's config.json. Raises ValueError naming what is missing or unusable."""
        vision, sizes = cls.read(config, activation="silu", patch_size=14)
        made = cls(
            **sizes,
            full_blocks=tuple(sorted(vision.get("fullatt_block_indexes", (7, 15, 23, 31)))),
            window_size=vision.get("window_size", 112),
        )
        made.check_heads()
        if made.window_units < 1:
            raise ValueError(f"vision_config: window_size {made.window_size} is smaller than one merged patch")
        return made

    @property
    def window_units(self) -> int:
        """Merged patches along one side of a window."""
        return self.window_size // self.merge_size // self.patch_size


def rules(config: VisionConfig) -> list[Rule]:
    """Where the published tensors go; both `visual.*` and `model.visual.*` are read."""
    prefix, inner = r"(?:model\.)?visual\.", config.intermediate_size
    block = prefix + r"blocks\.(\d+)\."
    return [
        Rule(
            pattern=prefix + r"patch_embed\.proj\.weight",
            target="patch_embed.weight",
            transform=lambda weight: weight.flatten(1),
        ),
        Rule(pattern=block + r"(norm1|norm2)\.weight", target=r"blocks.\1.\2.weight"),
        Rule(pattern=block + r"attn\.(qkv|proj)\.(weight|bias)", target=r"blocks.\1.\2.\3"),
        Rule(pattern=block + r"mlp\.gate_proj\.(weight|bias)", target=r"blocks.\1.gate_up.\2", rows=(0, inner)),
        Rule(pattern=block + r"mlp\.up_proj\.(weight|bias)", target=r"blocks.\1.gate_up.\2", rows=(inner, 2 * inner)),
        Rule(pattern=block + r"mlp\.down_proj\.(weight|bias)", target=r"blocks.\1.down.\2"),
        Rule(pattern=prefix + r"merger\.ln_q\.weight", target="merger.norm.weight"),
        Rule(pattern=prefix + r"merger\.mlp\.0\.(weight|bias)", target=r"merger.up.\1"),
        Rule(pattern=prefix + r"merger\.mlp\.2\.(weight|bias)", target=r"merger.down.\1"),
    ]


def weight_shapes(config: VisionConfig) -> Shapes:
    """Every destination and its shape."""
    width, inner, merged = config.hidden_size, config.intermediate_size, config.merged_size
    shapes: Shapes = {"patch_embed.weight": (width, config.patch_dim)}
    linears = {"qkv": (3 * width, width), "proj": (width, width), "gate_up": (2 * inner, width), "down": (width, inner)}
    for i in range(config.depth):
        shapes |= {f"blocks.{i}.norm1.weight": (width,), f"blocks.{i}.norm2.weight": (width,)}
        for name, shape in linears.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    shapes |= {"merger.norm.weight": (width,)}
    shapes |= {"merger.up.weight": (merged, merged), "merger.up.bias": (merged,)}
    shapes |= {"merger.down.weight": (config.out_hidden_size, merged), "merger.down.bias": (config.out_hidden_size,)}
    return shapes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FrameLayout:
    """How the tokens of one medium are ordered, in units of merged patches.

    order: [units] int64, unit at each place after reordering. positions: [units * merge^2, 2] (row, column) of every
    patch, reordered. window_lengths: patches per window, equal ones side by side. frame_lengths: patches per frame.
    """

    order: torch.Tensor
    positions: torch.Tensor
    window_lengths: tuple[int, ...]
    frame_lengths: tuple[int, ...]


@functools.lru_cache(maxsize=64)
def frame_layout(grid: Grid, merge: int, window: int) -> FrameLayout:
    """Lay out a medium of `grid` patches in windows of `window` x `window` merged patches; edge windows are smaller."""
    frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    units = torch.arange(frames * rows * columns).view(frames, rows, columns)
    windows = [
        units[:, top : top + window, left : left + window].flatten(1)
        for top in range(0, rows, window)
        for left in range(0, columns, window)
    ]
    windows.sort(key=lambda tokens: -tokens.shape[1])
    by_frame = [[tokens[frame] for tokens in windows] for frame in range(frames)]
    order = torch.cat([torch.cat(frame) for frame in by_frame])
    row, column = (torch.arange(size).view(-1, merge) for size in (grid[1], grid[2]))
    shape = (frames, rows, columns, merge, merge)
    patch_rows = row[None, :, None, :, None].expand(shape)
    patch_columns = column[None, None, :, None, :].expand(shape)
    positions = torch.stack((patch_rows, patch_columns), -1).reshape(-1, merge * merge, 2)
    return FrameLayout(
        order=order,
        positions=positions[order].flatten(0, 1),
        window_lengths=tuple(len(tokens) * merge**2 for frame in by_frame for tokens in frame),
        frame_lengths=(grid[1] * grid[2],) * frames,
    )


class Qwen2_5_VLVision(QwenVision):
    """The loaded tower. See `VisionModel` for the contract."""

    config: VisionConfig

    @classmethod
    def parts(cls, checkpoint: Checkpoint) -> tuple[TowerConfig, Shapes, list[Rule]]:
        config = VisionConfig.from_config(checkpoint.config())
        return config, weight_shapes(config), rules(config)

    @torch.inference_mode()
    def encode(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        num_patches = self._count(patches, grids)
        config, weights = self.config, self._weights
        layouts = [frame_layout(grid, config.merge_size, config.window_units) for grid in grids]
        order = _concatenate_orders(layouts)
        device = weights["patch_embed.weight"].device
        embedded = linear(patches.to(device, weights["patch_embed.weight"].dtype), weights["patch_embed.weight"])
        stream = embedded.view(order.shape[0], -1)[order.to(device)].view(num_patches, -1)
        positions = torch.cat([layout.positions for layout in layouts]).to(device)
        table = rotary_table(*rotary_2d_cos_sin(positions, config.head_dim, ROPE_THETA))
        windows = Segments.from_lengths([length for layout in layouts for length in layout.window_lengths])
        whole = Segments.from_lengths([length for layout in layouts for length in layout.frame_lengths])
        for i in range(config.depth):
            self._block(i, stream, table, whole if i in config.full_blocks else windows)
        merged = rms_norm(stream, weights["merger.norm.weight"], NORM_EPS).view(-1, config.merged_size)
        rows = self._linear("merger.down", gelu(self._linear("merger.up", merged)))
        restored = torch.empty_like(rows)
        restored[order.to(device)] = rows
        return restored

    def _block(self, i: int, stream: torch.Tensor, table: RotaryTable, segments: Segments) -> None:
        """One transformer block, added into `stream` [N, width] in place."""
        weights, name = self._weights, f"blocks.{i}."
        num_heads, head_dim = self.config.num_heads, self.config.head_dim
        normed = rms_norm(stream, weights[name + "norm1.weight"], NORM_EPS)
        heads = self._linear(name + "qkv", normed).view(-1, 3 * num_heads, head_dim)
        turned = rotate(heads[:, : 2 * num_heads], table)
        attended = varlen_attention(turned[:, :num_heads], turned[:, num_heads:], heads[:, 2 * num_heads :], segments)
        projected = self._linear(name + "proj", attended.flatten(1))
        normed, _ = add_rms_norm(projected, stream, weights[name + "norm2.weight"], NORM_EPS)
        inner = swiglu(self._linear(name + "gate_up", normed))
        stream.add_(self._linear(name + "down", inner))


def _concatenate_orders(layouts: Sequence[FrameLayout]) -> torch.Tensor:
    """Orders of several media as one: each moved behind the units of those before it."""
    orders, first = [], 0
    for layout in layouts:
        orders.append(layout.order + first)
        first += layout.order.shape[0]
    return torch.cat(orders)
