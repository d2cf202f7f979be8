"""Model registry: Hugging Face architecture -> "module:Class", resolved on use, so that listing imports no model."""

import pkgutil
from collections.abc import Mapping
from typing import Any

from language_worker.errors import ModelNotSupported
from language_worker.models.base import LanguageModel

REGISTRY = {
    "LlamaForCausalLM": "language_worker.models.text_decoder:Llama",
    "LLaDAModelLM": "language_worker.models.llada:Llada",
    "LLaDAForCausalLM": "language_worker.models.llada:Llada",
    "Qwen2ForCausalLM": "language_worker.models.text_decoder:Qwen2",
    "Qwen3ForCausalLM": "language_worker.models.text_decoder:Qwen3",
    "Qwen2_5_VLForConditionalGeneration": "language_worker.models.qwen2_5_vl:Qwen2_5_VLText",
}


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
