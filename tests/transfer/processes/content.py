"""What the streams of these tests carry: rows that follow from a seed and their number alone, and digests of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from transfer.tensors import PlaneSpec

WIDTH = 48
PLANES = (
    PlaneSpec(name="embeddings", dtype="bfloat16", row_shape=(WIDTH,)),
    PlaneSpec(name="token_ids", dtype="int32", row_shape=()),
)
ROW_BYTES = sum(plane.row_bytes for plane in PLANES)


def make_rows(seed: int, first_row: int, num_rows: int) -> dict[str, torch.Tensor]:
    """Rows first_row ... of the stream of `seed`: any bit pattern, and never the same row twice nearby."""
    row = torch.arange(first_row, first_row + num_rows, dtype=torch.int64)
    mixed = row[:, None] * 1_000_003 + torch.arange(WIDTH, dtype=torch.int64) * 10_007 + seed * 7_919
    mixed = (mixed ^ (mixed >> 7)) * 2_654_435_761
    bits = ((mixed >> 13) & 0xFFFF).to(torch.int32).to(torch.int16)
    return {"embeddings": bits.view(torch.bfloat16), "token_ids": ((row + seed * 31) % 2**31).to(torch.int32)}


class Digest:
    """A hash per plane of rows that come in order."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._hashes = {plane.name: hashlib.blake2b(digest_size=16) for plane in PLANES}

    def add(self, planes: Mapping[str, torch.Tensor]) -> None:
        for name, rows in planes.items():
            self._hashes[name].update(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self.num_rows += len(planes["token_ids"])

    def hex(self) -> list[str]:
        return [self._hashes[plane.name].hexdigest() for plane in PLANES]


def expected_digest(seed: int, num_rows: int) -> list[str]:
    """The digest of a whole stream."""
    digest = Digest()
    if num_rows:
        digest.add(make_rows(seed, 0, num_rows))
    return digest.hex()
