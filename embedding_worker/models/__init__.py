"""The table of vision models: Hugging Face architecture to "module:class", resolved on use.

Listing them imports none. A family is one file here and one row.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from pathlib import Path

from embedding_worker.models.base import VisionModel
from transfer.checkpoint import Checkpoint

VISION_MODELS = {
    "LlavaLLaDAModelLM": "embedding_worker.models.llada_v:LladaVision",
    "MiniMindVLM": "embedding_worker.models.minimind_v:MiniMindVision",
    "Qwen2_5_VLForConditionalGeneration": "embedding_worker.models.qwen2_5_vl:Qwen2_5_VLVision",
    "Qwen3VLForConditionalGeneration": "embedding_worker.models.qwen3_vl:Qwen3VLVision",
}
PROJECTOR = "vision_proj."  # how the names begin by which a MiniMind-V is known that comes without a config.json


def open_vision_checkpoint(folder: str | Path) -> Checkpoint:
    """The checkpoint of a folder, with its architecture where config.json names none. Raises CheckpointError."""
    checkpoint = Checkpoint.open(folder)
    is_described = (checkpoint.folder / "config.json").is_file() and checkpoint.config().get("architectures")
    if is_described or not any(name.startswith(PROJECTOR) for name in checkpoint.tensors):
        return checkpoint
    return dataclasses.replace(checkpoint, inferred={"architectures": ["MiniMindVLM"]})


def resolve_vision_model(architecture: str) -> type[VisionModel]:
    """The class that runs the vision half of `architecture`. Raises KeyError when there is none."""
    found: type[VisionModel] = pkgutil.resolve_name(VISION_MODELS[architecture])
    return found
