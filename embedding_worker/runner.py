"""The model step: prepared images in, embedding rows out. Owns the model, its device and dtype; knows no requests."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from embedding_worker.config import EmbedConfig
from embedding_worker.errors import EmbedConfigError, UnsupportedModel
from embedding_worker.models import VISION_MODELS, open_vision_checkpoint, resolve_vision_model
from embedding_worker.models.base import VisionModel
from embedding_worker.preprocess import ImageSettings, PreparedImage, content_key
from kernels.cpu_turn import cpu_turn
from kernels.machine import find_device, most_threads, num_cpus
from transfer.checkpoint import Checkpoint
from transfer.checkpoint_dtype import checkpoint_dtype

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class VisionRunner:
    """A loaded vision model with its image settings.

    Thread-safe as far as it is used here: `encode` on one thread, everything else reads constants.
    """

    def __init__(self, model: VisionModel, settings: ImageSettings, dtype: torch.dtype, device: torch.device) -> None:
        self.settings = settings
        self.dtype = dtype
        self.device = device
        self._model = model

    @classmethod
    def load(cls, model_path: str | Path, config: EmbedConfig) -> VisionRunner:
        """Load the vision half of a model folder.

        Raises UnsupportedModel on an architecture or configuration that cannot be run, CheckpointError on its tensors.
        """
        _require_threads(config)
        checkpoint = open_vision_checkpoint(model_path, config.config_overrides)
        device = _device(config.device)
        dtype = resolve_dtype(config.dtype, checkpoint)
        kind = _model_class(checkpoint)
        try:
            settings = kind.image_settings(checkpoint, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
            model = kind.load(checkpoint, dtype, device)
        except ValueError as error:
            raise UnsupportedModel(str(model_path), str(error)) from error
        _require_patch_dim(checkpoint, settings, model.patch_dim)
        logger.info("%s loaded: %s on %s", kind.__name__, dtype, device)
        return cls(model, settings, dtype, device)

    @staticmethod
    def check(model_path: str | Path, config: EmbedConfig) -> int:
        """What `load` would say of the folder, from the headers alone; returns the number of tensors it would read."""
        _require_threads(config)
        checkpoint = open_vision_checkpoint(model_path, config.config_overrides)
        resolve_dtype(config.dtype, checkpoint)
        kind = _model_class(checkpoint)
        try:
            settings = kind.image_settings(checkpoint, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
            num_tensors, patch_dim = kind.check(checkpoint)
        except ValueError as error:
            raise UnsupportedModel(str(model_path), str(error)) from error
        _require_patch_dim(checkpoint, settings, patch_dim)
        return num_tensors

    @property
    def embedding_dim(self) -> int:
        """Width of one row."""
        return self._model.embedding_dim

    @property
    def planes(self) -> tuple[str, ...]:
        """Names of what every row consists of."""
        return self._model.planes

    @property
    def dtype_name(self) -> str:
        """The rows' dtype as the wire spells it."""
        return str(self.dtype).removeprefix("torch.")

    def num_rows(self, grid: tuple[int, int, int]) -> int:
        """Embedding rows of an image of this grid."""
        return self._model.num_rows(grid)

    def content_key(self, media: bytes | memoryview) -> str:
        """Name of the embedding of these bytes under this model, dtype and device class."""
        return content_key(media, self.settings, self._model.fingerprint, f"{self.dtype_name}@{self.device.type}")

    def stream_key(self, media_key: str) -> str:
        """Name of all rows of a request whose media have this digest; "" for none. Equal names mean equal rows."""
        return self.content_key(media_key.encode()) if media_key else ""

    def warm_up(self) -> None:
        """Encode the smallest image there is: the first pass of a thread or a device sets much up."""
        settings = self.settings
        grid = settings.grid(1, 1) if settings.side else (1, settings.merge_size, settings.merge_size)
        patches = torch.zeros(settings.num_patches(grid), self._model.patch_dim)
        self.encode([PreparedImage(patches=patches, grid=grid)])

    def encode(self, images: Sequence[PreparedImage]) -> list[torch.Tensor]:
        """Encode images in one pass. Returns per image [num_rows, embedding_dim], on the CPU, contiguous; with several
        planes [num_rows, planes, embedding_dim], each plane contiguous.

        Raises what the model raises (out of memory, for instance).
        """
        grids = [image.grid for image in images]
        patches = images[0].patches if len(images) == 1 else torch.cat([image.patches for image in images])
        with cpu_turn(self.device):
            rows = self._model.encode(patches, grids).cpu()
        return [_own(part) for part in torch.split(rows, [self.num_rows(grid) for grid in grids])]


def _own(part: torch.Tensor) -> torch.Tensor:
    """A copy whose planes lie one behind the other, as they travel."""
    if part.dim() == 2:
        return part.clone()
    return part.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)


def _require_threads(config: EmbedConfig) -> None:
    """Raises EmbedConfigError for more threads than this machine's CPUs can have any use for."""
    if config.num_threads > most_threads():
        raise EmbedConfigError(
            "num_threads", f"{config.num_threads} on {num_cpus()} CPUs; use {most_threads()} at most, or 0"
        )


def _model_class(checkpoint: Checkpoint) -> type[VisionModel]:
    architecture = (checkpoint.config().get("architectures") or ["none"])[0]
    if architecture not in VISION_MODELS:
        known = ", ".join(VISION_MODELS)
        raise UnsupportedModel(str(checkpoint.folder), f"no vision half for {architecture}; there is one for {known}")
    return resolve_vision_model(architecture)


def _require_patch_dim(checkpoint: Checkpoint, settings: ImageSettings, model_dim: int) -> None:
    patch_dim = 3 * settings.temporal_patch_size * settings.patch_size**2
    if patch_dim != model_dim:
        reason = f"preprocessor_config.json makes patches of {patch_dim} numbers, the model takes {model_dim}"
        raise UnsupportedModel(str(checkpoint.folder), reason)


def _device(name: str) -> torch.device:
    """Raises EmbedConfigError for a device that is not here."""
    try:
        return find_device(name)
    except ValueError as error:
        raise EmbedConfigError("device", str(error)) from error


def resolve_dtype(name: str, checkpoint: Checkpoint) -> torch.dtype:
    """ "auto": the checkpoint's own. Raises UnsupportedModel for one that cannot be served."""
    if name == "auto":
        name = checkpoint_dtype(checkpoint)
    if name not in _DTYPES:
        raise UnsupportedModel(str(checkpoint.folder), f"dtype {name!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[name]
