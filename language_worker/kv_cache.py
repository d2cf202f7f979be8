"""KVCache: the tensors behind the page ids. Knows sizes, not who owns which page."""

from collections.abc import Sequence

import numpy as np
import torch

from kernels.pages import copy_pages
from language_worker.models.base import KVSpec


class KVCache:
    """Per layer keys and values [num_pages, page_size, num_kv_heads, head_dim], contiguous.

    On the CPU the memory is mapped zeroed, so that pages that were never used cost no physical memory.
    """

    def __init__(
        self, spec: KVSpec, *, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        shape = (num_pages, page_size, spec.num_kv_heads, spec.head_dim)
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = [
            (_zeros(shape, dtype, device), _zeros(shape, dtype, device)) for _ in range(spec.num_layers)
        ]

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, target) in every layer; all sources are read before any target is written."""
        device = self.layers[0][0].device
        sources = torch.tensor([source for source, _ in copies], device=device)
        targets = torch.tensor([target for _, target in copies], device=device)
        for keys, values in self.layers:
            copy_pages(keys, values, sources, targets)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
