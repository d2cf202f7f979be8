"""Settings of an embedding worker. Knows nothing of files, models or transfers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from embedding_worker.errors import EmbedConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EmbedConfig:
    """How one embedding worker runs.

    dtype: "auto" is the checkpoint's. device: "auto" is the first GPU, else the CPU; or a torch device name.
    num_threads: CPU threads of the encoder, 0 leaves torch's default. max_batch_patches: patches encoded in one step
    (one image may exceed it, then alone). max_image_pixels and max_image_bytes: checked before decoding.
    min_pixels, max_pixels: area after resizing, None takes the checkpoint's. cache_tokens: embedding rows, each with
    all its planes, kept by content key, 0 for none. num_preprocess_threads: images decoded at the same time.
    max_images_per_request bounds one call; max_waiting_requests and max_waiting_bytes (of encoded media) bound all
    calls that are not done. config_overrides: entries to use instead of the checkpoint's config.json.
    """

    dtype: str = "auto"
    device: str = "auto"
    num_threads: int = 0
    num_preprocess_threads: int = 1
    max_batch_patches: int = 16384
    max_image_pixels: int = 100_000_000
    max_image_bytes: int = 32 * 1024 * 1024
    max_images_per_request: int = 256
    max_waiting_requests: int = 1024
    max_waiting_bytes: int = 1024 * 1024 * 1024
    cache_tokens: int = 65536
    min_pixels: int | None = None
    max_pixels: int | None = None
    config_overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise EmbedConfigError("dtype", f"must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for field in ("num_threads", "cache_tokens"):
            self._require(field, 0)
        for field in (
            "num_preprocess_threads",
            "max_batch_patches",
            "max_image_pixels",
            "max_image_bytes",
            "max_images_per_request",
            "max_waiting_requests",
            "max_waiting_bytes",
        ):
            self._require(field, 1)
        for field in ("min_pixels", "max_pixels"):
            if getattr(self, field) is not None:
                self._require(field, 1)
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise EmbedConfigError("min_pixels", f"{self.min_pixels} exceeds max_pixels {self.max_pixels}")

    def _require(self, field: str, least: int) -> None:
        value = getattr(self, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise EmbedConfigError(field, f"must be an integer of at least {least}, got {value!r}")
