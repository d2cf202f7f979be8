"""All layers of a dense rotary decoder over few tokens, on the CPU in one call.

A decode step of a small model takes as long as its calls take: some thirteen a layer, of 5 us each and more. One call
for all layers leaves the products. There is a C path alone; whoever asks for what it is not made for gets None, and
composes the ops themselves, with the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from kernels._native.limits import MAX_HEAD_DIM, MAX_ROWS, MIN_COLUMNS
from kernels.dispatch import deciding, native
from kernels.halved_matrix import HalvedMatrix
from kernels.invariance import is_batch_invariant
from kernels.linear import Weight
from kernels.paged_attention import AttentionBatch
from kernels.quantised_matrix import Int8Matrix
from kernels.quantised_pages import LayerCache
from kernels.rotary import RotaryTable

if TYPE_CHECKING:
    from kernels._native.decoder_layers import Layers, Matrix


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """One layer: h += o(attention(rotate(norm(qkv(norm(h)))))), then h += down(swiglu(gate_up(norm(h)))).

    Norms are RMS norms of [hidden]; qk_norm [heads + key heads, head_dim] or None; matrices are [out, in], qkv stacks
    query, key and value heads, gate_up gate and up. window: how many of its last keys a query sees, 0 for all.
    """

    input_norm: torch.Tensor
    qkv: Weight
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    o: Weight
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: Weight
    down: Weight
    window: int = 0

    @property
    def is_served(self) -> bool:
        """Whether there is a C path for how its matrices are stored."""
        matrices = (self.qkv, self.o, self.gate_up, self.down)
        plain = (m for m in matrices if isinstance(m, torch.Tensor))
        is_stored = all(type(m) in (torch.Tensor, HalvedMatrix, Int8Matrix) for m in matrices)
        return is_stored and all(m.shape[0] >= MIN_COLUMNS for m in matrices) and all(m.is_contiguous() for m in plain)


class DecoderLayers:
    """Layers of one size. Their tensors stay where they are for as long as this is used; numbers in them may change. It
    holds pointers once it was used, and cannot be copied or pickled then."""

    def __init__(
        self, layers: Sequence[LayerWeights], *, num_heads: int, num_kv_heads: int, head_dim: int, eps: float
    ) -> None:
        self._layers = layers
        self._heads, self._kv_heads, self._head_dim, self._eps = num_heads, num_kv_heads, head_dim, eps
        fits_a_head = head_dim % 2 == 0 and head_dim <= MAX_HEAD_DIM
        self._is_served = fits_a_head and all(layer.is_served for layer in layers)
        self._prepared: Layers | None = None

    def forward(
        self,
        hidden: torch.Tensor,
        final_norm: torch.Tensor,
        rotary: RotaryTable,
        caches: Sequence[LayerCache],
        slots: torch.Tensor,
        attention: AttentionBatch,
        num_threads: int = 0,
    ) -> torch.Tensor | None:
        """hidden [T, H] through all layers and `final_norm` [H]: [T, H], or None with nothing touched.

        hidden is used up. The keys and values of the T tokens are written to `slots` [T] of each layer's cache; every
        token is asked for by one of the windows of `attention`, causally. num_threads: to share the work among, 0 for
        as many as torch has. Raises as `write_pages` and `paged_attention` do.
        """
        if not self._is_served or not 0 < hidden.shape[0] <= MAX_ROWS or is_batch_invariant():
            return None
        lead = deciding(hidden, *self._tensors()) if torch.is_grad_enabled() else hidden
        quick = native("decoder_layers", lead, hidden.numel())
        if quick is None or not isinstance(caches[0][0], torch.Tensor) or caches[0][0].dtype != hidden.dtype:
            return None
        if sum(attention.query_lens) != hidden.shape[0]:
            raise ValueError(f"decoder_layers: windows ask for {sum(attention.query_lens)} of {hidden.shape[0]} tokens")
        windows = attention.short_windows(caches[0][0].shape[1])
        if windows is None:
            return None
        if self._prepared is None:
            self._prepared = self._prepare(quick.Layers)
        plain = cast(Sequence[tuple[torch.Tensor, torch.Tensor]], caches)
        return self._prepared.forward(
            hidden, final_norm, rotary.cos, rotary.signed_sin, plain, slots, windows.page_table, windows.windows,
            num_threads or torch.get_num_threads(),
        )  # fmt: skip

    def _tensors(self) -> Iterator[torch.Tensor | None]:
        """All that a gradient could be wanted of."""
        for layer in self._layers:
            matrices = (layer.qkv, layer.o, layer.gate_up, layer.down)
            yield from (m if isinstance(m, torch.Tensor) else getattr(m, "full", None) for m in matrices)
            yield from (layer.input_norm, layer.qk_norm, layer.post_norm, layer.qkv_bias, layer.o_bias)

    def _prepare(self, kind: type[Layers]) -> Layers:
        prepared = kind(
            len(self._layers),
            heads=self._heads,
            kv_heads=self._kv_heads,
            dim=self._head_dim,
            inner=self._layers[0].down.shape[1],
            eps=self._eps,
        )
        for layer in self._layers:
            prepared.add(
                norms=(layer.input_norm, layer.post_norm),
                qk_norm=layer.qk_norm,
                qkv=cast("Matrix", layer.qkv),
                qkv_bias=layer.qkv_bias,
                o=cast("Matrix", layer.o),
                o_bias=layer.o_bias,
                gate_up=cast("Matrix", layer.gate_up),
                down=cast("Matrix", layer.down),
                window=layer.window,
            )
        return prepared
