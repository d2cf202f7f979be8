"""Text decoders with a mixture of experts: Mixtral, Qwen2-MoE, Qwen3-MoE and dots.llm1.

The bodies of `text_decoder.py`; they differ in how many experts a token takes, whether the weights of those it takes
add up to 1, which layers are dense, and whether an expert is shared by all tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from language_worker.errors import ModelNotSupported
from language_worker.models.config_values import read_amount, read_size
from language_worker.models.feed_forward import ExpertShape, GroupedRouting
from language_worker.models.text_decoder import Llama, TextConfig
from language_worker.models.weights import ExpertNames
from language_worker.models.windows import (
    all_layers_if_given,
    every_other_layer,
    switched_for_all,
    upper_layers_unswitched,
)

STACKED = ".experts.gate_up_proj"


class Qwen3Moe(Llama):
    """Qwen3-MoE."""

    has_qk_norm = True
    window_rule = staticmethod(switched_for_all)
    expert_names = ExpertNames(shared=r"shared_expert")

    @classmethod
    def read_config(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> TextConfig:
        text = TextConfig.read(config, has_qk_norm=cls.has_qk_norm, window_rule=cls.window_rule)
        return with_experts(text, cls.read_experts(config), names)

    @classmethod
    def read_experts(cls, config: Mapping[str, Any]) -> ExpertShape:
        """Sizes of the mixture. Raises ModelNotSupported."""
        return ExpertShape(
            num_experts=read_size(config, "num_experts"),
            top_k=read_size(config, "num_experts_per_tok"),
            intermediate_size=read_size(config, "moe_intermediate_size"),
            normalise=bool(config.get("norm_topk_prob", False)),
            dense_layers=_dense_layers(config),
        )


class Qwen2Moe(Qwen3Moe):
    """Qwen1.5-MoE and Qwen2-MoE: a gated expert besides that every token takes."""

    has_qk_norm = False
    window_rule = staticmethod(every_other_layer)

    @classmethod
    def read_experts(cls, config: Mapping[str, Any]) -> ExpertShape:
        shared_size = read_size(config, "shared_expert_intermediate_size")
        routed = super().read_experts(config)
        return replace(routed, num_shared=1, shared_size=shared_size, shared_gated=True)


class Mixtral(Qwen3Moe):
    """Mixtral: every layer is a mixture."""

    has_qk_norm = False
    window_rule = staticmethod(all_layers_if_given)
    expert_names = ExpertNames(mixture="block_sparse_moe", gate="w1", up="w3", down="w2")

    @classmethod
    def read_experts(cls, config: Mapping[str, Any]) -> ExpertShape:
        return ExpertShape(
            num_experts=read_size(config, "num_local_experts"),
            top_k=read_size(config, "num_experts_per_tok"),
            intermediate_size=read_size(config, "intermediate_size"),
            normalise=True,
        )


class Dots1(Qwen3Moe):
    """dots.llm1: DeepSeek's routing (a sigmoid for each expert, groups, a bias for the choice) on Qwen3's body."""

    window_rule = staticmethod(upper_layers_unswitched)
    expert_names = ExpertNames(shared=r"shared_experts")

    @classmethod
    def read_experts(cls, config: Mapping[str, Any]) -> ExpertShape:
        inner = read_size(config, "moe_intermediate_size")
        grouped = GroupedRouting(
            num_groups=int(config.get("n_group") or 1),
            groups_kept=int(config.get("topk_group") or 1),
            scale=read_amount(config, "routed_scaling_factor", 1.0),
        )
        return ExpertShape(
            num_experts=read_size(config, "n_routed_experts"),
            top_k=read_size(config, "num_experts_per_tok"),
            intermediate_size=inner,
            normalise=bool(config.get("norm_topk_prob", False)),
            num_shared=1,
            shared_size=inner * read_size(config, "n_shared_experts"),
            dense_layers=frozenset(range(int(config.get("first_k_dense_replace") or 0))),
            grouped=grouped,
        )


def with_experts(text: TextConfig, experts: ExpertShape, names: Collection[str]) -> TextConfig:
    """The configuration with a mixture, stored as the names say. Raises ModelNotSupported."""
    if experts.top_k > experts.num_experts:
        raise ModelNotSupported(f"config.json lets a token take {experts.top_k} of {experts.num_experts} experts")
    if (grouped := experts.grouped) is not None:
        size = experts.num_experts // grouped.num_groups
        fits = size * grouped.num_groups == experts.num_experts and experts.top_k <= grouped.groups_kept * size
        if size < 2 or not fits or grouped.groups_kept > grouped.num_groups:
            raise ModelNotSupported(
                f"config.json has {experts.num_experts} experts in {grouped.num_groups} groups, of which a token takes "
                f"{experts.top_k} of {grouped.groups_kept}; these do not fit"
            )
    stacked = any(name.endswith(STACKED) for name in names)
    return replace(text, block=replace(text.block, experts=replace(experts, is_stacked=stacked)))


def _dense_layers(config: Mapping[str, Any]) -> frozenset[int]:
    """Layers without experts: those listed, and those between every `decoder_sparse_step`-th."""
    listed, step = config.get("mlp_only_layers") or (), int(config.get("decoder_sparse_step") or 1)
    layers = range(read_size(config, "num_hidden_layers"))
    return frozenset(i for i in layers if i in listed or (i + 1) % step)
