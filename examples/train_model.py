"""A compact, dense, trainable Qwen2.5-VL in plain torch, shaped for thousands of very small samples.

Parameter names are the published checkpoint's names, so `state_dict()` is what gets saved. Three shortcuts keep
training quick and change no result: a still image repeats its frame, so both temporal slices of the patch
kernel are summed first; window attention is a mask over patches in their original order; text is padded on the
right, where causal attention never looks. Serving code lives elsewhere and shares nothing with this file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionShape:
    """The fields of `vision_config` that this tower needs."""

    hidden_size: int = 128
    intermediate_size: int = 352
    depth: int = 4
    num_heads: int = 4
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 56
    fullatt_block_indexes: tuple[int, ...] = (1, 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextShape:
    """The text half's sizes, as config.json names them."""

    vocab_size: int
    hidden_size: int = 192
    intermediate_size: int = 448
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    mrope_section: tuple[int, int, int] = (8, 8, 8)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class TinyQwen(nn.Module):
    """Both halves; the language head is tied to the embedding."""

    def __init__(self, visual: VisionTower, text: TextModel) -> None:
        super().__init__()
        self.visual = visual
        self.model = text

    def forward(self, input_ids: Tensor, positions: Tensor, media_rows: Tensor, media_mask: Tensor) -> Tensor:
        """Final hidden states [B, L, H]; rows of `media_rows` fill the True places of `media_mask` in order."""
        embeddings = self.model.embed_tokens(input_ids)
        embeddings = embeddings.masked_scatter(media_mask.unsqueeze(-1), media_rows.to(embeddings.dtype))
        hidden: Tensor = self.model(embeddings, positions)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.model.embed_tokens.weight)


