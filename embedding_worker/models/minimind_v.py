"""The vision half of MiniMind-V: an image through a frozen encoder, its patches projected to embedding rows.

    current   a square in SigLIP 2 at 32-pixel patches, its last norm, then LayerNorm, Linear, GELU, Linear
    April 26  any shape in SigLIP 2 NaFlex at 16-pixel patches, four features side by side, then Linear, GELU, Linear
    first     a square in CLIP at 16-pixel patches without its class token's row, then one Linear

Which one, the projector's names say. The encoder is a folder inside the model's folder, as the project keeps it, or
part of the model's own file; its configuration and preprocessing always come from its folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self

import torch

from embedding_worker.models.base import PLANE, Grid
from embedding_worker.models.naflex import FlexibleEncoder
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
MERGING = "vision_proj.mlp.2."  # how names of the projector begin that makes one row of several features
PUBLISHED_MERGED, PUBLISHED_ROWS = 4, 64
TEXT = (r"lm_head\.weight", r"model\..*", r"(?:.*\.)?(?:mask|pos_cis|freqs_cis|freqs_cos|freqs_sin)")
OWN_ENCODER = "vision_encoder."
ENCODERS = (
    "put there the one that the model was made with (siglip2-base-p32-256-ve, siglip2-base-p16-ve for a projector of "
    "mlp.0 and mlp.2, or clip-vit-base-patch16 for the first version)"
)


def projector_shapes(checkpoint: Checkpoint, width: int) -> dict[str, tuple[int, ...]]:
    """The projector's weights by their names behind `vision_proj.`. Raises ValueError for one that is not served."""
    head = "vision_proj."
    names = {name.removeprefix(head) for name in checkpoint.tensors if name.startswith(head)}
    if _merges(checkpoint):
        out = next(stored.shape[0] for name, stored in checkpoint.tensors.items() if name.startswith(MERGING))
        shapes = {"mlp.0.weight": (out, _num_merged(checkpoint, width) * width), "mlp.0.bias": (out,)}
        return shapes | {"mlp.2.weight": (out, out), "mlp.2.bias": (out,)}
    if "vision_proj.0.weight" in names:
        out = checkpoint.tensors[head + "vision_proj.0.weight"].shape[0]
        return {"vision_proj.0.weight": (out, width), "vision_proj.0.bias": (out,)}
    if "mlp.3.weight" not in names:
        raise ValueError(f"the checkpoint has no projector of MiniMind-V's; of it are there: {sorted(names) or 'none'}")
    out = checkpoint.tensors[head + "mlp.3.weight"].shape[0]
    shapes = {"mlp.0.weight": (width,), "mlp.0.bias": (width,), "mlp.1.weight": (out, width), "mlp.1.bias": (out,)}
    return shapes | {"mlp.3.weight": (out, out), "mlp.3.bias": (out,)}


def _merges(checkpoint: Checkpoint) -> bool:
    return any(name.startswith(MERGING) for name in checkpoint.tensors)


def _num_merged(checkpoint: Checkpoint, width: int) -> int:
    """Features that one row is made of, by the projector's first matrix; as published where that fits none."""
    stored = checkpoint.tensors.get("vision_proj.mlp.0.weight")
    is_whole = stored is not None and len(stored.shape) == 2 and stored.shape[1] and stored.shape[1] % width == 0
    return stored.shape[1] // width if stored is not None and is_whole else PUBLISHED_MERGED


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a model folder holds of the vision half. own: the encoder's weights are in the model's own file.
    num_places: features of an image of any shape, 0 where all are squares."""

    checkpoint: Checkpoint
    encoder: Checkpoint
    config: EncoderConfig
    own: bool
    num_places: int

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> Parts:
        """Raises ValueError or CheckpointError."""
        encoder = _find_encoder(checkpoint)
        config = EncoderConfig.from_config(encoder.config())
        if config.is_flexible != _merges(checkpoint):
            what = "SigLIP 2 NaFlex, and" if config.is_flexible else "not SigLIP 2 NaFlex, which"
            need = "is not the one made for it (mlp.0 and mlp.2)" if config.is_flexible else "(mlp.0 and mlp.2) needs"
            raise ValueError(f"{encoder.folder} is {what} the projector {need}; {ENCODERS}")
        return cls(
            checkpoint=checkpoint,
            encoder=encoder,
            config=config,
            own=any(name.startswith(OWN_ENCODER) for name in checkpoint.tensors),
            num_places=_num_places(checkpoint, config.hidden_size) if config.is_flexible else 0,
        )

    def sources(self) -> list[Source]:
        """(checkpoint, shapes to fill, rules, names of others) of each file to read."""
        projector = projector_shapes(self.checkpoint, self.config.hidden_size)
        shapes, rules = encoder_shapes(self.config), encoder_rules(self.config)
        unused = unused_names(self.config)
        of_projector = Rule(pattern=r"vision_proj\.(\w+)\.(\d+)\.(weight|bias)", target=r"\1.\2.\3")
        if self.own:
            return [(self.checkpoint, projector | shapes, [of_projector, *rules], TEXT + unused)]
        return [(self.checkpoint, projector, [of_projector], TEXT), (self.encoder, shapes, rules, unused)]


def _num_places(checkpoint: Checkpoint, width: int) -> int:
    """Rows of an image times the features that one is made of."""
    rows = checkpoint.config().get("image_token_len") or PUBLISHED_ROWS
    return int(rows) * _num_merged(checkpoint, width)


def _find_encoder(checkpoint: Checkpoint) -> Checkpoint:
    """The one folder within the model's folder that holds a vision encoder. Raises ValueError or CheckpointError."""
    folder = checkpoint.folder
    found = encoder_folders(folder)
    if len(found) != 1:
        raise ValueError(f"{folder} holds {len(found)} folders with a vision encoder; {ENCODERS}")
    own = any(name.startswith(OWN_ENCODER) for name in checkpoint.tensors)
    return Checkpoint(folder=found[0], tensors={}) if own else Checkpoint.open(found[0])


