"""The text half of MiniMind-V: MiniMind fed with text and image embeddings, each image as many rows as it has patches.

Where the projector makes one row of several patches (its last matrix is `mlp.2`), every image has `image_token_len`
rows, whatever its shape. Positions just count tokens. An image is one placeholder in a prompt. Where the project marks
images by a run of text tokens (the first version: 196 times "@"), that would turn every such character of a text into
an image, so the padding token stands for an image instead; what stands there is never read, since rows replace it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Self

import torch

from language_worker.models.config_values import read_size
from language_worker.models.minimind import BUFFERS, MiniMind
from language_worker.models.text_decoder import TextConfig
from transfer.checkpoint import Checkpoint
from transfer.checkpoint_rules import Rule

PADDING_ID = 0
IMAGE_ID = 12
MERGING, PUBLISHED_ROWS = "vision_proj.mlp.2.weight", 64


class MiniMindV(MiniMind):
    """See the module."""

    foreign = (BUFFERS, r"vision_proj\..*", r"vision_encoder\..*")
    rows_per_image = 0  # 0: one for each patch

    @classmethod
    def read_config(cls, config: Mapping[str, Any], names: Collection[str] = ()) -> TextConfig:
        text = super().read_config(config, names)
        marks = config.get("image_ids") or [IMAGE_ID]
        media_token_id = int(marks[0] if len(marks) == 1 else config.get("pad_token_id") or PADDING_ID)
        return replace(text, spec=replace(text.spec, media_token_id=media_token_id))

    @classmethod
    def empty(
        cls, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device
    ) -> tuple[Self, list[Rule], tuple[str, ...]]:
        model, rules, foreign = super().empty(checkpoint, dtype=dtype, device=device)
        if MERGING in checkpoint.tensors:
            model.rows_per_image = read_size(checkpoint.config(), "image_token_len", PUBLISHED_ROWS)
        return model, rules, foreign

    def media_rows(self, grid: tuple[int, int, int]) -> int:
        if self.rows_per_image:
            return self.rows_per_image
        return grid[0] * grid[1] * grid[2]
