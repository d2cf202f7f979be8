"""Pages of 8-bit keys or values beside their scales, as a cache that the ops on pages take in place of a plain one.

They are read by being dequantised first: the pages that a step's sequences hold, each once, into a small cache in the
query's dtype, whose page table numbers them in their order. So every path of attention serves them, and pages that no
sequence of the step holds stay unread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import torch

from kernels.quantise import read_quantised_pages, write_quantised_pages


@dataclasses.dataclass(frozen=True, slots=True)
class QuantisedPages:
    """values [num_pages, page_size, Hk, D] int8 or float8_e4m3fn; scales [num_pages, page_size, Hk] float32."""

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def write(self, x: torch.Tensor, slots: torch.Tensor) -> None:
        """Quantise x [T, Hk, D] into `slots` [T] int64, in place."""
        write_quantised_pages(self.values, self.scales, x, slots)

    def read(self, live: LivePages, dtype: torch.dtype) -> torch.Tensor:
        """The live pages as a plain cache [live, page_size, Hk, D]."""
        rows = read_quantised_pages(self.values, self.scales, live.slots, dtype)
        return rows.view(-1, self.shape[1], *rows.shape[1:])


KVPages: TypeAlias = torch.Tensor | QuantisedPages
LayerCache: TypeAlias = tuple[KVPages, KVPages]  # keys and values of one layer


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LivePages:
    """The pages that sequences hold: slots [live * page_size] int64 of all of them; page_table [S, P] int64 on the CPU,
    with each page's number among them."""

    slots: torch.Tensor
    page_table: torch.Tensor

    @classmethod
    def of(cls, page_table: torch.Tensor, kv_lens: Sequence[int], page_size: int, device: torch.device) -> LivePages:
        """Of the first `kv_lens` positions of each row of a page table."""
        numbers: dict[int, int] = {}
        table = torch.zeros(page_table.shape, dtype=torch.int64)
        for row, (listed, kv_len) in enumerate(zip(page_table.tolist(), kv_lens, strict=True)):
            own = [numbers.setdefault(page, len(numbers)) for page in listed[: -(-kv_len // page_size)]]
            table[row, : len(own)] = torch.tensor(own)
        pages = torch.tensor(list(numbers), dtype=torch.int64)
        slots = (pages[:, None] * page_size + torch.arange(page_size)).flatten()
        return cls(slots=slots.to(device), page_table=table)
