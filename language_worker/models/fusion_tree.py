"""FusionTree: in every layer a state space branch beside attention, blended channel by channel.

    xn        = norm(x)
    m         = mamba(xn + code of the position)
    a         = attention(xn): queries and keys rotated; all heads but the last see a window, the last ones every key
    aligned   = W2 gelu(W0 [m; a]) + Wr [m; a], or the mean of both
    g         = sigmoid(d tanh(u aligned))
    x         = norm(x + fusion(g m + (1 - g) a) + mlp(aligned))

The semantics are those that the training code defines densely: query i of a window w sees keys i - w // 2 to i, codes
are those of absolute positions. Positions begin with a sequence's first token, and there is no padding in a step, so
what a request gives does not depend on others. Which checkpoint says what is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from kernels.activation import gelu
from kernels.attention_mask import CAUSAL, AttentionMask
from kernels.gates import sigmoid_blend
from kernels.linear import linear
from kernels.paged_attention import paged_attention
from kernels.pages import write_pages
from kernels.quantised_pages import LayerCache
from kernels.rotary import RotaryTable, rotate
from language_worker.models.affine import Affine, Norm
from language_worker.models.base import KVSpec, ModelSpec, StepInputs
from language_worker.models.decoder import RuledModel
from language_worker.models.layers import RotaryPositions
from language_worker.models.mamba import MambaMixer, MambaShape
from language_worker.models.rope import Rope

CodeKind = Literal["table", "lowrank", "sincos"]
BLOCK_EPS = 1e-5  # of the norms of layers, whatever the last one's is
STATE_SIZE, CONV_WIDTH, STEP_DIVISOR = 64, 4, 16  # of the state space branch: the same in every checkpoint
ROPE_BASE = 10_000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FusionTreeShape:
    """Sizes and options of one checkpoint.

    windows: per layer, keys before its own that a query of a local head sees. num_global: heads that see all, the last
    ones. code: how positions are encoded for the state space branch, of rank code_rank where it is "lowrank";
    is_shared: in one way for all layers. has_alignment: the branches are aligned by a network, not by their mean.
    """

    vocab_size: int
    hidden_size: int
    num_heads: int
    num_global: int
    windows: tuple[int, ...]
    gate_rank: int
    max_positions: int
    eps: float
    code: CodeKind
    code_rank: int
    is_shared: bool
    has_alignment: bool
    tied: bool

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def head_groups(self) -> tuple[int, ...]:
        """Local and global heads, those of which there are any."""
        return tuple(count for count in (self.num_heads - self.num_global, self.num_global) if count)

    @property
    def mamba(self) -> MambaShape:
        return MambaShape(
            hidden_size=self.hidden_size,
            inner_size=2 * self.hidden_size,
            state_size=STATE_SIZE,
            dt_rank=-(-self.hidden_size // STEP_DIVISOR),
            width=CONV_WIDTH,
        )

    def spec(self) -> ModelSpec:
        return ModelSpec(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            max_position_embeddings=self.max_positions,
            kv=KVSpec(
                num_layers=self.num_layers,
                num_kv_heads=self.num_heads,
                head_dim=self.head_dim,
                head_groups=self.head_groups,
            ),
            media_token_id=None,
            state=self.mamba.state(self.num_layers),
        )


class PositionCode:
    """What is added to the state space branch's input at each position: rows of a table [P, hidden], of a table [P, r]
    that is projected, or sines and cosines in turn."""

    __slots__ = ("frequencies", "proj", "table")

    def __init__(self, shape: FusionTreeShape, *, dtype: torch.dtype, device: torch.device) -> None:
        self.table = self.proj = self.frequencies = None
        if shape.code == "sincos":
            self.frequencies = torch.empty(shape.hidden_size // 2, dtype=torch.float32, device=device)
            return
        width = shape.code_rank if shape.code == "lowrank" else shape.hidden_size
        self.table = torch.empty((shape.max_positions, width), dtype=dtype, device=device)
        if shape.code == "lowrank":
            self.proj = torch.empty((shape.hidden_size, width), dtype=dtype, device=device)

    def parameters(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors to fill, by name under `prefix`."""
        named = {"table": self.table, "proj": self.proj, "frequencies": self.frequencies}
        return {f"{prefix}.{name}": tensor for name, tensor in named.items() if tensor is not None}

    def rows(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """positions [T] -> [T, hidden]."""
        if self.table is None:
            assert self.frequencies is not None
            angles = positions.to(torch.float32)[:, None] * self.frequencies
            return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1).to(dtype)
        rows = self.table.index_select(0, positions)
        return rows if self.proj is None else linear(rows, self.proj)


