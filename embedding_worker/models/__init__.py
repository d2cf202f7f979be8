"""The table of vision models: Hugging Face architecture to "module:class", resolved on use.

Listing them imports none. A family is one file here and one row.
"""

from __future__ import annotations

import pkgutil

from embedding_worker.models.base import VisionModel

VISION_MODELS = {
    "Qwen2_5_VLForConditionalGeneration": "embedding_worker.models.qwen2_5_vl:Qwen2_5_VLVision",
    "Qwen3VLForConditionalGeneration": "embedding_worker.models.qwen3_vl:Qwen3VLVision",
}


def resolve_vision_model(architecture: str) -> type[VisionModel]:
    """The class that runs the vision half of `architecture`. Raises KeyError when there is none."""
    found: type[VisionModel] = pkgutil.resolve_name(VISION_MODELS[architecture])
    return found
