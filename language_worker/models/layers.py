"""The shared body of rotary decoder models: a pre-norm block with grouped-query attention over pages and a gated MLP.

Holds fused weights as plain tensors (no module tree: at batch 1 a step is bound by call overhead). A family is its
config, its name map and these blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from kernels.activation import swiglu
from kernels.attention_mask import CAUSAL, AttentionMask
from kernels.norm import add_rms_norm, rms_norm, rms_norm_heads
from kernels.paged_attention import AttentionBatch, paged_attention
from kernels.pages import write_pages
from kernels.rotary import (
    RotaryTable,
    mrope_cos_sin,
    rotary_cos_sin,
    rotary_table,
    rotate,
)
from language_worker.models.rope import Rope

_FIRST_BIAS = r"layers\.0\.self_attn\.([qo])_proj\.bias"


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockShape:
    """Sizes and options of one decoder block. has_qk_norm: every query and key head is normalised before rotation.
    mask: which keys a query sees."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_qk_norm: bool = False
    mask: AttentionMask = CAUSAL

    @property
    def qkv_rows(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def with_biases(self, names: Iterable[str], prefix: str) -> BlockShape:
        """With the biases that a checkpoint with these tensor names has; prefix: a regular expression."""
        kinds = {match[1] for name in names if (match := re.fullmatch(prefix + _FIRST_BIAS, name))}
        return replace(self, has_qkv_bias="q" in kinds, has_o_bias="o" in kinds)


class DecoderBlock:
    """One layer. Weights are [out, in]; qkv stacks query, key and value heads, gate_up stacks gate and up; qk_norm
    [heads + key heads, head_dim] has a row for each head that is normalised."""

    __slots__ = ("down", "gate_up", "input_norm", "o", "o_bias", "post_norm", "qk_norm", "qkv", "qkv_bias", "shape")

    def __init__(self, shape: BlockShape, *, dtype: torch.dtype, device: torch.device) -> None:
        def empty(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self.shape = shape
        self.input_norm = empty(shape.hidden_size)
        self.qkv = empty(shape.qkv_rows, shape.hidden_size)
        self.qkv_bias = empty(shape.qkv_rows) if shape.has_qkv_bias else None
        self.qk_norm = empty(shape.num_heads + shape.num_kv_heads, shape.head_dim) if shape.has_qk_norm else None
        self.o = empty(shape.hidden_size, shape.num_heads * shape.head_dim)
        self.o_bias = empty(shape.hidden_size) if shape.has_o_bias else None
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
        optional = {"qkv.bias": self.qkv_bias, "o.bias": self.o_bias, "qk_norm.weight": self.qk_norm}
        return named | {f"{prefix}.{name}": tensor for name, tensor in optional.items() if tensor is not None}

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
        qk = qkv[:, : heads + kv_heads]
        if self.qk_norm is not None:
            qk = rms_norm_heads(qk, self.qk_norm, shape.eps)
        qk = rotate(qk, rotary)
        write_pages(cache[0], cache[1], qk[:, heads:], qkv[:, heads + kv_heads :], slots)
        mixed = paged_attention(qk[:, :heads], cache[0], cache[1], attention, mask=shape.mask)
        attended = F.linear(mixed.reshape(num_tokens, heads * shape.head_dim), self.o, self.o_bias)
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

    __slots__ = ("_device", "_head_dim", "_inv_freq", "_rope", "_sections", "_table")

    def __init__(self, rope: Rope, *, head_dim: int, device: torch.device, sections: Sequence[int] = ()) -> None:
        self._rope = rope
        self._head_dim = head_dim
        self._device = device
        self._sections = tuple(sections)
        self.reserve(0)

    def reserve(self, max_len: int) -> None:
        """Precompute positions 0..max_len-1, the only ones that are served."""
        self._inv_freq = self._rope.frequencies(self._head_dim, max_len).to(self._device)
        self._table = self._scaled(*rotary_cos_sin(torch.arange(max_len, device=self._device), self._inv_freq))

    def table(self, positions: torch.Tensor) -> RotaryTable:
        """positions [T] (below the reserved length) or [3, T]."""
        if positions.dim() == 2:
            return self._scaled(*mrope_cos_sin(positions, self._inv_freq, self._sections))
        return RotaryTable(
            cos=self._table.cos.index_select(0, positions), signed_sin=self._table.signed_sin.index_select(0, positions)
        )

    def _scaled(self, cos: torch.Tensor, sin: torch.Tensor) -> RotaryTable:
        factor = self._rope.attention_factor
        return rotary_table(cos, sin) if factor == 1.0 else rotary_table(cos * factor, sin * factor)
