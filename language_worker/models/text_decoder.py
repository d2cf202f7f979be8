"""Text-only decoder families: Llama, Mistral, Ministral, Qwen2 and Qwen3.

One body; they differ in biases (read off the checkpoint), in Qwen3's norm of every query and key head, in which layers
have sliding windows, and in defaults.
Those with a mixture of experts are in `text_moe.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from language_worker.errors import ModelNotSupported
from language_worker.models.base import KVSpec, ModelSpec
from language_worker.models.config_values import read_amount, read_size
from language_worker.models.decoder import Decoder, refuse_unserved
from language_worker.models.layers import BlockShape, RotaryPositions
from language_worker.models.rope import Rope
from language_worker.models.weights import HF_EXPERTS, ExpertNames, decoder_rules
from language_worker.models.windows import (
    WindowRule,
    all_layers,
    kept_by_all,
    listed_layers,
    none_slide,
    upper_layers,
)
from transfer.checkpoint import Checkpoint
from transfer.checkpoint_rules import Rule

PREFIX = r"model\."
QWEN3_HEAD_DIM = 128  # where its config.json does not say


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """What config.json says of a text decoder; biases are not in it."""

    spec: ModelSpec
    block: BlockShape
    rope: Rope
    tied: bool

    @classmethod
    def read(cls, config: Mapping[str, Any], *, has_qk_norm: bool, window_rule: WindowRule = none_slide) -> TextConfig:
        """ModelNotSupported names an option that is not served."""
        refuse_unserved(config)
        hidden, heads = read_size(config, "hidden_size"), read_size(config, "num_attention_heads")
        kv_heads = read_size(config, "num_key_value_heads", heads)
        head_dim = read_size(config, "head_dim", QWEN3_HEAD_DIM if has_qk_norm else hidden // heads)
        if heads % kv_heads or head_dim % 2:
            raise ModelNotSupported(
                f"{heads} heads must be a multiple of {kv_heads} key heads, and head_dim {head_dim} even"
            )
        rope = Rope.read(config, 10_000.0)
        layers = read_size(config, "num_hidden_layers")
        windows = window_rule(config, layers)
        kv = KVSpec(num_layers=layers, num_kv_heads=kv_heads, head_dim=head_dim, window=kept_by_all(windows))
        spec = ModelSpec(
            vocab_size=read_size(config, "vocab_size"),
            hidden_size=hidden,
            max_position_embeddings=rope.max_positions(read_size(config, "max_position_embeddings", 2048)),
            kv=kv,
            media_token_id=None,
        )
        block = BlockShape(
            hidden_size=hidden,
            intermediate_size=read_size(config, "intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            eps=read_amount(config, "rms_norm_eps", 1e-6),
            has_qk_norm=has_qk_norm,
            windows=windows,
        )
        return cls(spec=spec, block=block, rope=rope, tied=bool(config.get("tie_word_embeddings")))


class Llama(Decoder):
    """Llama 2 and 3, and whatever was converted to their layout.

    foreign: patterns of names that are not read. expert_names: of the parts of a mixture, where there is one.
    window_rule: which layers slide.
    """

    has_qk_norm = False
    window_rule: WindowRule = staticmethod(none_slide)
    expert_names: ExpertNames = HF_EXPERTS
    foreign: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)

    @classmethod
    def read_config(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> TextConfig:
        """From config.json and the checkpoint's tensor names (none: sizes only). Raises ModelNotSupported."""
        return TextConfig.read(config, has_qk_norm=cls.has_qk_norm, window_rule=cls.window_rule)

    @classmethod
    def read_spec(cls, config: Mapping[str, Any]) -> ModelSpec:
        return cls.read_config(config).spec

    @classmethod
    def empty(
        cls, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device
    ) -> tuple[Self, list[Rule], tuple[str, ...]]:
        config = cls.read_config(checkpoint.config(), checkpoint.tensors)
        block = config.block.with_biases(checkpoint.tensors, PREFIX)
        rotary = RotaryPositions(config.rope, head_dim=block.head_dim, device=device)
        model = cls(config.spec, block, rotary, tied=config.tied, dtype=dtype, device=device)
        foreign = (*cls.foreign, *((r"lm_head\.weight",) if config.tied else ()))
        return model, decoder_rules(block, prefix=PREFIX, tied=config.tied, experts=cls.expert_names), foreign


class Mistral(Llama):
    """Mistral: every layer slides, or none."""

    window_rule = staticmethod(all_layers)


class Ministral(Llama):
    """Ministral: Mistral whose layers may differ."""

    window_rule = staticmethod(listed_layers)


class Qwen2(Llama):
    """Qwen2 and Qwen2.5."""

    window_rule = staticmethod(upper_layers)


class Qwen3(Qwen2):
    """Qwen3, dense."""

    has_qk_norm = True
