"""The shared body of rotary decoder models: a pre-norm block with grouped-query attention over pages and a gated MLP.

Holds fused weights as plain tensors (no module tree: at batch 1 a step is bound by call overhead). A family is its
config, its name map and these blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.activation import swiglu
from kernels.norm import add_rms_norm, rms_norm
from kernels.paged_attention import AttentionBatch, paged_attention
from kernels.pages import write_pages
from kernels.rotary import (
    RotaryTable,
    inverse_frequencies,
    mrope_cos_sin,
    rotary_cos_sin,
    rotary_table,
    rotate,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockShape:
    """Sizes of one decoder block."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float

    @property
    def qkv_rows(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


class DecoderBlock:
    """One layer. Weights are [out, in]; qkv stacks query, key and value heads, gate_up stacks gate and up."""

    __slots__ = ("down", "gate_up", "input_norm", "o", "post_norm", "qkv", "qkv_bias", "shape")

    def __init__(self, shape: BlockShape, *, qkv_bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        def empty(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self.shape = shape
        self.input_norm = empty(shape.hidden_size)
        self.qkv = empty(shape.qkv_rows, shape.hidden_size)
        self.qkv_bias = empty(shape.qkv_rows) if qkv_bias else None
        self.o = empty(shape.hidden_size, shape.num_heads * shape.head_dim)
        self.post_norm = empty(shape.hidden_size)
        self.gate_up = empty(2 * shape.intermediate_size, shape.hidden_size)
        self.down = empty(shape.hidden_size, shape.intermediate_size)

    def parameters(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors to fill, by name under `prefix`."""
        named = {
            f"{prefix}.input_norm.weight": self.input_norm,
            f"{prefix}.qkv.weight": self.qkv,
            f"{prefix}.o.weight": self.o,
            f"{prefix}.post_norm.weight": self.post_norm,
            f"{prefix}.gate_up.weight": self.gate_up,
            f"{prefix}.down.weight": self.down,
        }
        if self.qkv_bias is not None:
            named[f"{prefix}.qkv.bias"] = self.qkv_bias
        return named

    def forward(
        self,
        normed: torch.Tensor,
        residual: torch.Tensor,
        rotary: RotaryTable,
        cache: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        attention: AttentionBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """normed, residual [T, hidden] -> (what the MLP adds, residual after attention), both [T, hidden]."""
        shape = self.shape
        num_tokens, heads, kv_heads = normed.shape[0], shape.num_heads, shape.num_kv_heads
        qkv = F.linear(normed, self.qkv, self.qkv_bias).view(num_tokens, heads + 2 * kv_heads, shape.head_dim)
        qk = rotate(qkv[:, : heads + kv_heads], rotary)
        write_pages(cache[0], cache[1], qk[:, heads:], qkv[:, heads + kv_heads :], slots)
        mixed = paged_attention(qk[:, :heads], cache[0], cache[1], attention)
        attended = F.linear(mixed.reshape(num_tokens, heads * shape.head_dim), self.o)
        normed, residual = add_rms_norm(attended, residual, self.post_norm, shape.eps)
        return F.linear(swiglu(F.linear(normed, self.gate_up)), self.down), residual


def run_blocks(
    blocks: Sequence[DecoderBlock],
    hidden: torch.Tensor,
    final_norm: torch.Tensor,
    rotary: RotaryTable,
    caches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    slots: torch.Tensor,
    attention: AttentionBatch,
    logit_rows: torch.Tensor | None,
) -> torch.Tensor:
    """All layers and the final norm over hidden [T, H] (consumed); returns the rows asked for [R, H]."""
    eps = blocks[0].shape.eps
    residual = hidden
    normed = rms_norm(residual, blocks[0].input_norm, eps)
    for i, block in enumerate(blocks):
        added, residual = block.forward(normed, residual, rotary, caches[i], slots, attention)
        if i + 1 < len(blocks):
            normed, residual = add_rms_norm(added, residual, blocks[i + 1].input_norm, eps)
    if logit_rows is not None:
        added, residual = added.index_select(0, logit_rows), residual.index_select(0, logit_rows)
    return add_rms_norm(added, residual, final_norm, eps)[0]


class RotaryPositions:
    """Rotary tables by position: looked up for text, computed for media positions. `sections` of D/2 frequencies."""

    __slots__ = ("_inv_freq", "_sections", "_table")

    def __init__(self, *, head_dim: int, theta: float, sections: Sequence[int], device: torch.device) -> None:
        self._inv_freq = inverse_frequencies(head_dim, theta).to(device)
        self._sections = tuple(sections)
        self._table = self._build(0)

    def reserve(self, max_len: int) -> None:
        """Precompute positions 0..max_len-1."""
        self._table = self._build(max_len)

    def table(self, positions: torch.Tensor) -> RotaryTable:
        """positions [T] (below the reserved length) or [3, T]."""
        if positions.dim() == 2:
            return rotary_table(*mrope_cos_sin(positions, self._inv_freq, self._sections))
        return RotaryTable(
            cos=self._table.cos.index_select(0, positions), signed_sin=self._table.signed_sin.index_select(0, positions)
        )

    def _build(self, length: int) -> RotaryTable:
        return rotary_table(*rotary_cos_sin(torch.arange(length, device=self._inv_freq.device), self._inv_freq))
