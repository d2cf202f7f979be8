"""LLaDA: a Llama whose attention looks both ways, decoded by filling in masks.

Published under two sets of names: its own (`model.transformer.blocks.N.ff_proj`) and Hugging Face's
(`model.layers.N.mlp.gate_proj`); likewise its config.json (`d_model`, or `hidden_size`). In its own names the language
head and every layer's down-projection share the last part, `ff_out`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch

from kernels.attention_mask import BIDIRECTIONAL
from language_worker.errors import ModelNotSupported
from language_worker.models.base import ModelSpec
from language_worker.models.decoder import Decoder
from language_worker.models.layers import BlockShape, RotaryPositions
from language_worker.models.text_decoder import TextConfig
from language_worker.models.weights import decoder_rules
from transfer.checkpoint import Checkpoint
from transfer.checkpoint_rules import Rule

OWN_PREFIX = "model.transformer."
LLAMA_NAMES = {  # of config.json: LLaDA's own name -> Llama's
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
    "activation_type": "hidden_act",
}
SERVED: dict[str, tuple[Any, ...]] = {  # options that would change the numbers -> the values that are served
    "block_type": ("llama",),
    "block_group_size": (1,),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "alibi": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "bias_for_layer_norm": (False,),
    "attention_layer_norm": (False,),
    "scale_logits": (False,),
    "input_emb_norm": (False,),
}
PUBLISHED_VOCABULARY, PUBLISHED_MASK = 126464, 126336  # of LLaDA-8B, where config.json does not name the mask


class Llada(Decoder):
    """LLaDA 8B and 1.5, and whatever has their layout. foreign: patterns of names that are not read."""

    foreign: tuple[str, ...] = ()

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> TextConfig:
        """Raises ModelNotSupported."""
        return _read(config)

    @classmethod
    def read_spec(cls, config: Mapping[str, Any]) -> ModelSpec:
        return cls.read_config(config).spec

    @classmethod
    def empty(
        cls, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device
    ) -> tuple[Self, list[Rule], tuple[str, ...]]:
        config = cls.read_config(checkpoint.config())
        rotary = RotaryPositions(config.rope, head_dim=config.block.head_dim, device=device)
        model = cls(config.spec, config.block, rotary, tied=config.tied, dtype=dtype, device=device)
        has_own_names = any(name.startswith(OWN_PREFIX) for name in checkpoint.tensors)
        if has_own_names:
            return model, own_rules(config.block, tied=config.tied), cls.foreign
        return model, decoder_rules(config.block, prefix=r"model\.", tied=config.tied), cls.foreign


def own_rules(shape: BlockShape, *, tied: bool) -> list[Rule]:
    """Rules for LLaDA's own names."""
    root = r"model\.transformer\."
    layer = root + r"blocks\.(\d+)\."
    q_end = shape.num_heads * shape.head_dim
    k_end = q_end + shape.num_kv_heads * shape.head_dim
    inner = shape.intermediate_size
    rules = [
        Rule(pattern=root + r"wte\.weight", target="embedding.weight"),
        Rule(pattern=root + r"ln_f\.weight", target="final_norm.weight"),
        Rule(pattern=layer + r"attn_norm\.weight", target=r"layers.\1.input_norm.weight"),
        Rule(pattern=layer + r"ff_norm\.weight", target=r"layers.\1.post_norm.weight"),
        Rule(pattern=layer + r"q_proj\.weight", target=r"layers.\1.qkv.weight", rows=(0, q_end)),
        Rule(pattern=layer + r"k_proj\.weight", target=r"layers.\1.qkv.weight", rows=(q_end, k_end)),
        Rule(pattern=layer + r"v_proj\.weight", target=r"layers.\1.qkv.weight", rows=(k_end, shape.qkv_rows)),
        Rule(pattern=layer + r"attn_out\.weight", target=r"layers.\1.o.weight"),
        Rule(pattern=layer + r"ff_proj\.weight", target=r"layers.\1.gate_up.weight", rows=(0, inner)),
        Rule(pattern=layer + r"up_proj\.weight", target=r"layers.\1.gate_up.weight", rows=(inner, 2 * inner)),
        Rule(pattern=layer + r"ff_out\.weight", target=r"layers.\1.down.weight"),
    ]
    head = Rule(pattern=root + r"ff_out\.weight", target="head.weight")  # not a layer's: nothing between
    return rules if tied else [*rules, head]


def _read(config: Mapping[str, Any]) -> TextConfig:
    for name, served in SERVED.items():
        if name in config and config[name] not in served:
            shown = " or ".join(map(repr, served))
            raise ModelNotSupported(
                f"config.json has {name} = {config[name]!r}; of LLaDA models only {shown} is served"
            )
    llama = dict(config)
    for own, name in LLAMA_NAMES.items():
        if config.get(own) is not None:
            llama[name] = config[own]
    if llama.get("intermediate_size") is None and config.get("mlp_ratio"):
        llama["intermediate_size"] = int(config["mlp_ratio"]) * int(llama.get("hidden_size") or 0)
    if config.get("embedding_size"):  # rows of the embedding: the vocabulary, padded
        llama["vocab_size"] = config["embedding_size"]
    llama.setdefault("rms_norm_eps", 1e-5)
    read = TextConfig.read(llama, has_qk_norm=False)
    mask_token_id = _mask_token_id(config, read.spec.vocab_size)
    spec = replace(read.spec, decode_strategy="block_diffusion", mask_token_id=mask_token_id)
    return replace(read, spec=spec, block=replace(read.block, mask=BIDIRECTIONAL))


def _mask_token_id(config: Mapping[str, Any], vocab_size: int) -> int:
    default = PUBLISHED_MASK if vocab_size == PUBLISHED_VOCABULARY else None
    mask_id = config.get("mask_token_id", default)
    if type(mask_id) is not int or not 0 <= mask_id < vocab_size:
        raise ModelNotSupported(
            f"config.json has mask_token_id = {mask_id!r}; a LLaDA model needs an id of its {vocab_size} tokens"
        )
    if mask_id in (config.get("pad_token_id"), config.get("eos_token_id")):
        raise ModelNotSupported(
            f"config.json names token {mask_id} as the mask and as end or padding; they must differ"
        )
    return mask_id
