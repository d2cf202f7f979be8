"""Decoder: what all rotary decoder models share: embedding, blocks, final norm, head, and the step through them.

Built empty, filled by `load`. A family adds its config, its name map and, with media, their positions.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Self

import torch
import torch.nn.functional as F

from kernels.activation import swiglu
from kernels.decoder_layers import DecoderLayers
from kernels.invariance import tile_rows
from kernels.linear import Weight, linear
from kernels.quantised_matrix import QuantisedMatrix, Quantization, new_matrix
from kernels.quantised_pages import LayerCache
from kernels.rotary import RotaryTable
from kernels.stored_matrix import StoredMatrix
from language_worker.errors import MediaMismatch, ModelNotSupported
from language_worker.models.base import LanguageModel, ModelSpec, PromptPositions, StepInputs
from language_worker.models.feed_forward import ExpertMLP
from language_worker.models.layers import BlockShape, DecoderBlock, RotaryPositions, run_blocks, whole_layers
from language_worker.models.matrices import Storage
from language_worker.models.weights import require_zero_biases, spare_biases
from transfer.checkpoint import Checkpoint, check_checkpoint, load_checkpoint
from transfer.checkpoint_rules import Rule

logger = logging.getLogger(__name__)


class RuledModel(LanguageModel):
    """A text model that is built empty and filled by rules; a family with media overrides what asks for them."""

    rotary: RotaryPositions

    @classmethod
    @abstractmethod
    def empty(
        cls, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device
    ) -> tuple[Self, list[Rule], tuple[str, ...]]:
        """A model without its weights, the rules that fill it, and patterns of the names that belong to others."""

    @abstractmethod
    def parameters(self) -> Mapping[str, Weight]:
        """Every tensor to fill, by name."""

    @classmethod
    def load(cls, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> Self:
        model, rules, foreign = cls.empty(checkpoint, dtype=dtype, device=device)
        load_checkpoint(checkpoint, model.parameters(), rules, foreign=foreign)
        return model

    @classmethod
    def check(cls, checkpoint: Checkpoint) -> int:
        model, rules, foreign = cls.empty(checkpoint, dtype=torch.float32, device=torch.device("meta"))
        return len(check_checkpoint(checkpoint, model.parameters(), rules, foreign=foreign)[0])

    def reserve_positions(self, max_len: int) -> None:
        self.rotary.reserve(max_len)

    def described_positions(self) -> str:
        return self.rotary.described()

    def media_rows(self, grid: tuple[int, int, int]) -> int | None:
        raise MediaMismatch("this model takes text only")

    def prompt_positions(
        self, length: int, media: Sequence[tuple[int, tuple[int, int, int]]]
    ) -> PromptPositions | None:
        return None


class Decoder(RuledModel):
    """See the module. tied: the head is the embedding."""

    def __init__(
        self,
        spec: ModelSpec,
        block: BlockShape,
        rotary: RotaryPositions,
        *,
        tied: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.spec = spec
        self.embedding = torch.empty((spec.vocab_size, spec.hidden_size), dtype=dtype, device=device)
        shapes = [block.at_layer(i) for i in range(spec.kv.num_layers)]
        self.blocks = [DecoderBlock(shape, dtype=dtype, device=device) for shape in shapes]
        self.final_norm = torch.empty(spec.hidden_size, dtype=dtype, device=device)
        self.is_tied = tied
        self.head: Weight = self.embedding if tied else torch.empty_like(self.embedding)
        self.rotary = rotary

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, quantization: Quantization = "none"
    ) -> Self:
        """quantization: how the matrices of the blocks are stored; they are quantised as they are read. Those that the
        checkpoint has quantised stay so."""
        storage: Storage = "stored" if checkpoint.grouped else quantization
        is_plain = storage == "none"
        model, rules, foreign = cls.empty(checkpoint, dtype=dtype, device=device if is_plain else torch.device("cpu"))
        if not is_plain:  # nothing of it was touched yet: on the CPU it costs no memory
            model.quantise(storage, device)
        require_zero_biases(checkpoint)
        foreign = (*foreign, *spare_biases(checkpoint))
        report = load_checkpoint(checkpoint, model.parameters(), rules, foreign=foreign)
        for block in model.blocks:
            block.finish()
        if isinstance(model.head, QuantisedMatrix):
            if model.is_tied:
                model.head.copy_(model.embedding)
            model.head = model.head.finish()
        if report.num_grouped:
            kept = sum(w.num_parts for w in model.parameters().values() if isinstance(w, StoredMatrix))
            widened = report.num_grouped - kept
            logger.info(
                "of the quantised matrices %d are kept as they are stored, %d widened to %s", kept, widened, dtype
            )
        return model

    @classmethod
    def check(cls, checkpoint: Checkpoint) -> int:
        model, rules, foreign = cls.empty(checkpoint, dtype=torch.float32, device=torch.device("meta"))
        foreign = (*foreign, *spare_biases(checkpoint))
        return len(check_checkpoint(checkpoint, model.parameters(), rules, foreign=foreign)[0])

    def quantise(self, method: Storage, device: torch.device) -> None:
        """Before it is filled: the blocks' matrices in the format that `method` names, everything on `device`; the head
        in 8 bits whatever that is, or as it is stored. ModelNotSupported where the format cannot hold them."""
        vocab_size, hidden_size = self.embedding.shape
        dtype = self.embedding.dtype
        self.embedding, self.final_norm = self.embedding.to(device), self.final_norm.to(device)
        if method != "stored":
            self.head = new_matrix("int8", vocab_size, hidden_size, dtype=dtype, device=device)
        elif self.is_tied:
            self.head = self.embedding
        else:
            self.head = StoredMatrix(vocab_size, hidden_size, dtype=dtype, device=device)
        self.rotary.move(device)
        try:
            for block in self.blocks:
                block.quantise(method, device)
        except ValueError as error:
            raise ModelNotSupported(f"quantization {method!r} does not serve this model: {error}") from error

    def tile_rows(self) -> int:
        """Rows of a tile in which this machine's ops treat all rows alike, for batch-invariant steps. ModelNotSupported
        where those are not served."""
        if self.spec.mask_token_id is not None or any(isinstance(block.mlp, ExpertMLP) for block in self.blocks):
            raise ModelNotSupported(
                "batch_invariant is not served for mixtures of experts and models that fill in masks"
            )
        generator = torch.Generator().manual_seed(0)

        def row(size: int) -> torch.Tensor:
            return torch.randn(1, size, generator=generator).to(self.final_norm)

        matrices = {(type(w), tuple(w.shape)): w for w in self.parameters().values() if len(w.shape) == 2}
        products = [(partial(linear, weight=w), row(w.shape[1])) for w in matrices.values()]
        return tile_rows([*products, (swiglu, row(2 * self.blocks[0].shape.intermediate_size))])

    def parameters(self) -> dict[str, Weight]:
        """Every tensor to fill, by name; a tied head is not listed twice."""
        named: dict[str, Weight] = {"embedding.weight": self.embedding, "final_norm.weight": self.final_norm}
        if not self.is_tied:
            named["head.weight"] = self.head
        for i, block in enumerate(self.blocks):
            named |= block.parameters(f"layers.{i}")
        return named

    def forward(self, inputs: StepInputs, caches: Sequence[LayerCache]) -> torch.Tensor:
        hidden = F.embedding(inputs.token_ids, self.embedding)
        for span in inputs.media:
            hidden.index_copy_(0, span.targets, span.rows)
        rotary = self.rotary.table(inputs.positions)
        rows = self._in_one_call(hidden, rotary, caches, inputs)
        if rows is None:
            rows = run_blocks(self.blocks, hidden, self.final_norm, rotary, caches, inputs)
        return linear(rows, self.head)

    @cached_property
    def _whole_layers(self) -> DecoderLayers | None:
        return whole_layers(self.blocks)

    def _in_one_call(
        self, hidden: torch.Tensor, rotary: RotaryTable, caches: Sequence[LayerCache], inputs: StepInputs
    ) -> torch.Tensor | None:
        """What `run_blocks` returns, where one call can do it; otherwise None, with nothing touched."""
        if self._whole_layers is None or any(span.deeper for span in inputs.media):
            return None
        layers, threads = self._whole_layers, inputs.num_threads
        rows = layers.forward(hidden, self.final_norm, rotary, caches, inputs.slots, inputs.attention, threads)
        return rows if rows is None or inputs.logit_rows is None else rows.index_select(0, inputs.logit_rows)


def refuse_unserved(text: Mapping[str, Any]) -> None:
    """ModelNotSupported for options that would change the numbers and are not served."""
    if text.get("hidden_act", "silu") != "silu":
        raise ModelNotSupported(f"hidden_act {text.get('hidden_act')!r} is not served; only 'silu' is")
    if text.get("mlp_bias"):
        raise ModelNotSupported("mlp_bias is true; biases in the MLP are not served")
