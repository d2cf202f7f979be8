"""The text half of Qwen2.5-VL: a Qwen2 decoder with M-RoPE positions, fed with text and media embeddings.

Reads both published key layouts (`model.layers.*` beside `visual.*`, and `model.language_model.*` beside
`model.visual.*`); the vision tower's keys belong to the embedding worker. Query, key and value biases are honoured
when the checkpoint holds them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from language_worker.errors import ModelNotSupported
from language_worker.models.base import KVSpec, LanguageModel, ModelSpec, PromptPositions, StepInputs
from language_worker.models.layers import BlockShape, DecoderBlock, RotaryPositions, run_blocks
from language_worker.models.mrope import Grid, mrope_positions
from language_worker.models.weights import decoder_rules
from transfer.checkpoint import Checkpoint, check_checkpoint, load_checkpoint
from transfer.checkpoint_rules import Rule

DEFAULT_SECTIONS = (16, 24, 24)
DEFAULT_THETA = 1_000_000.0
FOREIGN = (r"(model\.)?visual\..*",)
TEXT_PREFIX = r"model\.(?:language_model\.)?"


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen2_5_VLConfig:
    """What the text half takes from config.json."""

    spec: ModelSpec
    block: BlockShape
    theta: float
    sections: tuple[int, ...]
    tied: bool
    merge_size: int

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Qwen2_5_VLConfig:
        """From a flat (published) or nested (`text_config`) config.json; ModelNotSupported names a bad option."""
        text = {**config, **(config.get("text_config") or {})}
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        _refuse_unserved(text, rope)
        hidden, heads = _size(text, "hidden_size"), _size(text, "num_attention_heads")
        kv_heads = int(text.get("num_key_value_heads") or heads)
        head_dim = int(text.get("head_dim") or hidden // heads)
        sections = tuple(rope.get("mrope_section") or DEFAULT_SECTIONS)
        if sum(sections) * 2 != head_dim or heads % kv_heads:
            raise ModelNotSupported(
                f"mrope_section {list(sections)} must add up to half of head_dim {head_dim}, and "
                f"{heads} heads must be a multiple of {kv_heads} key heads"
            )
        layers = _size(text, "num_hidden_layers")
        spec = ModelSpec(
            vocab_size=_size(text, "vocab_size"),
            hidden_size=hidden,
            max_position_embeddings=int(text.get("max_position_embeddings") or 32768),
            kv=KVSpec(num_layers=layers, num_kv_heads=kv_heads, head_dim=head_dim),
            media_token_id=int(config.get("image_token_id", 151655)),
        )
        block = BlockShape(
            hidden_size=hidden,
            intermediate_size=_size(text, "intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            eps=float(text.get("rms_norm_eps", 1e-5)),
        )
        return cls(
            spec=spec,
            block=block,
            theta=float(rope.get("rope_theta") or text.get("rope_theta") or DEFAULT_THETA),
            sections=sections,
            tied=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            merge_size=int((config.get("vision_config") or {}).get("spatial_merge_size", 2)),
        )


class Qwen2_5_VLText(LanguageModel):
    """See the module. Built empty, filled by `load`."""

    def __init__(self, config: Qwen2_5_VLConfig, *, qkv_bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.spec = config.spec
        spec, block = config.spec, config.block
        self.embedding = torch.empty((spec.vocab_size, spec.hidden_size), dtype=dtype, device=device)
        self.blocks = [
            DecoderBlock(block, qkv_bias=qkv_bias, dtype=dtype, device=device) for _ in range(spec.kv.num_layers)
        ]
        self.final_norm = torch.empty(spec.hidden_size, dtype=dtype, device=device)
        self.head = self.embedding if config.tied else torch.empty_like(self.embedding)
        self.rotary = RotaryPositions(
            head_dim=block.head_dim, theta=config.theta, sections=config.sections, device=device
        )

    @classmethod
    def read_spec(cls, config: Mapping[str, Any]) -> ModelSpec:
        return Qwen2_5_VLConfig.read(config).spec

    @classmethod
    def load(cls, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> Qwen2_5_VLText:
        model, rules, foreign = cls._empty(checkpoint, dtype, device)
        load_checkpoint(checkpoint, model.parameters(), rules, foreign=foreign)
        return model

    @classmethod
    def check(cls, checkpoint: Checkpoint) -> int:
        model, rules, foreign = cls._empty(checkpoint, torch.float32, torch.device("meta"))
        return len(check_checkpoint(checkpoint, model.parameters(), rules, foreign=foreign)[0])

    @classmethod
    def _empty(
        cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
    ) -> tuple[Qwen2_5_VLText, list[Rule], tuple[str, ...]]:
        """A model without its weights, the rules that fill it, and the names that belong to somebody else."""
        config = Qwen2_5_VLConfig.read(checkpoint.config())
        has_bias = any(re.fullmatch(TEXT_PREFIX + r"layers\.0\.self_attn\.q_proj\.bias", n) for n in checkpoint.tensors)
        model = cls(config, qkv_bias=has_bias, dtype=dtype, device=device)
        foreign = FOREIGN + ((r"lm_head\.weight",) if config.tied else ())
        return model, decoder_rules(config.block, prefix=TEXT_PREFIX, qkv_bias=has_bias, tied=config.tied), foreign

    def parameters(self) -> dict[str, torch.Tensor]:
        """Every tensor to fill, by name; a tied head is not listed twice."""
        named = {"embedding.weight": self.embedding, "final_norm.weight": self.final_norm}
        if self.head is not self.embedding:
            named["head.weight"] = self.head
        for i, block in enumerate(self.blocks):
            named |= block.parameters(f"layers.{i}")
        return named

    def reserve_positions(self, max_len: int) -> None:
        self.rotary.reserve(max_len)

    def media_rows(self, grid: Grid) -> int:
        t, h, w = self._merged(grid)
        return t * h * w

    def prompt_positions(self, length: int, media: Sequence[tuple[int, Grid]]) -> PromptPositions | None:
        if not media:
            return None
        return mrope_positions(length, [(start, self._merged(grid)) for start, grid in media])

    def forward(self, inputs: StepInputs, caches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        hidden = F.embedding(inputs.token_ids, self.embedding)
        for span in inputs.media:
            hidden.index_copy_(0, span.targets, span.rows)
        rotary = self.rotary.table(inputs.positions)
        rows = run_blocks(
            self.blocks, hidden, self.final_norm, rotary, caches, inputs.slots, inputs.attention, inputs.logit_rows
        )
        return F.linear(rows, self.head)

    def _merged(self, grid: Grid) -> Grid:
        """Grid of merged cells (tokens) from a grid of patches."""
        merge = self.config.merge_size
        return grid[0], grid[1] // merge, grid[2] // merge


def _size(text: Mapping[str, Any], name: str) -> int:
    value = text.get(name)
    if type(value) is not int or value < 1:
        raise ModelNotSupported(f"config.json has {name} = {value!r}; a positive integer is needed")
    return value


def _refuse_unserved(text: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ModelNotSupported(f"rotary scaling {kind!r} is not served; only the default M-RoPE is")
    if text.get("use_sliding_window"):
        raise ModelNotSupported("use_sliding_window is true; sliding-window attention is not served")
    if text.get("hidden_act", "silu") != "silu":
        raise ModelNotSupported(f"hidden_act {text.get('hidden_act')!r} is not served; only 'silu' is")
