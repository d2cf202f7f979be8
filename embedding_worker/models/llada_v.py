"""The vision half of LLaDA-V: an image whole and in squares through SigLIP 2, each patch projected to one row.

    every square ──> tower without its last layer and norm ──> Linear, GELU, Linear
    rows of an image: those of the overview, then line by line those of the canvas, `image_newline` behind each line

The tower lies in the model's own files (`model.vision_tower.vision_tower.*`), with the last layer left out as it was
trained, or whole in a folder inside the model's. Its sizes are those of that folder's config.json, else those of
config.json's `mm_vision_config`, else the published ones. How an image is cut, `embedding_worker/tiles.py` knows.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F

from embedding_worker.models.base import PLANE, Grid
from embedding_worker.models.sources import Source, check_sources, load_sources
from embedding_worker.models.vit import (
    Encoder,
    EncoderConfig,
    encoder_folders,
    encoder_rules,
    encoder_shapes,
    unused_names,
)
from embedding_worker.preprocess import ImageSettings
from embedding_worker.tiles import Tiling
from kernels.activation import gelu
from kernels.linear import linear
from transfer.checkpoint import Checkpoint
from transfer.checkpoint_rules import Rule

OWN_TOWER = r"model\.vision_tower\.vision_tower\.vision_model\."
TEXT = (r"lm_head\.weight", r"model\.(?:embed_tokens|norm)\.weight", r"model\.layers\..*")
PUBLISHED_TOWER: dict[str, Any] = {  # siglip2-so400m-patch14-384
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
    "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
}  # fmt: skip
PUBLISHED_PREPROCESSOR: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
SERVED = {  # what would change the numbers -> the value that is served, and meant where config.json does not say
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_resampler_type": None,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
}
PROJECTOR = [
    Rule(pattern=r"model\.mm_projector\.(0|2)\.(weight|bias)", target=r"projector.\1.\2"),
    Rule(pattern=r"model\.image_newline", target="newline"),
]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a model folder holds of the vision half. tower: the folder of the encoder, where it has one of its own."""

    checkpoint: Checkpoint
    tower: Checkpoint | None
    config: EncoderConfig
    tiling: Tiling
    hidden_size: int

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> Parts:
        """Raises ValueError or CheckpointError."""
        config = checkpoint.config()
        for name, served in SERVED.items():
            if config.get(name, served) != served:
                raise ValueError(f"config.json has {name} = {config[name]!r}; of LLaDA-V only {served!r} is served")
        has_own = any(re.match(OWN_TOWER, name) for name in checkpoint.tensors)
        tower = None if has_own else _open_tower(checkpoint)
        sizes = PUBLISHED_TOWER | (config.get("mm_vision_config") or {}) if tower is None else tower.config()
        whole = EncoderConfig.from_config(sizes)
        if whole.is_clip or whole.is_flexible or whole.depth < 2:
            raise ValueError("the vision tower must be a SigLIP of two layers or more, for images of one size")
        hidden_size = config.get("hidden_size")
        if type(hidden_size) is not int or hidden_size < 1:
            raise ValueError(f"config.json has hidden_size = {hidden_size!r}; a positive integer is needed")
        return cls(
            checkpoint=checkpoint,
            tower=tower,
            config=dataclasses.replace(whole, depth=whole.depth - 1, has_last_norm=False),
            tiling=Tiling.from_config(config, side=whole.image_size, features=whole.side),
            hidden_size=hidden_size,
        )

    def sources(self) -> list[Source]:
        """(checkpoint, shapes to fill, rules, names of others) of each file to read."""
        config, hidden = self.config, self.hidden_size
        own: dict[str, tuple[int, ...]] = {"newline": (hidden,), "projector.0.weight": (hidden, config.hidden_size)}
        own |= {"projector.0.bias": (hidden,), "projector.2.weight": (hidden, hidden), "projector.2.bias": (hidden,)}
        shapes, place = encoder_shapes(config), OWN_TOWER if self.tower is None else ""
        rules, unused = encoder_rules(config, place), unused_names(config, place)
        if self.tower is None:
            return [(self.checkpoint, own | shapes, [*PROJECTOR, *rules], TEXT + unused)]
        last_layer = f"encoder.layers.{config.depth}."
        needed = {name: tensor for name, tensor in self.tower.tensors.items() if last_layer not in name}
        tower = dataclasses.replace(self.tower, tensors=needed)
        return [(self.checkpoint, own, PROJECTOR, TEXT), (tower, shapes, rules, unused)]


