"""NanoChat: one body for every generation of nanochat; what a generation lacks is None and skipped.

    x = norm(embedding)            then, where there is smear, a gated share of the previous token's x
    per layer                      x = a x + b x0, where there are lambdas (x0: what entered the first layer)
                                   x += attention(norm(x)); queries and keys rotated backwards, then normalised;
                                   values plus a gated value embedding of the token, in every other layer
                                   x += relu(norm(x) up)^2 down
    head                           x minus a share of the middle layer's output, norm, logits under a soft cap

Norms have no weights, linears no biases. The share of the previous token is recomputed from its id, so that a sequence
needs no state but its tokens and its pages. Which numbers belong to which generation is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.attention_mask import CAUSAL, AttentionMask
from kernels.gates import relu_squared, softcap
from kernels.linear import linear
from kernels.norm import rms_norm
from kernels.paged_attention import paged_attention
from kernels.pages import write_pages
from kernels.quantised_pages import LayerCache
from kernels.rotary import RotaryTable, rotate
from language_worker.models.base import KVSpec, ModelSpec, StepInputs
from language_worker.models.decoder import RuledModel
from language_worker.models.layers import RotaryPositions
from language_worker.models.rope import Rope


@dataclass(frozen=True, kw_only=True, slots=True)
class NanoChatShape:
    """Sizes and options of one checkpoint.

    padded_vocab: rows of the embedding and the head, at least vocab_size. qk_scale: of queries and keys, each, after
    their norm. windows: per layer, how many keys before its own a query sees (0: all). cap: of the logits (None: none).
    gate_width: channels that the gate of value embeddings reads (0: there are none); gate_scale: its upper end.
    smear_width: channels that the smear gate reads (0: there is none, and no backout).
    """

    vocab_size: int
    padded_vocab: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int, ...]
    eps: float
    cap: float | None
    qk_scale: float = 1.0
    has_lambdas: bool = False
    gate_width: int = 0
    gate_scale: float = 0.0
    smear_width: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @property
    def qkv_rows(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def has_value_embedding(self, layer: int) -> bool:
        """Every other layer, the last one included."""
        return bool(self.gate_width) and layer % 2 == (self.num_layers - 1) % 2

    def spec(self, *, max_positions: int, default_len: int) -> ModelSpec:
        return ModelSpec(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            max_position_embeddings=max_positions,
            default_model_len=default_len,
            kv=KVSpec(
                num_layers=self.num_layers,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                window=max(self.windows) + 1 if all(self.windows) else 0,
            ),
            media_token_id=None,
            needs_previous_ids=self.smear_width > 0,
            tool_machine="calculator",
        )


class NanoChatLayer:
    """One layer. Weights are [out, in]; qkv stacks query, key and value heads."""

    __slots__ = ("down", "mask", "o", "qkv", "scale", "shape", "up", "value_embedding", "value_gate")

    def __init__(self, shape: NanoChatShape, index: int, *, dtype: torch.dtype, device: torch.device) -> None:
        def empty(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        self.shape = shape
        self.scale = shape.qk_scale**2 / shape.head_dim**0.5
        window = shape.windows[index]
        self.mask = AttentionMask(window=window + 1) if window else CAUSAL
        self.qkv = empty(shape.qkv_rows, shape.hidden_size)
        self.o = empty(shape.hidden_size, shape.num_heads * shape.head_dim)
        self.up = empty(shape.intermediate_size, shape.hidden_size)
        self.down = empty(shape.hidden_size, shape.intermediate_size)
        self.value_gate: torch.Tensor | None = None
        self.value_embedding: torch.Tensor | None = None
        if shape.has_value_embedding(index):
            self.value_gate = empty(shape.num_kv_heads, shape.gate_width)
            self.value_embedding = empty(shape.padded_vocab, shape.num_kv_heads * shape.head_dim)

    def parameters(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors to fill, by name under `prefix`."""
        named = {"qkv": self.qkv, "o": self.o, "up": self.up, "down": self.down}
        optional = {"value_gate": self.value_gate, "value_embedding": self.value_embedding}
        named |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        return {f"{prefix}.{name}": tensor for name, tensor in named.items()}

    def forward(self, x: torch.Tensor, rotary: RotaryTable, cache: LayerCache, inputs: StepInputs) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden]."""
        shape = self.shape
        num_tokens, heads, kv_heads = x.shape[0], shape.num_heads, shape.num_kv_heads
        normed = rms_norm(x, None, shape.eps)
        qkv = linear(normed, self.qkv).view(num_tokens, heads + 2 * kv_heads, shape.head_dim)
        qk = rms_norm(rotate(qkv[:, : heads + kv_heads], rotary), None, shape.eps)
        values = self._with_value_embedding(qkv[:, heads + kv_heads :], normed, inputs.token_ids)
        write_pages(cache[0], cache[1], qk[:, heads:], values, inputs.slots)
        mixed = paged_attention(qk[:, :heads], cache[0], cache[1], inputs.attention, self.scale, mask=self.mask)
        x = x + linear(mixed.reshape(num_tokens, heads * shape.head_dim), self.o)
        return x + linear(relu_squared(linear(rms_norm(x, None, shape.eps), self.up)), self.down)

    def _with_value_embedding(self, values: torch.Tensor, normed: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """values [T, kv heads, D] plus the tokens' own, by a gate per key head."""
        if self.value_gate is None or self.value_embedding is None:
            return values
        gate = torch.sigmoid(linear(normed[:, : self.shape.gate_width], self.value_gate)) * self.shape.gate_scale
        return values + gate[:, :, None] * F.embedding(ids, self.value_embedding).view(values.shape)