class VisionTower(nn.Module):
    """Patches of one 56-high canvas to one row per merged 28x28 cell."""

    def __init__(self, shape: VisionShape, out_size: int) -> None:
        super().__init__()
        self.shape = shape
        self.patch_embed = PatchEmbed(shape)
        self.blocks = nn.ModuleList(VisionBlock(shape) for _ in range(shape.depth))
        self.merger = Merger(shape, out_size)
        self.apply(_initialise)

    def forward(self, patches: Tensor, cells_wide: Tensor) -> Tensor:
        """patches [B, N, 3*14*14], grouped by merged cell; `cells_wide` [B] says how much of the canvas is real."""
        rows, columns = patch_grid(patches.shape[1])
        merge = self.shape.spatial_merge_size
        cell = columns // merge
        cells_per_window = self.shape.window_size // merge // self.shape.patch_size
        real = cell[None, :] < cells_wide[:, None]
        same_window = (cell[:, None] // cells_per_window) == (cell[None, :] // cells_per_window)
        # A padded patch may look at itself, or its softmax row would be empty.
        itself = torch.eye(patches.shape[1], dtype=torch.bool)
        everywhere = (real[:, None, :] | itself)[:, None]
        in_window = ((real[:, None, :] & same_window) | itself)[:, None]
        cos, sin = vision_rotation(rows, columns, self.shape.hidden_size // self.shape.num_heads)
        hidden = self.patch_embed(patches).float()
        for index, block in enumerate(self.blocks):
            mask = everywhere if index in self.shape.fullatt_block_indexes else in_window
            hidden = block(hidden, mask, cos, sin)
        merged: Tensor = self.merger(hidden)
        return merged


class PatchEmbed(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        kernel = (shape.temporal_patch_size, shape.patch_size, shape.patch_size)
        self.proj = nn.Conv3d(3, shape.hidden_size, kernel_size=kernel, stride=kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        return functional.linear(patches, self.proj.weight.sum(dim=2).flatten(1))


class VisionBlock(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.norm1 = RmsNorm(shape.hidden_size, eps=1e-6)
        self.norm2 = RmsNorm(shape.hidden_size, eps=1e-6)
        self.attn = VisionAttention(shape)
        self.mlp = GatedMlp(shape.hidden_size, shape.intermediate_size, bias=True)

    def forward(self, hidden: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        hidden = hidden + self.attn(self.norm1(hidden), mask, cos, sin)
        updated: Tensor = hidden + self.mlp(self.norm2(hidden))
        return updated


class VisionAttention(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.qkv = nn.Linear(shape.hidden_size, 3 * shape.hidden_size)
        self.proj = nn.Linear(shape.hidden_size, shape.hidden_size)

    def forward(self, hidden: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        qkv = self.qkv(hidden).view(batch, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(
            rotate(query, cos, sin), rotate(key, cos, sin), value, attn_mask=mask
        )
        projected: Tensor = self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        return projected


class Merger(nn.Module):
    def __init__(self, shape: VisionShape, out_size: int) -> None:
        super().__init__()
        self.width = shape.hidden_size * shape.spatial_merge_size**2
        self.ln_q = RmsNorm(shape.hidden_size, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, out_size))

    def forward(self, hidden: Tensor) -> Tensor:
        merged: Tensor = self.mlp(self.ln_q(hidden).reshape(hidden.shape[0], -1, self.width))
        return merged


class TextModel(nn.Module):
    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(TextLayer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RmsNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.apply(_initialise)

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        cos, sin = text_rotation(positions, self.shape)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        normed: Tensor = self.norm(hidden)
        return normed


class TextLayer(nn.Module):
    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = TextAttention(shape)
        self.mlp = GatedMlp(shape.hidden_size, shape.intermediate_size, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin)
        updated: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return updated


class TextAttention(nn.Module):
    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        self.shape = shape
        key_value_size = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.k_proj = nn.Linear(shape.hidden_size, key_value_size)
        self.v_proj = nn.Linear(shape.hidden_size, key_value_size)
        self.o_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        split = (batch, length, -1, self.shape.head_dim)
        query = rotate(self.q_proj(hidden).view(split).transpose(1, 2), cos, sin)
        key = rotate(self.k_proj(hidden).view(split).transpose(1, 2), cos, sin)
        value = self.v_proj(hidden).view(split).transpose(1, 2)
        groups = self.shape.num_attention_heads // self.shape.num_key_value_heads
        attended = functional.scaled_dot_product_attention(
            query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), is_causal=True
        )
        projected: Tensor = self.o_proj(attended.transpose(1, 2).reshape(batch, length, width))
        return projected


class RmsNorm(nn.Module):
    """In float32 even where the linear layers run in bfloat16, as the published model does."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden.float(), self.weight.shape, self.weight, self.eps)


class GatedMlp(nn.Module):
    def __init__(self, width: int, intermediate: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate, bias=bias)
        self.up_proj = nn.Linear(width, intermediate, bias=bias)
        self.down_proj = nn.Linear(intermediate, width, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        down: Tensor = self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return down


def patch_grid(num_patches: int) -> tuple[Tensor, Tensor]:
    """Row and column of every patch of a canvas four patches high, in merged-cell order.

    index = ((cell_row * cells_wide + cell_column) * 2 + row_in_cell) * 2 + column_in_cell
    """
    index = torch.arange(num_patches)
    cells_wide = num_patches // 8
    cell = index // 4
    rows = (cell // cells_wide) * 2 + index // 2 % 2
    columns = (cell % cells_wide) * 2 + index % 2
    return rows, columns


def vision_rotation(rows: Tensor, columns: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** -(torch.arange(0, head_dim // 2, 2).float() / (head_dim // 2))
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def text_rotation(positions: Tensor, shape: TextShape) -> tuple[Tensor, Tensor]:
    """positions [3, B, L]: time, height and width each drive their own section of the frequencies."""
    frequencies = shape.rope_theta ** -(torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
    angles = positions[..., None].float() * frequencies
    sections = torch.split(angles, list(shape.mrope_section), dim=-1)
    chosen = torch.cat([section[axis] for axis, section in enumerate(sections)], dim=-1)
    chosen = torch.cat([chosen, chosen], dim=-1).unsqueeze(1)
    return chosen.cos(), chosen.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return (states * cos + torch.cat([-second, first], dim=-1) * sin).to(states.dtype)


def _initialise(module: nn.Module) -> None:
    """1/sqrt(fan_in); the customary 0.02 leaves a model this small asleep for thousands of steps."""
    if isinstance(module, nn.Linear | nn.Conv3d):
        nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.weight[0].numel()))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.embedding_dim))
