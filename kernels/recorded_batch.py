"""A step's attention described on the device, for steps that are recorded once and replayed.

An `AttentionBatch` says on the host who asks for what; a replayed step cannot. Here every sequence asks with equally
many queries, and where its keys lie stands in two tensors of the device, which are filled anew before each replay.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from kernels.paged_attention import AttentionBatch

TILE_COLUMNS = 5


class RecordedBatch(AttentionBatch):
    """`length` queries a sequence, those of sequence i in rows [i * length, (i + 1) * length) of `q`.

    tiles: [S, 5] int32, of sequence i `[i * length, length, position of its first query, keys, i]`; no keys where it is
    padding, which answers zeros. table: [S, P] int32 page ids. longest: a bound on the keys of a sequence. Triton path
    only.
    """

    __slots__ = ("_length", "_table", "_tile_list")

    def __init__(self, tiles: torch.Tensor, table: torch.Tensor, longest: int, length: int = 1) -> None:
        count = tiles.shape[0]
        super().__init__(
            page_table=torch.zeros((count, 1), dtype=torch.int64),
            query_lens=[length] * count,
            kv_lens=[longest] * count,
            query_start=range(0, count * length, length),
        )
        self._tile_list = tiles
        self._table = table
        self._length = length

    def check(self, page_size: int) -> None:
        """Every path but Triton's begins with it. Raises RuntimeError: they read lengths on the host."""
        raise RuntimeError("a recorded step takes the Triton path of attention, which is not to be had here")

    def tiles(self, triton: ModuleType, q: torch.Tensor, page_size: int, heads_per_key: int) -> tuple[Any, Any]:
        """What `paged_attention` asks for; the same tensors at every call. Raises RuntimeError where the queries of a
        sequence take more than one tile."""
        kind = heads_per_key, q.shape[-1], q.element_size()
        if kind not in self._tiles:
            shape = triton.shape_for(heads_per_key, q.shape[-1], self._length, q.element_size())
            if self._length * heads_per_key > shape.rows:
                raise RuntimeError(
                    f"{self._length} queries in {heads_per_key} heads do not fit a tile of {shape.rows} rows"
                )
            tiles = triton.Tiles(
                tiles=self._tile_list, table=self._table, block_q=self._length, longest=self.kv_lens[0]
            )
            self._tiles[kind] = tiles, shape
        return self._tiles[kind]  # type: ignore[no-any-return]
