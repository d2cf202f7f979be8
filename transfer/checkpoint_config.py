"""What config.json may say: of which kind each entry must be that some model here reads, whatever its family.

Checked once, where the file is read, so that readers may take the kinds for granted; a null counts as an entry that is
not there. What the values mean, which of them a model needs and which it serves is the models' to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transfer.checkpoint_json import Kinds, wrong_values

MODEL: Kinds = {
    "architectures": "names",
    "model_type": "text",
    "bos_token_id": "ids",
    "eos_token_id": "ids",
    "image_token_id": "count",
    "hidden_size": "size",
    "num_key_value_heads": "size",
    "n_kv_head": "size",
    "n_kv_heads": "size",
    "head_dim": "size",
    "max_position_embeddings": "size",
    "max_sequence_length": "size",
    "rope_theta": "positive",
    "rms_norm_eps": "amount",
    "tie_word_embeddings": "flag",
    "weight_tying": "flag",
    "attention_bias": "flag",
    "mlp_bias": "flag",
    "mlp_ratio": "size",
    "use_sliding_window": "flag",
    "max_window_layers": "count",
    "layer_types": "names",
    "use_moe": "flag",
    "num_experts": "count",
    "num_experts_per_tok": "count",
    "n_shared_experts": "count",
    "moe_intermediate_size": "count",
    "norm_topk_prob": "flag",
    "routed_scaling_factor": "positive",
    "n_group": "count",
    "topk_group": "count",
    "first_k_dense_replace": "count",
    "decoder_sparse_step": "count",
    "mlp_only_layers": "counts",
    "inference_rope_scaling": "flag",
    "srte_share_across_layers": "flag",
    "use_alignment": "flag",
    "image_ids": "counts",
    "image_token_len": "size",
    "rope_parameters": "map",
    "rope_scaling": "map",
    "text_config": "map",
    "vision_config": "map",
    "mm_vision_config": "map",
    "quantization_config": "map",
}
ROPE: Kinds = {
    "type": "text",
    "rope_type": "text",
    "rope_theta": "positive",
    "original_max_position_embeddings": "size",
    "low_freq_factor": "positive",
    "high_freq_factor": "positive",
    "beta_slow": "positive",
    "beta_fast": "positive",
    "attention_factor": "positive",
    "mscale": "amount",
    "mscale_all_dim": "amount",
    "truncate": "flag",
    "mrope_section": "sizes",
}
VISION: Kinds = {
    "depth": "size",
    "num_hidden_layers": "size",
    "hidden_size": "size",
    "intermediate_size": "size",
    "num_heads": "size",
    "num_attention_heads": "size",
    "out_hidden_size": "size",
    "image_size": "size",
    "patch_size": "size",
    "spatial_merge_size": "size",
    "temporal_patch_size": "size",
    "in_channels": "size",
    "in_chans": "size",
    "num_channels": "size",
    "window_size": "size",
    "num_position_embeddings": "size",
    "layer_norm_eps": "amount",
    "hidden_act": "text",
    "fullatt_block_indexes": "counts",
    "deepstack_visual_indexes": "counts",
}
SECTIONS: Mapping[str, Kinds] = {
    "rope_parameters": ROPE,
    "rope_scaling": ROPE,
    "text_config": MODEL,
    "vision_config": VISION,
    "mm_vision_config": VISION,
}


def config_problems(config: Mapping[str, Any], kinds: Kinds = MODEL, path: str = "config.json") -> list[str]:
    """What is of the wrong kind in a config.json, or in the section of one that `path` names."""
    problems = wrong_values(config, kinds, path)
    for name in SECTIONS.keys() & kinds.keys():
        section = config.get(name)
        if isinstance(section, Mapping):
            problems += config_problems(section, SECTIONS[name], f"{path}'s {name}")
    return sorted(problems)
