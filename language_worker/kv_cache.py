"""KVCache: the tensors behind the page ids. Knows sizes, not who owns which page.

Positions leave and enter as **rows**: one row per position, flat, holding the keys and then the values of each layer in
turn; in 8 bits their bytes, and behind these those of their scales. So whatever shapes the layers have, a sequence's KV
is one tensor [positions, row_elements].
"""

from collections.abc import Sequence

import numpy as np
import torch

from kernels.pages import copy_pages
from kernels.quantise import LARGEST
from kernels.quantised_pages import LayerCache, QuantisedPages
from language_worker.models.base import KVSpec


class KVCache:
    """Per layer (and head group) keys and values [num_pages, page_size, num_kv_heads, head_dim], contiguous; of an
    8-bit dtype with a scale for each head of each position.

    On the CPU the memory is mapped zeroed, so that pages that were never used cost no physical memory.
    """

    def __init__(
        self,
        spec: KVSpec,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        num_spare: int = 0,
    ) -> None:
        """num_spare: pages behind those of sequences, for what a step writes and nobody reads."""
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype = dtype
        is_quantised = dtype in LARGEST
        self.row_dtype = torch.uint8 if is_quantised else dtype
        self.row_elements = spec.bytes_per_token(dtype) // self.row_dtype.itemsize
        self.layers: list[LayerCache] = []
        self._planes: list[tuple[torch.Tensor, torch.Tensor]] = []  # all tensors, 8-bit numbers as bytes
        for num_heads in (spec.head_groups or (spec.num_kv_heads,)) * spec.num_layers:
            shape = (num_pages + num_spare, page_size, num_heads, spec.head_dim)
            keys, values = (mapped_zeros(shape, dtype, device) for _ in range(2))
            if is_quantised:
                scales = tuple(mapped_zeros(shape[:-1], torch.float32, device) for _ in range(2))
                self.layers.append((QuantisedPages(keys, scales[0]), QuantisedPages(values, scales[1])))
                self._planes += [(keys.view(torch.uint8), values.view(torch.uint8)), (scales[0], scales[1])]
            else:
                self.layers.append((keys, values))
                self._planes.append((keys, values))
        self._device = device

    def copy_pages(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy pages (source, target) in every layer; all sources are read before any target is written."""
        sources = torch.tensor([source for source, _ in copies], device=self._device)
        targets = torch.tensor([target for _, target in copies], device=self._device)
        for keys, values in self._planes:
            copy_pages(keys, values, sources, targets)

    def copy_pages_to(self, other: "KVCache", moves: Sequence[tuple[int, int]]) -> None:
        """Copy pages (own, the other's) into a cache of the same shape on whatever device."""
        sources = torch.tensor([source for source, _ in moves], device=self._device)
        targets = torch.tensor([target for _, target in moves], device=other._device)
        for plane, others in zip(self._planes, other._planes, strict=True):
            for tensor, target in zip(plane, others, strict=True):
                target.index_copy_(0, targets, tensor.index_select(0, sources).to(other._device))

    def read_rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows [n, row_elements] of the positions in `slots` [n] (page x page_size + offset), a copy in host memory."""
        rows = torch.empty((slots.shape[0], self.row_elements), dtype=self.row_dtype, device=self._device)
        slots, first = slots.to(self._device), 0
        for flat in self._flat():
            rows[:, first : first + flat.shape[1]] = flat.index_select(0, slots)
            first += flat.shape[1]
        return rows.cpu()

    def write_rows(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """What `read_rows` gave, into the positions in `slots`."""
        slots, rows, first = slots.to(self._device), rows.to(self._device), 0
        for flat in self._flat():
            flat.index_copy_(0, slots, rows[:, first : first + flat.shape[1]])
            first += flat.shape[1]

    def _flat(self) -> list[torch.Tensor]:
        """Views [num_slots, numbers of a position] of `row_dtype`, of all tensors in the order of rows."""
        return [tensor.flatten(0, 1).flatten(1).view(self.row_dtype) for plane in self._planes for tensor in plane]


def mapped_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the CPU what is never written costs no physical memory."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)
