"""MiniMind 2 and 3, dense and with experts, as their own `MiniMindForCausalLM`.

A Llama body (2) or a Qwen3 body (3): which one, the norms of query and key heads in the checkpoint say. Owns the
defaults that its config.json leaves out. What was converted to Llama's or Qwen3's layout is served by those families.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from language_worker.errors import ModelNotSupported
from language_worker.models.config_values import read_size
from language_worker.models.feed_forward import ExpertShape
from language_worker.models.text_decoder import Llama, TextConfig
from language_worker.models.text_moe import with_experts

DEFAULTS = {
    "vocab_size": 6400,
    "hidden_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
YARN = {
    "type": "yarn",
    "factor": 16,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": 1.0,
}
BUFFERS = r"(?:model\.)?(?:layers\.\d+\.(?:self_attn|attention)\.)?(?:mask|pos_cis|freqs_cis|freqs_cos|freqs_sin)"
ROUND = 64  # sizes of MLPs are multiples of it


class MiniMind(Llama):
    """See the module."""

    foreign: tuple[str, ...] = (BUFFERS,)

    @classmethod
    def read_config(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> TextConfig:
        has_qk_norm = any(name.endswith((".q_norm.weight", ".k_norm.weight")) for name in names)
        full = with_defaults(config)
        text = TextConfig.read(full, has_qk_norm=has_qk_norm)
        return with_experts(text, _experts(full), names) if full.get("use_moe") else text


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what it leaves out; YaRN only where it is switched on and positions go beyond those trained."""
    full = {**DEFAULTS, **{name: value for name, value in config.items() if value is not None}}
    hidden, heads = read_size(full, "hidden_size"), read_size(full, "num_attention_heads")
    full.setdefault("head_dim", hidden // heads)
    full.setdefault("num_key_value_heads", 2 if is_second(config) else 4)
    full.setdefault("rms_norm_eps", 1e-5 if is_second(config) else 1e-6)
    full.setdefault("intermediate_size", _inner(hidden * 8 // 3 if is_second(config) else hidden * math.pi))
    scaling = {**YARN, **full.pop("rope_parameters", {}), **full.pop("rope_scaling", {})}
    full["rope_theta"] = scaling.get("rope_theta", full["rope_theta"])
    is_scaled = full.get("inference_rope_scaling") and scaling.get("rope_type", scaling["type"]) == "yarn"
    if is_scaled and full["max_position_embeddings"] > scaling["original_max_position_embeddings"]:
        full["rope_scaling"] = scaling
    return full


def is_second(config: Mapping[str, Any]) -> bool:
    """Whether this is MiniMind 2's: it counts its experts under another name, and does so where it has none."""
    return "n_routed_experts" in config


def _inner(size: float) -> int:
    return math.ceil(size / ROUND) * ROUND


def _experts(config: Mapping[str, Any]) -> ExpertShape:
    inner = int(config.get("moe_intermediate_size") or config["intermediate_size"])
    normalise = bool(config.get("norm_topk_prob", True))
    if not is_second(config):
        return ExpertShape(
            num_experts=int(config.get("num_experts", 4)),
            top_k=int(config.get("num_experts_per_tok", 1)),
            intermediate_size=inner,
            normalise=normalise,
        )
    if config.get("scoring_func", "softmax") != "softmax":
        raise ModelNotSupported(f"scoring_func {config['scoring_func']!r} is not served; only 'softmax' is")
    top_k = int(config.get("num_experts_per_tok", 2))
    return ExpertShape(
        num_experts=read_size(config, "n_routed_experts"),
        top_k=top_k,
        intermediate_size=inner,
        normalise=normalise and top_k > 1,
        num_shared=int(config.get("n_shared_experts", 1)),
        shared_size=inner,
    )
