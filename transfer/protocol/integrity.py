"""Tags over blocks: XXH3-64 of header fields and payload, seeded per stream and epoch from the ticket's secret.

A tag finds corruption and blocks that belong elsewhere (another stream, epoch, index or place). It is keyed but not
a MAC: against an active attacker on the path, sealing and CURVE are the defence.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence

import xxhash

from transfer.protocol.ticket import Ticket

_HEADER = struct.Struct("<32sQQQQQQ")
NO_TAG = b""


def tag_seed(ticket: Ticket) -> int:
    """64-bit seed that only holders of the ticket know."""
    text = f"tandem tag 2|{ticket.stream_id}|{ticket.epoch}".encode()
    return int.from_bytes(hmac.new(ticket.secret, text, hashlib.sha256).digest()[:8], "little")


def block_tag(
    seed: int,
    stream_id: str,
    epoch: int,
    index: int,
    block_id: int,
    first_row: int,
    num_rows: int,
    serial: int,
    frames: Sequence[bytes | memoryview],
) -> bytes:
    """Tag of one block, 8 bytes: the frames in plane order; their lengths follow from num_rows and the planes."""
    header = _HEADER.pack(stream_id.encode("ascii"), epoch, index, block_id, first_row, num_rows, serial)
    digest = xxhash.xxh3_64(header, seed=seed)
    for frame in frames:
        digest.update(frame)
    return digest.digest()