class MiniMindVision:
    """The loaded encoder and projector. See `VisionModel` for the contract."""

    planes = (PLANE,)

    def __init__(
        self, config: EncoderConfig, num_places: int, weights: Mapping[str, torch.Tensor], fingerprint: str
    ) -> None:
        self.config = config
        self.num_places = num_places
        self._encoder = FlexibleEncoder(config, weights) if config.is_flexible else Encoder(config, weights)
        self._weights = weights
        last = next(name for name in ("vision_proj.0.bias", "mlp.3.bias", "mlp.2.bias") if name in weights)
        self.embedding_dim = weights[last].shape[0]
        self.patch_dim = config.patch_dim
        self.fingerprint = fingerprint

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Self:
        """Read projector and encoder. Raises ValueError or CheckpointError."""
        parts = Parts.open(checkpoint)
        weights, fingerprints = load_sources(parts.sources(), dtype, device)
        return cls(parts.config, parts.num_places, weights, ":".join((str(parts.config), *fingerprints)))

    @classmethod
    def check(cls, checkpoint: Checkpoint) -> tuple[int, int]:
        """See `VisionModel.check`."""
        parts = Parts.open(checkpoint)
        return check_sources(parts.sources()), parts.config.patch_dim

    @classmethod
    def image_settings(cls, checkpoint: Checkpoint, *, min_pixels: int | None, max_pixels: int | None) -> ImageSettings:
        """See `VisionModel.image_settings`; size and number of patches are the encoder's, so bounds mean nothing."""
        parts = Parts.open(checkpoint)
        published, patch_size = parts.encoder.read_json("preprocessor_config.json"), parts.config.patch_size
        if parts.num_places:
            return ImageSettings.flexible(published, patch_size=patch_size, max_patches=parts.num_places)
        return ImageSettings.square(published, side=parts.config.image_size, patch_size=patch_size)

    def num_rows(self, grid: Grid) -> int:
        """One row per patch; of an image of any shape always the same."""
        if self.num_places:
            return self.num_places * self.config.hidden_size // self._weights["mlp.0.weight"].shape[1]
        return grid[0] * grid[1] * grid[2]

    @torch.inference_mode()
    def encode(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """See `VisionModel.encode`. Raises ValueError when patches and grids do not agree."""
        if isinstance(self._encoder, FlexibleEncoder):
            features = self._encoder.features_in_places(patches, grids, self.num_places)
            merged = features.view(-1, self._weights["mlp.0.weight"].shape[1])
            return self._linear("mlp.2", gelu(self._linear("mlp.0", merged)))
        config = self.config
        num_patches = len(grids) * config.side**2
        if any(grid != (1, config.side, config.side) for grid in grids) or patches.shape != (
            num_patches,
            self.patch_dim,
        ):
            raise ValueError(f"patches are {tuple(patches.shape)}, grids {list(grids)}; there are {config.side} a side")
        features = self._encoder.features(patches)
        if "vision_proj.0.weight" in self._weights:
            return self._linear("vision_proj.0", features)
        normed = layer_norm(features, self._weights["mlp.0.weight"], self._weights["mlp.0.bias"], PROJECTOR_EPS)
        return self._linear("mlp.3", gelu(self._linear("mlp.1", normed)))

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self._weights[name + ".weight"], self._weights[name + ".bias"])
