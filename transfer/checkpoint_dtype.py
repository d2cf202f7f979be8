"""The dtype a checkpoint is served in when nobody says otherwise: one answer for all who load a part of it.

Whatever each loader reads, the parts exchange tensors and must agree; so the answer depends on the whole folder only.
"""

from __future__ import annotations

import math
from collections import Counter

from transfer.checkpoint import Checkpoint

UNKNOWN = "float32"  # nothing is stated and nothing is stored


def checkpoint_dtype(checkpoint: Checkpoint) -> str:
    """Name of the dtype that config.json states (top level, else text_config), else of most of the stored numbers.

    Raises CheckpointError when config.json cannot be read. Whether the dtype can be served is the caller's to judge.
    """
    config = checkpoint.config()
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if stated := part.get(key):
                return str(stated).removeprefix("torch.")
    stored: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        stored[str(tensor.dtype).removeprefix("torch.")] += math.prod(tensor.shape)
    return max(stored, key=lambda name: (stored[name], name), default=UNKNOWN)
