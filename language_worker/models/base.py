"""What every language model offers the runner, and what a step hands to it.

Tensors live here, in the models, in the runner, in `kv_cache.py` and in `state_store.py` only. A model knows positions
and weights; it does not know sequences, pages' owners or sampling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kernels.paged_attention import AttentionBatch
from kernels.quantise import LARGEST
from kernels.quantised_pages import LayerCache
from kernels.state_batch import StateBatch
from transfer.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class KVSpec:
    """What one token leaves in the cache: keys and values [num_kv_heads, head_dim] in every layer.

    head_groups: how many of a layer's key heads each of its caches holds, where those of different reach have theirs
    apart (empty: a layer has one cache for all).
    window: how many of its last keys a query sees at most, its own among them, in whichever layer; older ones are never
    read again (0: some layer sees all).
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    head_groups: tuple[int, ...] = ()

    @property
    def row_elements(self) -> int:
        """Numbers of one token over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Stored as `dtype`; in 8 bits each head of keys and values has a scale besides."""
        num_scales = self.row_elements // self.head_dim if dtype in LARGEST else 0
        return self.row_elements * dtype.itemsize + num_scales * torch.float32.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class StateTensor:
    """What one layer keeps of a sequence under one name. dtype: None for the model's."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StateSpec:
    """Recurrent state: what a sequence keeps in every layer beside its pages, of a size that does not grow.

    It stands for the first `kv_len` positions, for all of them and no other: it goes forward with a step, and else only
    to zeros or to a copy of another sequence's.
    """

    num_layers: int
    tensors: tuple[StateTensor, ...]

    def empty(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
        """The state before the first position: by name zeros [num_layers, *shape]."""
        return {
            tensor.name: torch.zeros((self.num_layers, *tensor.shape), dtype=tensor.dtype or dtype, device=device)
            for tensor in self.tensors
        }

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Of one sequence."""
        return sum(tensor.nbytes for tensor in self.empty(dtype, "meta").values())


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Sizes and ids the engine needs. media_token_id: the placeholder that media rows replace (None: text only).

    media_planes: what comes with every media row, each [hidden]: the first replaces the placeholder's embedding, each
    further one is added behind one of the first layers.
    default_model_len: longest sequence where nobody asks for more (0: max_position_embeddings). tool_machine: what runs
    between the model's tokens and writes into its output (None: nothing does). needs_previous_ids: the model reads the
    token before each query too. That is state which a sequence's own tokens give: it survives chunks, forks, prefix
    hits and preemption, and whoever moves a sequence's pages elsewhere moves its tokens with them and nothing else.
    mask_token_id: what stands where a token is yet to be chosen, in models that are decoded by filling in (None).
    unspoken: special tokens that such a model's answers never hold. system_prompt: what a conversation begins with that
    brings no such message of its own.
    state: what a sequence keeps beside its pages (None: nothing).
    """

    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    kv: KVSpec
    media_token_id: int | None
    media_planes: tuple[str, ...] = ("embeddings",)
    decode_strategy: str = "autoregressive"
    default_model_len: int = 0
    needs_previous_ids: bool = False
    tool_machine: str | None = None
    mask_token_id: int | None = None
    unspoken: tuple[str, ...] = ()
    system_prompt: str = ""
    state: StateSpec | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptPositions:
    """Positions of a prompt with media: ids [3, L] int64; a later token at index i has position i + delta."""

    ids: torch.Tensor
    delta: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaSpan:
    """Rows [n, hidden] that replace the embeddings at step indices `targets` [n] int64; deeper: rows [n, hidden] that
    are added there behind the first layer, the second, ..."""

    targets: torch.Tensor
    rows: torch.Tensor
    deeper: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StateStep:
    """Where the sequences of a step keep their recurrent state.

    layers: per layer the tensors of the spec, each [num_slots, *shape]. The step's first tokens are the only ones of
    their sequences, whose slots are `single` [S] int64; those behind them are the tokens of `batch`.
    """

    layers: Sequence[tuple[torch.Tensor, ...]]
    single: torch.Tensor
    batch: StateBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """One step: token_ids [T] int64; positions [T] or [3, T] int64; slots [T] int64; logit_rows [R] int64 or None
    for all T rows. Sequences lie one after the other. last_attention: of the `logit_rows` alone, for a last layer that
    computes no more than these; None where that saves nothing. previous_ids: [T] int64, the id before each token in its
    sequence and -1 before the first, for models that need them. states: for models that have any. num_threads: for a
    call that has threads of its own, where torch's are too slow to begin; 0 for as many as torch has."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    attention: AttentionBatch
    media: tuple[MediaSpan, ...]
    logit_rows: torch.Tensor | None
    last_attention: AttentionBatch | None = None
    previous_ids: torch.Tensor | None = None
    states: StateStep | None = None
    num_threads: int = 0


class LanguageModel(ABC):
    """A loaded model. `caches` passed to `forward`: per layer (and head group) keys and values, each
    [num_pages, page_size, num_kv_heads, head_dim]."""

    spec: ModelSpec

    @classmethod
    @abstractmethod
    def load(cls, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> LanguageModel:
        """Read the text half of a checkpoint; ModelNotSupported or CheckpointError name what is wrong."""

    @classmethod
    @abstractmethod
    def check(cls, checkpoint: Checkpoint) -> int:
        """What `load` would raise, found from the headers alone; returns the number of tensors it would read."""

    @classmethod
    @abstractmethod
    def read_spec(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Sizes from config.json alone; ModelNotSupported names an option that is not served."""

    @abstractmethod
    def reserve_positions(self, max_len: int) -> None:
        """Precompute what depends on positions below `max_len`."""

    def described_positions(self) -> str:
        """How keys come to depend on positions, now that those are reserved: equal for what makes equal keys."""
        return ""

    @abstractmethod
    def prompt_positions(
        self, length: int, media: Sequence[tuple[int, tuple[int, int, int]]]
    ) -> PromptPositions | None:
        """Positions of an expanded prompt whose media items start at `media[i][0]` with grid `media[i][1]`
        (temporal, height, width in patches); None when they are just 0, 1, 2, ..."""

    @abstractmethod
    def media_rows(self, grid: tuple[int, int, int]) -> int | None:
        """Tokens that one media item of this grid takes; None where only its sender can tell."""

    @abstractmethod
    def forward(self, inputs: StepInputs, caches: Sequence[LayerCache]) -> torch.Tensor:
        """Write this step's keys and values, return logits [R, vocab] in the model's dtype."""