class NanoChat(RuledModel):
    """See the module. `lambdas` [2, layers]: shares of x and of x0."""

    def __init__(
        self, shape: NanoChatShape, spec: ModelSpec, rope: Rope, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        def exact(*size: int) -> torch.Tensor | None:  # single numbers, kept as they were trained
            return torch.empty(size, dtype=torch.float32, device=device)

        self.shape = shape
        self.spec = spec
        self.embedding = torch.empty((shape.padded_vocab, shape.hidden_size), dtype=dtype, device=device)
        self.head = torch.empty_like(self.embedding)
        self.layers = [NanoChatLayer(shape, i, dtype=dtype, device=device) for i in range(shape.num_layers)]
        self.lambdas = exact(2 * shape.num_layers) if shape.has_lambdas else None
        has_smear = shape.smear_width > 0
        self.smear_gate = torch.empty((1, shape.smear_width), dtype=dtype, device=device) if has_smear else None
        self.smear_lambda = exact(1) if has_smear else None
        self.backout_lambda = exact(1) if has_smear else None
        self.rotary = RotaryPositions(rope, head_dim=shape.head_dim, device=device)

    def parameters(self) -> dict[str, torch.Tensor]:
        named = {"embedding": self.embedding, "head": self.head}
        single = ("lambdas", "smear_gate", "smear_lambda", "backout_lambda")
        named |= {name: tensor for name in single if (tensor := getattr(self, name)) is not None}
        for i, layer in enumerate(self.layers):
            named |= layer.parameters(f"layers.{i}")
        return named

    def forward(self, inputs: StepInputs, caches: Sequence[LayerCache]) -> torch.Tensor:
        shape = self.shape
        x = self._smeared(rms_norm(F.embedding(inputs.token_ids, self.embedding), None, shape.eps), inputs.previous_ids)
        first = x
        middle: torch.Tensor | None = None
        rotary = self.rotary.table(inputs.positions)
        for i, layer in enumerate(self.layers):
            if self.lambdas is not None:
                x = x * self.lambdas[i] + first * self.lambdas[shape.num_layers + i]
            x = layer.forward(x, rotary, caches[i], inputs)
            if i == shape.num_layers // 2:
                middle = x
        if self.backout_lambda is not None and middle is not None:
            x = x - middle * self.backout_lambda[0]
        if inputs.logit_rows is not None:
            x = x.index_select(0, inputs.logit_rows)
        logits = linear(rms_norm(x, None, shape.eps), self.head[: shape.vocab_size]).float()
        return logits if shape.cap is None else softcap(logits, shape.cap)

    def _smeared(self, x: torch.Tensor, previous_ids: torch.Tensor | None) -> torch.Tensor:
        """x [T, hidden] with a share of what x was at the token before; the first token of a sequence has none."""
        if self.smear_gate is None or self.smear_lambda is None:
            return x
        assert previous_ids is not None, "the step lacks the ids before its tokens"
        before = rms_norm(F.embedding(previous_ids.clamp(min=0), self.embedding), None, self.shape.eps)
        gate = torch.sigmoid(linear(x[:, : self.shape.smear_width], self.smear_gate)) * self.smear_lambda[0]
        return x + torch.where(previous_ids[:, None] >= 0, gate, 0.0) * before
