"""Model registry: Hugging Face architecture -> "module:Class", resolved on use, so that listing imports no model.

Checkpoints that come without a config.json are described by the family whose names and shapes theirs are.
"""

import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from language_worker.errors import ModelNotSupported
from language_worker.models.base import LanguageModel
from transfer.checkpoint import Checkpoint
from transfer.checkpoint_quantised import QuantisedCheckpoint

REGISTRY = {
    "Dots1ForCausalLM": "language_worker.models.text_moe:Dots1",
    "NanoChat": "language_worker.models.nanochat_layouts:NanoChatNative",
    "NanoChatForCausalLM": "language_worker.models.nanochat_layouts:NanoChatHuggingFace",
    "HybridLanguageModel": "language_worker.models.fusion_tree_layouts:FusionTreeModel",
    "LlamaForCausalLM": "language_worker.models.text_decoder:Llama",
    "LLaDAModelLM": "language_worker.models.llada:Llada",
    "LLaDAForCausalLM": "language_worker.models.llada:Llada",
    "LlavaLLaDAModelLM": "language_worker.models.llada_v:LladaV",
    "Qwen2ForCausalLM": "language_worker.models.text_decoder:Qwen2",
    "MiniMindForCausalLM": "language_worker.models.minimind:MiniMind",
    "MiniMindVLM": "language_worker.models.minimind_v:MiniMindV",
    "MinistralForCausalLM": "language_worker.models.text_decoder:Ministral",
    "MistralForCausalLM": "language_worker.models.text_decoder:Mistral",
    "MixtralForCausalLM": "language_worker.models.text_moe:Mixtral",
    "Qwen2MoeForCausalLM": "language_worker.models.text_moe:Qwen2Moe",
    "Qwen3MoeForCausalLM": "language_worker.models.text_moe:Qwen3Moe",
    "Qwen3ForCausalLM": "language_worker.models.text_decoder:Qwen3",
    "Qwen2_5_VLForConditionalGeneration": "language_worker.models.qwen2_5_vl:Qwen2_5_VLText",
    "Qwen3VLForConditionalGeneration": "language_worker.models.qwen3_vl:Qwen3VLText",
}
# Families with a layout of their own: each a function from a checkpoint to the config.json it would have, {} when it is
# not of the family.
NATIVE = (
    "language_worker.models.fusion_tree_layouts:infer_config",
    "language_worker.models.minimind_native:infer_config",
    "language_worker.models.nanochat_layouts:infer_config",
)


def open_model(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> Checkpoint:
    """The checkpoint of a folder, with a configuration inferred where config.json names no architecture, and with whole
    matrices where it stores them quantised.

    overrides: entries of config.json to use instead of the checkpoint's. Raises CheckpointError, or ModelNotSupported
    when the tensors leave something open.
    """
    checkpoint = replace(Checkpoint.open(folder), overrides=dict(overrides or {}))
    if (checkpoint.folder / "config.json").is_file() and checkpoint.config().get("architectures"):
        return QuantisedCheckpoint.of(checkpoint)
    for place in NATIVE:
        if inferred := pkgutil.resolve_name(place)(checkpoint):
            return replace(checkpoint, inferred=inferred)
    return checkpoint


def resolve_model(config: Mapping[str, Any]) -> type[LanguageModel]:
    """The class that serves a checkpoint with this config.json; ModelNotSupported naming what it asks for."""
    architectures = config.get("architectures") or []
    for name in architectures:
        if name in REGISTRY:
            model: type[LanguageModel] = pkgutil.resolve_name(REGISTRY[name])
            return model
    raise ModelNotSupported(
        f"config.json names the architectures {list(architectures)}; served are: {', '.join(sorted(REGISTRY))}"
    )
