"""Offer, Terms and agree: what two ends can do, and what they will do. Pure and symmetric.

Each end says once what it speaks and how it is configured (an Offer, carried by Open and Accept); both compute the
same Terms from the two offers, whoever computes. What cannot be bridged is a typed error, the same one at both ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transfer.errors import Incompatible, IncompatibleBlocks
from transfer.tensors import SEAL_BYTES, PlaneSpec

PROTOCOL_VERSION = 3
SEALED, TAGGED = "aes-256-gcm", "xxh3-64"
INTEGRITY = (SEALED, TAGGED, "none")  # strongest first: the first that both offer is used
PAYLOAD = ("shm", "wire")


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What one end speaks (lowest and highest version), and how it is configured."""

    versions: tuple[int, int] = (PROTOCOL_VERSION, PROTOCOL_VERSION)
    block_size: int
    planes: tuple[PlaneSpec, ...]
    integrity: tuple[str, ...] = (TAGGED,)
    payload: tuple[str, ...] = ("wire",)
    max_frame_bytes: int
    credit: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """What a stream uses, the same at both ends."""

    version: int
    block_size: int
    planes: tuple[PlaneSpec, ...]
    integrity: str
    payload: str
    max_frame_bytes: int
    credit: int


def agree(ours: Offer, theirs: Offer) -> Terms:
    """The terms of two offers; `agree(a, b) == agree(b, a)`.

    Raises Incompatible for versions or integrity without overlap, IncompatibleBlocks for block sizes or planes that
    differ or a block that fits no frame; with the same words whichever end asks.
    """
    version = min(ours.versions[1], theirs.versions[1])
    if version < max(ours.versions[0], theirs.versions[0]):
        spans = sorted((ours.versions, theirs.versions))
        raise Incompatible(f"one end speaks versions {spans[0]}, the other {spans[1]}: run versions that overlap")
    if ours.block_size != theirs.block_size:
        sizes = sorted((ours.block_size, theirs.block_size))
        raise IncompatibleBlocks(
            f"one end uses blocks of {sizes[0]} rows, the other of {sizes[1]}: configure block_size alike at both ends"
        )
    if ours.planes != theirs.planes:
        shown = sorted(", ".join(map(_shown, offer.planes)) for offer in (ours, theirs))
        raise IncompatibleBlocks(f"one end has the planes [{shown[0]}], the other [{shown[1]}]: run matching models")
    integrity = _strongest("integrity", INTEGRITY, ours.integrity, theirs.integrity)
    max_frame_bytes = min(ours.max_frame_bytes, theirs.max_frame_bytes)
    for plane in ours.planes:
        frame_bytes = plane.row_bytes * ours.block_size + (SEAL_BYTES if integrity == SEALED else 0)
        if frame_bytes > max_frame_bytes:
            raise IncompatibleBlocks(
                f"a block of plane {plane.name!r} is {frame_bytes} bytes, and one end takes "
                f"frames of at most {max_frame_bytes}: lower block_size or raise max_message_bytes"
            )
    return Terms(
        version=version,
        block_size=ours.block_size,
        planes=ours.planes,
        integrity=integrity,
        payload=_strongest("payload path", PAYLOAD, ours.payload, theirs.payload),
        max_frame_bytes=max_frame_bytes,
        credit=min(ours.credit, theirs.credit),
    )


def _strongest(what: str, ranking: Sequence[str], ours: Sequence[str], theirs: Sequence[str]) -> str:
    for name in ranking:
        if name in ours and name in theirs:
            return name
    sides = sorted((", ".join(sorted(ours)), ", ".join(sorted(theirs))))
    raise Incompatible(f"no common {what}: one end offers [{sides[0]}], the other [{sides[1]}]")


def _shown(plane: PlaneSpec) -> str:
    return f"{plane.name}:{plane.dtype}{list(plane.row_shape)}"
