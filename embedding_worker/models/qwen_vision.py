"""What the vision towers of Qwen2.5-VL and Qwen3-VL share: their sizes, how they are read, the contract's plain parts.

A tower names its tensors (`parts`) and encodes; what a block computes is its own. Only `visual.*` tensors are read; the
text half is foreign here.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch

from embedding_worker.models.base import PLANE, Grid
from embedding_worker.preprocess import ImageSettings
from kernels.linear import linear
from transfer.checkpoint import Checkpoint, check_checkpoint, load_checkpoint
from transfer.checkpoint_rules import Rule

NORM_EPS = 1e-6  # fixed by the architecture, not in any config
ROPE_THETA = 10_000.0
SIZES = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size")

FOREIGN = (
    r"lm_head\.weight",
    r"model\.(?:language_model\.)?(?:embed_tokens|norm)\.weight",
    r"model\.(?:language_model\.)?layers\..*",
)

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """The `vision_config` of a config.json, as far as both families have it."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
    merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3

    @staticmethod
    def read(
        config: Mapping[str, Any], *, activation: str, patch_size: int
    ) -> tuple[Mapping[str, Any], dict[str, int]]:
        """The section, and the fields above. Raises ValueError naming what is missing or unusable."""
        vision = config.get("vision_config")
        if not isinstance(vision, Mapping):
            raise ValueError("config.json has no vision_config")
        vision = {name: value for name, value in vision.items() if value is not None}
        if missing := [name for name in SIZES if not isinstance(vision.get(name), int)]:
            raise ValueError(f"vision_config needs integers for {', '.join(missing)}")
        if (given := vision.get("hidden_act", activation)) != activation:
            raise ValueError(f"vision_config.hidden_act {given!r} is not supported, only {activation!r}")
        fields = {name: vision[name] for name in SIZES}
        fields["patch_size"] = vision.get("patch_size", patch_size)
        fields["merge_size"] = vision.get("spatial_merge_size", 2)
        fields["temporal_patch_size"] = vision.get("temporal_patch_size", 2)
        fields["in_channels"] = vision.get("in_channels", vision.get("in_chans", 3))
        return vision, fields

    def check_heads(self) -> None:
        """Raise ValueError unless the width gives whole heads that can be rotated in two directions."""
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise ValueError(
                f"vision_config: hidden_size {self.hidden_size} must give {self.num_heads} heads of a multiple of 4"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_size(self) -> int:
        return self.hidden_size * self.merge_size**2


class QwenVision(ABC):
    """A loaded tower. See `VisionModel` for the contract."""

    config: TowerConfig
    planes: tuple[str, ...] = (PLANE,)

    def __init__(self, config: TowerConfig, weights: Mapping[str, torch.Tensor], fingerprint: str) -> None:
        self.config = config
        self.embedding_dim = config.out_hidden_size
        self.patch_dim = config.patch_dim
        self.fingerprint = fingerprint
        self._weights = weights

    @classmethod
    @abstractmethod
    def parts(cls, checkpoint: Checkpoint) -> tuple[TowerConfig, Shapes, list[Rule]]:
        """The configuration, every parameter's shape, and where it comes from. Raises ValueError."""

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Self:
        """Read `visual.*` or `model.visual.*`. Raises ValueError or CheckpointError."""
        config, shapes, rules = cls.parts(checkpoint)
        weights = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
        report = load_checkpoint(checkpoint, weights, rules, foreign=FOREIGN, fingerprint=True)
        return cls(config, weights, f"{report.fingerprint}:{config}")

    @classmethod
    def check(cls, checkpoint: Checkpoint) -> tuple[int, int]:
        """See `VisionModel.check`."""
        config, shapes, rules = cls.parts(checkpoint)
        weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        planned, _ = check_checkpoint(checkpoint, weights, rules, foreign=FOREIGN)
        return len(planned), config.patch_dim

    @classmethod
    def image_settings(cls, checkpoint: Checkpoint, *, min_pixels: int | None, max_pixels: int | None) -> ImageSettings:
        """See `VisionModel.image_settings`."""
        published = checkpoint.read_json("preprocessor_config.json")
        return ImageSettings.from_config(published, min_pixels=min_pixels, max_pixels=max_pixels)

    def num_rows(self, grid: Grid) -> int:
        """One row per merged patch."""
        return grid[0] * grid[1] * grid[2] // self.config.merge_size**2

    @abstractmethod
    def encode(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """See `VisionModel.encode`. Raises ValueError when patches and grids do not agree."""

    def _count(self, patches: torch.Tensor, grids: Sequence[Grid]) -> int:
        """How many patches there are. Raises ValueError when the grids need others."""
        num_patches = sum(t * h * w for t, h, w in grids)
        if tuple(patches.shape) != (num_patches, self.patch_dim):
            raise ValueError(f"patches are {tuple(patches.shape)}, grids {list(grids)} need {num_patches} of them")
        return num_patches

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self._weights[name + ".weight"], self._weights[name + ".bias"])
