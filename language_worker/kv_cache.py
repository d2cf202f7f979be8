"""KVCache: the tensors behind the page ids. Knows sizes, not who owns which page.

Positions leave and enter as **rows**: one row per position, flat, holding the keys and then the values of each layer in
turn. So whatever shapes the layers have, a sequence's KV is one tensor [positions, row_elements].
"""

from collections.abc import Sequence

import numpy as np
import torch

from kernels.pages import copy_pages
from language_worker.models.base import KVSpec


class KVCache:
    """Per layer (and head group) keys and values [num_pages, page_size, num_kv_heads, head_dim], contiguous.

    On the CPU the memory is mapped zeroed, so that pages that were never used cost no physical memory.
    """

    def __init__(
        self, spec: KVSpec, *, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype = dtype
        self.row_elements = spec.row_elements
        shapes = [
            (num_pages, page_size, heads, spec.head_dim) for heads in spec.head_groups or (spec.num_kv_heads,)
        ] * spec.num_layers
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = [
            (mapped_zeros(shape, dtype, device), mapped_zeros(shape, dtype, device)) for shape in shapes
        ]

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, target) in every layer; all sources are read before any target is written."""
        device = self.layers[0][0].device
        sources = torch.tensor([source for source, _ in copies], device=device)
        targets = torch.tensor([target for _, target in copies], device=device)
        for keys, values in self.layers:
            copy_pages(keys, values, sources, targets)

    def read_rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows [n, row_elements] of the positions in `slots` [n] (page x page_size + offset), a copy in host memory."""
        device = self.layers[0][0].device
        rows = torch.empty((slots.shape[0], self.row_elements), dtype=self.dtype, device=device)
        slots, first = slots.to(device), 0
        for tensor in (tensor for layer in self.layers for tensor in layer):
            flat = tensor.flatten(0, 1).flatten(1)
            rows[:, first : first + flat.shape[1]] = flat.index_select(0, slots)
            first += flat.shape[1]
        return rows.cpu()

    def write_rows(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """What `read_rows` gave, into the positions in `slots`."""
        device = self.layers[0][0].device
        slots, rows, first = slots.to(device), rows.to(device), 0
        for tensor in (tensor for layer in self.layers for tensor in layer):
            flat = tensor.flatten(0, 1).flatten(1)
            flat.index_copy_(0, slots, rows[:, first : first + flat.shape[1]])
            first += flat.shape[1]


def mapped_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the CPU what is never written costs no physical memory."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
