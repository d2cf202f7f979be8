"""Embeddings kept by content key, least recently used first out, bounded by rows. Not thread-safe; its owner locks."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import torch


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CachedMedium:
    """rows: [num_rows, embedding_dim] on the CPU, contiguous, never written again; grid: (t, h, w) in patches."""

    rows: torch.Tensor
    grid: tuple[int, int, int]


class EmbeddingCache:
    """Holds at most `max_rows` rows; a medium that alone exceeds this is not kept."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._media: OrderedDict[str, CachedMedium] = OrderedDict()
        self._num_rows = 0

    def __len__(self) -> int:
        return len(self._media)

    @property
    def num_rows(self) -> int:
        """Rows held now."""
        return self._num_rows

    def get(self, key: str) -> CachedMedium | None:
        """The medium of this content key, marked as just used."""
        medium = self._media.get(key)
        if medium is not None:
            self._media.move_to_end(key)
        return medium

    def put(self, key: str, medium: CachedMedium) -> None:
        """Keep a medium, letting go of those unused for longest."""
        if key in self._media:
            self._num_rows -= self._media.pop(key).rows.shape[0]
        if medium.rows.shape[0] > self._max_rows:
            return
        self._media[key] = medium
        self._num_rows += medium.rows.shape[0]
        while self._num_rows > self._max_rows:
            _, evicted = self._media.popitem(last=False)
            self._num_rows -= evicted.rows.shape[0]