class FusionTreeLayer:
    """One layer. qkv stacks query, key and value heads; `align` is W0 on Wr."""

    def __init__(self, shape: FusionTreeShape, index: int, *, dtype: torch.dtype, device: torch.device) -> None:
        def affine(rows: int, columns: int, has_bias: bool = True) -> Affine:
            return Affine(rows, columns, has_bias=has_bias, dtype=dtype, device=device)

        hidden = shape.hidden_size
        self.shape = shape
        self.mask = AttentionMask(window=shape.windows[index] + 1)
        self.input_norm = Norm(hidden, BLOCK_EPS, dtype=dtype, device=device)
        self.code = None if shape.is_shared else PositionCode(shape, dtype=dtype, device=device)
        self.mamba = MambaMixer(shape.mamba, dtype=dtype, device=device)
        self.qkv = affine(3 * hidden, hidden, has_bias=False)
        self.attention_out = affine(hidden, hidden)
        self.align = affine(2 * hidden, 2 * hidden) if shape.has_alignment else None
        self.align_out = affine(hidden, hidden) if shape.has_alignment else None
        self.gate_down = affine(shape.gate_rank, hidden, has_bias=False)
        self.gate_up = affine(hidden, shape.gate_rank, has_bias=False)
        self.fusion = affine(hidden, hidden)
        self.mlp_up, self.mlp_down = affine(2 * hidden, hidden), affine(hidden, 2 * hidden)
        self.output_norm = Norm(hidden, BLOCK_EPS, dtype=dtype, device=device)

    def parameters(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors to fill, by name under `prefix`."""
        named: dict[str, torch.Tensor] = {}
        for name, part in vars(self).items():
            if isinstance(part, (Affine, Norm, PositionCode, MambaMixer)):
                named |= part.parameters(f"{prefix}.{name}")
        return named

    def forward(
        self,
        x: torch.Tensor,
        code: torch.Tensor | None,
        rotary: RotaryTable,
        caches: Sequence[LayerCache],
        state: tuple[torch.Tensor, ...],
        inputs: StepInputs,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden], or rows [R, hidden] of it. code: of the positions, where layers share it."""
        normed = self.input_norm(x)
        if self.code is not None:
            code = self.code.rows(inputs.positions, x.dtype)
        assert code is not None and inputs.states is not None
        mamba = self.mamba.forward(normed + code, state, inputs.states)
        attended = self._attend(normed, rotary, caches, inputs)
        if rows is not None:
            x, mamba, attended = (part.index_select(0, rows) for part in (x, mamba, attended))
        return self._fuse(x, mamba, self.attention_out(attended))

    def _attend(
        self, normed: torch.Tensor, rotary: RotaryTable, caches: Sequence[LayerCache], inputs: StepInputs
    ) -> torch.Tensor:
        """[T, hidden] -> what all heads saw [T, hidden]."""
        shape = self.shape
        heads = shape.num_heads
        qkv = self.qkv(normed).view(-1, 3 * heads, shape.head_dim)
        qk, values = rotate(qkv[:, : 2 * heads], rotary), qkv[:, 2 * heads :]
        num_local = heads - shape.num_global
        mixed, first = [], 0
        for (key_cache, value_cache), count in zip(caches, shape.head_groups, strict=True):
            end = first + count
            write_pages(key_cache, value_cache, qk[:, heads + first : heads + end], values[:, first:end], inputs.slots)
            is_local = end <= num_local and max(inputs.attention.kv_lens) > self.mask.window
            mask = self.mask if is_local else CAUSAL
            mixed.append(paged_attention(qk[:, first:end], key_cache, value_cache, inputs.attention, mask=mask))
            first = end
        return torch.cat(mixed, dim=1).flatten(1)

    def _fuse(self, x: torch.Tensor, mamba: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        if self.align is None or self.align_out is None:
            aligned = (mamba + attended) / 2
        else:
            inner, direct = self.align(torch.cat((mamba, attended), dim=1)).chunk(2, dim=1)
            aligned = self.align_out(gelu(inner)) + direct
        gate = self.gate_up(torch.tanh(self.gate_down(aligned)))
        fused = self.fusion(sigmoid_blend(gate, mamba, attended))
        return self.output_norm(x + fused + self.mlp_down(gelu(self.mlp_up(aligned))))


class FusionTree(RuledModel):
    """See the module."""

    def __init__(self, shape: FusionTreeShape, *, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.spec = shape.spec()
        self.embedding = torch.empty((shape.vocab_size, shape.hidden_size), dtype=dtype, device=device)
        self.code = PositionCode(shape, dtype=dtype, device=device) if shape.is_shared else None
        self.layers = [FusionTreeLayer(shape, i, dtype=dtype, device=device) for i in range(shape.num_layers)]
        self.final_norm = Norm(shape.hidden_size, shape.eps, dtype=dtype, device=device)
        self.head = self.embedding if shape.tied else torch.empty_like(self.embedding)
        self.rotary = RotaryPositions(Rope(theta=ROPE_BASE), head_dim=shape.head_dim, device=device)

    def parameters(self) -> dict[str, torch.Tensor]:
        named = {"embedding": self.embedding, **self.final_norm.parameters("final_norm")}
        if self.head is not self.embedding:
            named["head"] = self.head
        if self.code is not None:
            named |= self.code.parameters("code")
        for i, layer in enumerate(self.layers):
            named |= layer.parameters(f"layers.{i}")
        return named

    def forward(self, inputs: StepInputs, caches: Sequence[LayerCache]) -> torch.Tensor:
        assert inputs.states is not None, "the step lacks its sequences' recurrent state"
        x = F.embedding(inputs.token_ids, self.embedding)
        code = None if self.code is None else self.code.rows(inputs.positions, x.dtype)
        rotary = self.rotary.table(inputs.positions)
        num_groups, last = len(self.shape.head_groups), self.shape.num_layers - 1
        for i, layer in enumerate(self.layers):
            own = caches[i * num_groups : (i + 1) * num_groups]
            rows = inputs.logit_rows if i == last else None
            x = layer.forward(x, code, rotary, own, inputs.states.layers[i], inputs, rows)
        return linear(self.final_norm(x), self.head)
