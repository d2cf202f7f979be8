"""The text half of Qwen2.5-VL: a Qwen2 decoder with M-RoPE positions, fed with text and media embeddings.

Reads both published key layouts (`model.layers.*` beside `visual.*`, and `model.language_model.*` beside
`model.visual.*`); the vision tower's keys belong to the embedding worker. Query, key and value biases are honoured
when the checkpoint holds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from language_worker.errors import ModelNotSupported
from language_worker.models.base import KVSpec, ModelSpec, PromptPositions
from language_worker.models.config_values import read_amount, read_count, read_size, read_theta
from language_worker.models.decoder import Decoder, refuse_unserved
from language_worker.models.layers import BlockShape, RotaryPositions
from language_worker.models.mrope import Grid, mrope_positions
from language_worker.models.rope import Rope
from language_worker.models.weights import decoder_rules
from language_worker.models.windows import WindowRule, kept_by_all, upper_layers
from transfer.checkpoint import Checkpoint
from transfer.checkpoint_rules import Rule

DEFAULT_SECTIONS = (16, 24, 24)
DEFAULT_THETA = 1_000_000.0
DEFAULT_WINDOW_LAYERS = 80
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
    interleaved: bool = False

    @classmethod
    def read(
        cls,
        config: Mapping[str, Any],
        *,
        sections: tuple[int, ...] = DEFAULT_SECTIONS,
        theta: float = DEFAULT_THETA,
        window_rule: WindowRule = upper_layers,
    ) -> Qwen2_5_VLConfig:
        """From a flat (published) or nested (`text_config`) config.json; ModelNotSupported names a bad option.

        sections, theta: where config.json does not say."""
        text = {**config, **(config.get("text_config") or {})}
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        _refuse_unserved(text, rope)
        hidden, heads = read_size(text, "hidden_size"), read_size(text, "num_attention_heads")
        kv_heads = read_size(text, "num_key_value_heads", heads)
        head_dim = read_size(text, "head_dim", hidden // heads)
        sections = tuple(rope.get("mrope_section") or sections)
        if sum(sections) * 2 != head_dim or heads % kv_heads:
            raise ModelNotSupported(
                f"mrope_section {list(sections)} must add up to half of head_dim {head_dim}, and "
                f"{heads} heads must be a multiple of {kv_heads} key heads"
            )
        layers = read_size(text, "num_hidden_layers")
        windows = window_rule({"max_window_layers": DEFAULT_WINDOW_LAYERS, **text}, layers)
        spec = ModelSpec(
            vocab_size=read_size(text, "vocab_size"),
            hidden_size=hidden,
            max_position_embeddings=read_size(text, "max_position_embeddings", 32768),
            kv=KVSpec(num_layers=layers, num_kv_heads=kv_heads, head_dim=head_dim, window=kept_by_all(windows)),
            media_token_id=read_count(config, "image_token_id", 151655),
        )
        block = BlockShape(
            hidden_size=hidden,
            intermediate_size=read_size(text, "intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            eps=read_amount(text, "rms_norm_eps", 1e-5),
            windows=windows,
        )
        return cls(
            spec=spec,
            block=block,
            theta=read_theta(rope, text, theta),
            sections=sections,
            tied=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            merge_size=read_size(config.get("vision_config") or {}, "spatial_merge_size", 2),
        )


class Qwen2_5_VLText(Decoder):
    """See the module."""

    def __init__(
        self, config: Qwen2_5_VLConfig, block: BlockShape, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        rope = Rope(theta=config.theta)
        rotary = RotaryPositions(
            rope, head_dim=block.head_dim, device=device, sections=config.sections, interleaved=config.interleaved
        )
        super().__init__(config.spec, block, rotary, tied=config.tied, dtype=dtype, device=device)
        self.config = config

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> Qwen2_5_VLConfig:
        """From config.json. Raises ModelNotSupported."""
        return Qwen2_5_VLConfig.read(config)

    @classmethod
    def read_spec(cls, config: Mapping[str, Any]) -> ModelSpec:
        return cls.read_config(config).spec

    @classmethod
    def empty(
        cls, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device
    ) -> tuple[Self, list[Rule], tuple[str, ...]]:
        config = cls.read_config(checkpoint.config())
        block = config.block.with_biases(checkpoint.tensors, TEXT_PREFIX)
        model = cls(config, block, dtype=dtype, device=device)
        foreign = FOREIGN + ((r"lm_head\.weight",) if config.tied else ())
        return model, decoder_rules(block, prefix=TEXT_PREFIX, tied=config.tied), foreign

    def media_rows(self, grid: Grid) -> int:
        t, h, w = self._merged(grid)
        return t * h * w

    def prompt_positions(self, length: int, media: Sequence[tuple[int, Grid]]) -> PromptPositions | None:
        if not media:
            return None
        return mrope_positions(length, [(start, self._merged(grid)) for start, grid in media])

    def _merged(self, grid: Grid) -> Grid:
        """Grid of merged cells (tokens) from a grid of patches."""
        merge = self.config.merge_size
        return grid[0], grid[1] // merge, grid[2] // merge


def _refuse_unserved(text: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ModelNotSupported(f"rotary scaling {kind!r} is not served; only the default M-RoPE is")
    refuse_unserved(text)