def _open_tower(checkpoint: Checkpoint) -> Checkpoint:
    """The one folder inside the model's that holds the tower. Raises ValueError or CheckpointError."""
    found = encoder_folders(checkpoint.folder)
    if len(found) != 1:
        raise ValueError(
            f"the checkpoint holds no tensors of model.vision_tower, and {checkpoint.folder} has {len(found)} folders "
            "with a vision tower; put one there, siglip2-so400m-patch14-384 for instance"
        )
    return Checkpoint.open(found[0])


class LladaVision:
    """The loaded tower, projector and newline. See `VisionModel` for the contract; a grid is (1, height, width), the
    image's own size in pixels.
    """

    planes = (PLANE,)

    def __init__(
        self, config: EncoderConfig, tiling: Tiling, weights: Mapping[str, torch.Tensor], fingerprint: str
    ) -> None:
        self.config = config
        self.tiling = tiling
        self._encoder = Encoder(config, weights)
        self._weights = weights
        self.embedding_dim = weights["newline"].shape[0]
        self.patch_dim = config.patch_dim
        self.fingerprint = fingerprint

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Self:
        """Read tower, projector and newline. Raises ValueError or CheckpointError."""
        parts = Parts.open(checkpoint)
        weights, fingerprints = load_sources(parts.sources(), dtype, device)
        return cls(parts.config, parts.tiling, weights, ":".join((str(parts.config), *fingerprints)))

    @classmethod
    def check(cls, checkpoint: Checkpoint) -> tuple[int, int]:
        """See `VisionModel.check`."""
        parts = Parts.open(checkpoint)
        return check_sources(parts.sources()), parts.config.patch_dim

    @classmethod
    def image_settings(cls, checkpoint: Checkpoint, *, min_pixels: int | None, max_pixels: int | None) -> ImageSettings:
        """See `VisionModel.image_settings`. Canvases and limit are config.json's, so bounds mean nothing here; colours
        and resizing are the project's own, whatever a preprocessor_config.json of the tower's says."""
        parts = Parts.open(checkpoint)
        side = parts.config.image_size
        published = PUBLISHED_PREPROCESSOR | {"size": {"height": side, "width": side}}
        settings = ImageSettings.square(published, side=side, patch_size=parts.config.patch_size)
        return dataclasses.replace(settings, tiling=parts.tiling)

    def num_rows(self, grid: Grid) -> int:
        """Rows of the overview and of the canvas, newlines included."""
        return self.tiling.num_rows(*grid[1:])

    @torch.inference_mode()
    def encode(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """See `VisionModel.encode`. Raises ValueError when patches and grids do not agree."""
        counts = [self.tiling.num_squares(*grid[1:]) * self.config.side**2 for grid in grids]
        if patches.shape != (sum(counts), self.patch_dim):
            raise ValueError(f"patches are {tuple(patches.shape)}, and {grids} make {sum(counts)}")
        features = self._encoder.features(patches)
        rows = self._linear("projector.2", gelu(self._linear("projector.0", features)))
        images = zip(torch.split(rows, counts), grids, strict=True)
        return torch.cat([part for image, grid in images for part in self._arranged(image, grid)])

    def _arranged(self, rows: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of all squares of one image -> those of the overview, and those of the canvas as they are read."""
        side, size = self.config.side, grid[1:]
        overview, squares = rows[: side * side], rows[side * side :]
        down, across = self.tiling.canvas(*size)
        plane = squares.view(down, across, side, side, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
        height, width = kept = self.tiling.kept(*size)
        top, left = (plane.shape[1] - height) // 2, (plane.shape[2] - width) // 2
        plane = plane[:, top : top + height, left : left + width]
        if (wanted := self.tiling.shrunk(*size)) != kept:
            plane = F.interpolate(plane[None], list(wanted), mode="bilinear")[0]
        newline = self._weights["newline"][:, None, None].expand(-1, plane.shape[1], 1)
        lines = torch.cat((plane, newline), dim=2)
        return overview, lines.flatten(1).T

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self._weights[name + ".weight"], self._weights[name + ".bias"])
