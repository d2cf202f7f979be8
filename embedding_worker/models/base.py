"""What every vision model offers to the runner. Knows tensors and checkpoints, not requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import torch

from embedding_worker.preprocess import ImageSettings
from transfer.checkpoint import Checkpoint

PLANE = "embeddings"
Grid = tuple[int, int, int]
"""Patches of one medium: frames (already merged in time), rows, columns; or what else of its size a model goes by."""


class VisionModel(Protocol):
    """The vision half of a checkpoint, loaded and ready.

    planes: names of what every output row consists of, each [embedding_dim]; the first is what replaces a placeholder's
    embedding. embedding_dim: width of a row in one plane. patch_dim: width of one input patch. fingerprint: digest of
    the loaded weights and configuration, part of every content key.
    """

    planes: tuple[str, ...]
    embedding_dim: int
    patch_dim: int
    fingerprint: str

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Self:
        """Read the vision half only. Raises ValueError on an unusable configuration, CheckpointError on tensors."""
        ...

    @classmethod
    def check(cls, checkpoint: Checkpoint) -> tuple[int, int]:
        """What `load` would raise, found from the headers alone; returns the number of tensors it would read, and the
        patch_dim.
        """
        ...

    @classmethod
    def image_settings(cls, checkpoint: Checkpoint, *, min_pixels: int | None, max_pixels: int | None) -> ImageSettings:
        """How images become patches, by the checkpoint's preprocessor; the bounds, where given, go first.

        Raises ValueError or CheckpointError.
        """
        ...

    def num_rows(self, grid: Grid) -> int:
        """Embedding rows of a medium of this grid."""
        ...

    def encode(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Encode media packed one after the other.

        patches: [sum(t * h * w), patch_dim] float32 on any device. Returns [sum(num_rows), embedding_dim] in the
        model's dtype, on its device; with several planes [sum(num_rows), planes, embedding_dim].
        """
        ...
