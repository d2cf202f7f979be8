"""The table of vision models: Hugging Face architecture to "module:class", resolved on use.

Listing them imports none. A family is one file here and one row.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedding_worker.models.base import VisionModel
from transfer.checkpoint import Checkpoint
from transfer.checkpoint_quantised import QuantisedCheckpoint

VISION_MODELS = {
    "LlavaLLaDAModelLM": "embedding_worker.models.llada_v:LladaVision",
    "MiniMindVLM": "embedding_worker.models.minimind_v:MiniMindVision",
    "Qwen2_5_VLForConditionalGeneration": "embedding_worker.models.qwen2_5_vl:Qwen2_5_VLVision",
    "Qwen3VLForConditionalGeneration": "embedding_worker.models.qwen3_vl:Qwen3VLVision",
}
PROJECTOR = "vision_proj."  # how the names begin by which a MiniMind-V is known that comes without a config.json


def open_vision_checkpoint(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> Checkpoint:
    """The checkpoint of a folder, with its architecture where config.json names none, and with whole matrices where it
    stores them quantised. Raises CheckpointError.

    overrides: entries of config.json to use instead of the checkpoint's.
    """
    checkpoint = dataclasses.replace(Checkpoint.open(folder), overrides=dict(overrides or {}))
    is_described = (checkpoint.folder / "config.json").is_file() and checkpoint.config().get("architectures")
    if is_described:
        return QuantisedCheckpoint.of(checkpoint)
    if not any(name.startswith(PROJECTOR) for name in checkpoint.tensors):
        return checkpoint
    return dataclasses.replace(checkpoint, inferred={"architectures": ["MiniMindVLM"]})


def resolve_vision_model(architecture: str) -> type[VisionModel]:
    """The class that runs the vision half of `architecture`. Raises KeyError when there is none."""
    found: type[VisionModel] = pkgutil.resolve_name(VISION_MODELS[architecture])
    return found
