"""The shared body of rotary decoder models: a pre-norm block with grouped-query attention over pages and an MLP.

Holds fused weights as plain tensors (no module tree: at batch 1 a step is bound by call overhead). A family is its
config, its name map and these blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from kernels.attention_mask import CAUSAL, AttentionMask
from kernels.decoder_layers import DecoderLayers, LayerWeights
from kernels.linear import Weight, linear
from kernels.norm import add_rms_norm, rms_norm, rms_norm_heads
from kernels.paged_attention import AttentionBatch, paged_attention
from kernels.pages import write_pages
from kernels.quantised_pages import LayerCache
from kernels.rotary import (
    RotaryTable,
    mrope_cos_sin,
    rotary_cos_sin,
    rotary_table,
    rotate,
)
from language_worker.models.base import MediaSpan, StepInputs
from language_worker.models.feed_forward import ExpertMLP, ExpertShape, GatedMLP
from language_worker.models.matrices import Storage, finish, quantise
from language_worker.models.rope import Rope

MATRICES = ("qkv", "o")  # of attention: what quantisation is for
_FIRST_BIAS = r"layers\.0\.self_attn\.([qo])_proj\.bias"


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockShape:
    """Sizes and options of one decoder block. has_qk_norm: every query and key head is normalised before rotation.
    experts: of the layers that have a mixture of experts for an MLP. mask: which keys a query sees. windows: per layer,
    how many of its last keys a query sees there (0: as `mask` says; empty: in every layer)."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_qk_norm: bool = False
    experts: ExpertShape | None = None
    mask: AttentionMask = CAUSAL
    windows: tuple[int, ...] = ()

    def at_layer(self, index: int) -> BlockShape:
        """The shape of one layer: some of a mixture's may be dense, some may slide."""
        is_dense = self.experts is None or index in self.experts.dense_layers
        window = self.windows[index] if self.windows else 0
        return replace(
            self,
            experts=None if is_dense else self.experts,
            mask=AttentionMask(window=window) if window else self.mask,
        )

    @property
    def qkv_rows(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def with_biases(self, names: Iterable[str], prefix: str) -> BlockShape:
        """With the biases that a checkpoint with these tensor names has; prefix: a regular expression."""
        kinds = {match[1] for name in names if (match := re.fullmatch(prefix + _FIRST_BIAS, name))}
        return replace(self, has_qkv_bias="q" in kinds, has_o_bias="o" in kinds)


class DecoderBlock:
    """One layer. Weights are [out, in]; qkv stacks query, key and value heads; qk_norm [heads + key heads, head_dim]
    has a row for each head that is normalised."""

    __slots__ = ("input_norm", "mlp", "o", "o_bias", "post_norm", "qk_norm", "qkv", "qkv_bias", "shape")

    def __init__(self, shape: BlockShape, *, dtype: torch.dtype, device: torch.device) -> None:
        def empty(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self.shape = shape
        self.input_norm = empty(shape.hidden_size)
        self.qkv: Weight = empty(shape.qkv_rows, shape.hidden_size)
        self.qkv_bias = empty(shape.qkv_rows) if shape.has_qkv_bias else None
        self.qk_norm = empty(shape.num_heads + shape.num_kv_heads, shape.head_dim) if shape.has_qk_norm else None
        self.o: Weight = empty(shape.hidden_size, shape.num_heads * shape.head_dim)
        self.o_bias = empty(shape.hidden_size) if shape.has_o_bias else None
        self.post_norm = empty(shape.hidden_size)
        self.mlp: GatedMLP | ExpertMLP
        if shape.experts is None:
            self.mlp = GatedMLP(shape.hidden_size, shape.intermediate_size, dtype=dtype, device=device)
        else:
            self.mlp = ExpertMLP(shape.hidden_size, shape.experts, dtype=dtype, device=device)

    def quantise(self, method: Storage, device: torch.device) -> None:
        """Before it is filled: matrices of the format that `method` names in place of its own, all of it on `device`.
        Raises ValueError where the format cannot hold them."""
        quantise(self, MATRICES, method, device)
        self.mlp.quantise(method, device)

    def finish(self) -> None:
        """It is filled: bring the matrices into the form that is read fastest."""
        finish(self, MATRICES)
        self.mlp.finish()

    def parameters(self, prefix: str) -> dict[str, Weight]:
        """Tensors to fill, by name under `prefix`."""
        named: dict[str, Weight] = {
            f"{prefix}.input_norm.weight": self.input_norm,
            f"{prefix}.qkv.weight": self.qkv,
            f"{prefix}.o.weight": self.o,
            f"{prefix}.post_norm.weight": self.post_norm,
            **self.mlp.parameters(prefix),
        }
        optional = {"qkv.bias": self.qkv_bias, "o.bias": self.o_bias, "qk_norm.weight": self.qk_norm}
        return named | {f"{prefix}.{name}": tensor for name, tensor in optional.items() if tensor is not None}

    def weights(self) -> LayerWeights | None:
        """What a step through all layers in one call reads of this one; None where it has parts that such a step does
        not know."""
        window, causal = self.shape.mask.window, AttentionMask(window=self.shape.mask.window)
        if not isinstance(self.mlp, GatedMLP) or self.shape.mask != causal:
            return None
        return LayerWeights(
            input_norm=self.input_norm,
            qkv=self.qkv,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            o=self.o,
            o_bias=self.o_bias,
            post_norm=self.post_norm,
            gate_up=self.mlp.gate_up,
            down=self.mlp.down,
            window=window,
        )

    def forward(
        self,
        normed: torch.Tensor,
        residual: torch.Tensor,
        rotary: RotaryTable,
        cache: LayerCache,
        slots: torch.Tensor,
        attention: AttentionBatch,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """normed, residual [T, hidden] -> (what the MLP adds, residual after attention), both [T, hidden].

        rows: both of these rows [R] alone, in whose order `attention` asks then; the others only leave their keys and
        values behind.
        """
        shape = self.shape
        num_tokens, heads, kv_heads = normed.shape[0], shape.num_heads, shape.num_kv_heads
        qkv = linear(normed, self.qkv, self.qkv_bias).view(num_tokens, heads + 2 * kv_heads, shape.head_dim)
        qk = qkv[:, : heads + kv_heads]
        if self.qk_norm is not None:
            qk = rms_norm_heads(qk, self.qk_norm, shape.eps)
        qk = rotate(qk, rotary)
        write_pages(cache[0], cache[1], qk[:, heads:], qkv[:, heads + kv_heads :], slots)
        queries = qk[:, :heads]
        if rows is not None:
            queries, residual = queries.index_select(0, rows), residual.index_select(0, rows)
        mixed = paged_attention(queries, cache[0], cache[1], attention, mask=shape.mask)
        attended = linear(mixed.reshape(-1, heads * shape.head_dim), self.o, self.o_bias)
        normed, residual = add_rms_norm(attended, residual, self.post_norm, shape.eps)
        return self.mlp.forward(normed), residual


def _add_deeper(residual: torch.Tensor, media: Sequence[MediaSpan], layer: int) -> None:
    for span in media:
        if layer < len(span.deeper):
            residual.index_add_(0, span.targets, span.deeper[layer])


def whole_layers(blocks: Sequence[DecoderBlock]) -> DecoderLayers | None:
    """The filled blocks as one op, where they can be."""
    layers = [weights for block in blocks if (weights := block.weights()) is not None]
    shape = blocks[0].shape
    if len(layers) < len(blocks):
        return None
    return DecoderLayers(
        layers, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, eps=shape.eps
    )


def run_blocks(
    blocks: Sequence[DecoderBlock],
    hidden: torch.Tensor,
    final_norm: torch.Tensor,
    rotary: RotaryTable,
    caches: Sequence[LayerCache],
    inputs: StepInputs,
) -> torch.Tensor:
    """All layers and the final norm over hidden [T, H] (consumed); returns the rows asked for [R, H].

    The deeper planes of media are added one after each of the first layers.
    """
    rows, last_attention = inputs.logit_rows, inputs.last_attention
    eps = blocks[0].shape.eps
    residual = hidden
    normed = rms_norm(residual, blocks[0].input_norm, eps)
    for i, block in enumerate(blocks[:-1]):
        added, residual = block.forward(normed, residual, rotary, caches[i], inputs.slots, inputs.attention)
        _add_deeper(residual, inputs.media, i)
        normed, residual = add_rms_norm(added, residual, blocks[i + 1].input_norm, eps)
    last = len(blocks) - 1
    step = (normed, residual, rotary, caches[last], inputs.slots)
    if last_attention is not None and not any(len(span.deeper) > last for span in inputs.media):
        added, residual = blocks[last].forward(*step, last_attention, rows)
    else:
        added, residual = blocks[last].forward(*step, inputs.attention)
        _add_deeper(residual, inputs.media, last)
        if rows is not None:
            added, residual = added.index_select(0, rows), residual.index_select(0, rows)
    return add_rms_norm(added, residual, final_norm, eps)[0]


class RotaryPositions:
    """Rotary tables by position: looked up for text, computed for media positions. `sections` of D/2 frequencies,
    side by side or interleaved."""

    __slots__ = ("_device", "_head_dim", "_interleaved", "_inv_freq", "_max_len", "_rope", "_sections", "_table")

    def __init__(
        self,
        rope: Rope,
        *,
        head_dim: int,
        device: torch.device,
        sections: Sequence[int] = (),
        interleaved: bool = False,
    ) -> None:
        self._rope = rope
        self._head_dim = head_dim
        self._device = device
        self._sections = tuple(sections)
        self._interleaved = interleaved
        self.reserve(0)

    def move(self, device: torch.device) -> None:
        """To another device, with nothing reserved."""
        self._device = device
        self.reserve(0)

    def reserve(self, max_len: int) -> None:
        """Precompute positions 0..max_len-1, the only ones that are served."""
        self._max_len = max_len
        self._inv_freq = self._rope.frequencies(self._head_dim, max_len).to(self._device)
        self._table = self._scaled(*rotary_cos_sin(torch.arange(max_len, device=self._device), self._inv_freq))

    def described(self) -> str:
        """Equal for what rotates equally."""
        shape = (self._head_dim, self._sections, self._interleaved)
        return repr((self._rope, self._rope.deciding_len(self._max_len), shape))

    def table(self, positions: torch.Tensor) -> RotaryTable:
        """positions [T] (below the reserved length) or [3, T]."""
        if positions.dim() == 2:
            return self._scaled(
                *mrope_cos_sin(positions, self._inv_freq, self._sections, interleaved=self._interleaved)
            )
        return RotaryTable(
            cos=self._table.cos.index_select(0, positions), signed_sin=self._table.signed_sin.index_select(0, positions)
        )

    def _scaled(self, cos: torch.Tensor, sin: torch.Tensor) -> RotaryTable:
        factor = self._rope.attention_factor
        return rotary_table(cos, sin) if factor == 1.0 else rotary_table(cos * factor, sin * factor)
