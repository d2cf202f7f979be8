"""The vision half of MiniMind-V: a square image through a frozen encoder, each patch projected to one embedding row.

    current   SigLIP 2 at 32-pixel patches, its last norm, then LayerNorm, Linear, GELU, Linear
    first     CLIP at 16-pixel patches without its class token's row, then one Linear

Which one, the projector's names say. The encoder is a folder inside the model's folder, as the project keeps it, or
part of the model's own file; its configuration and preprocessing always come from its folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self

import torch

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
from kernels.activation import gelu
from kernels.linear import linear
from kernels.norm import layer_norm
from transfer.checkpoint import Checkpoint
from transfer.checkpoint_rules import Rule

PROJECTOR_EPS = 1e-5  # torch's own
TEXT = (r"lm_head\.weight", r"model\..*", r"(?:.*\.)?(?:mask|pos_cis|freqs_cis|freqs_cos|freqs_sin)")
OWN_ENCODER = "vision_encoder."


def projector_shapes(checkpoint: Checkpoint, width: int) -> dict[str, tuple[int, ...]]:
    """The projector's weights by their names behind `vision_proj.`. Raises ValueError for one that is not served."""
    head = "vision_proj."
    names = {name.removeprefix(head) for name in checkpoint.tensors if name.startswith(head)}
    if "vision_proj.0.weight" in names:
        out = checkpoint.tensors[head + "vision_proj.0.weight"].shape[0]
        return {"vision_proj.0.weight": (out, width), "vision_proj.0.bias": (out,)}
    if "mlp.2.weight" in names:
        raise ValueError("a projector that merges four patches (SigLIP 2 NaFlex, April 2026) is not served")
    if "mlp.3.weight" not in names:
        raise ValueError(f"the checkpoint has no projector of MiniMind-V's; of it are there: {sorted(names) or 'none'}")
    out = checkpoint.tensors[head + "mlp.3.weight"].shape[0]
    shapes: dict[str, tuple[int, ...]] = {"mlp.0.weight": (width,), "mlp.0.bias": (width,)}
    shapes |= {"mlp.1.weight": (out, width), "mlp.1.bias": (out,)}
    return shapes | {"mlp.3.weight": (out, out), "mlp.3.bias": (out,)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a model folder holds of the vision half. own: the encoder's weights are in the model's own file."""

    checkpoint: Checkpoint
    encoder: Checkpoint
    config: EncoderConfig
    own: bool

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> Parts:
        """Raises ValueError or CheckpointError."""
        encoder = _find_encoder(checkpoint)
        own = any(name.startswith(OWN_ENCODER) for name in checkpoint.tensors)
        return cls(checkpoint=checkpoint, encoder=encoder, config=EncoderConfig.from_config(encoder.config()), own=own)

    def sources(self) -> list[Source]:
        """(checkpoint, shapes to fill, rules, names of others) of each file to read."""
        projector = projector_shapes(self.checkpoint, self.config.hidden_size)
        shapes, rules = encoder_shapes(self.config), encoder_rules(self.config)
        unused = unused_names(self.config)
        of_projector = Rule(pattern=r"vision_proj\.(\w+)\.(\d+)\.(weight|bias)", target=r"\1.\2.\3")
        if self.own:
            return [(self.checkpoint, projector | shapes, [of_projector, *rules], TEXT + unused)]
        return [(self.checkpoint, projector, [of_projector], TEXT), (self.encoder, shapes, rules, unused)]


def _find_encoder(checkpoint: Checkpoint) -> Checkpoint:
    """The one folder within the model's folder that holds a vision encoder. Raises ValueError or CheckpointError."""
    folder = checkpoint.folder
    found = encoder_folders(folder)
    if len(found) != 1:
        raise ValueError(
            f"{folder} holds {len(found)} folders with a vision encoder; put there the one that the model was made "
            "with (siglip2-base-p32-256-ve, or clip-vit-base-patch16 for the first version)"
        )
    own = any(name.startswith(OWN_ENCODER) for name in checkpoint.tensors)
    return Checkpoint(folder=found[0], tensors={}) if own else Checkpoint.open(found[0])


class MiniMindVision:
    """The loaded encoder and projector. See `VisionModel` for the contract."""

    planes = (PLANE,)

    def __init__(self, config: EncoderConfig, weights: Mapping[str, torch.Tensor], fingerprint: str) -> None:
        self.config = config
        self._encoder = Encoder(config, weights)
        self._weights = weights
        self._is_first = "vision_proj.0.weight" in weights
        last = "vision_proj.0.weight" if self._is_first else "mlp.3.weight"
        self.embedding_dim = weights[last].shape[0]
        self.patch_dim = config.patch_dim
        self.fingerprint = fingerprint

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Self:
        """Read projector and encoder. Raises ValueError or CheckpointError."""
        parts = Parts.open(checkpoint)
        weights, fingerprints = load_sources(parts.sources(), dtype, device)
        return cls(parts.config, weights, ":".join((str(parts.config), *fingerprints)))

    @classmethod
    def check(cls, checkpoint: Checkpoint) -> tuple[int, int]:
        """See `VisionModel.check`."""
        parts = Parts.open(checkpoint)
        return check_sources(parts.sources()), parts.config.patch_dim

    @classmethod
    def image_settings(cls, checkpoint: Checkpoint, *, min_pixels: int | None, max_pixels: int | None) -> ImageSettings:
        """See `VisionModel.image_settings`; every image has the encoder's size, so bounds mean nothing here."""
        parts = Parts.open(checkpoint)
        published = parts.encoder.read_json("preprocessor_config.json")
        return ImageSettings.square(published, side=parts.config.image_size, patch_size=parts.config.patch_size)

    def num_rows(self, grid: Grid) -> int:
        """One row per patch."""
        return grid[0] * grid[1] * grid[2]

    @torch.inference_mode()
    def encode(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """See `VisionModel.encode`. Raises ValueError when patches and grids do not agree."""
        config = self.config
        num_patches = len(grids) * config.side**2
        if any(grid != (1, config.side, config.side) for grid in grids) or patches.shape != (
            num_patches,
            self.patch_dim,
        ):
            raise ValueError(f"patches are {tuple(patches.shape)}, grids {list(grids)}; there are {config.side} a side")
        features = self._encoder.features(patches)
        if self._is_first:
            return self._linear("vision_proj.0", features)
        normed = layer_norm(features, self._weights["mlp.0.weight"], self._weights["mlp.0.bias"], PROJECTOR_EPS)
        return self._linear("mlp.3", gelu(self._linear("mlp.1", normed)))

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self._weights[name + ".weight"], self._weights[name + ".bias"])
