"""Seeded mutations of what travels: of bytes, of the msgpack values inside a header, and of messages' fields.

Mutating values rather than bytes keeps most inputs well formed, so that they get past the first check.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

from transfer.protocol.wire import PREFIX_BYTES, frame_header

EDGE_INTS = (
    0, 1, 2, 15, 16, 17, 127, 128, 255, 256, 65535, 65536, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
    2**40, 2**40 + 1, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -(2**31), -(2**63),
)  # fmt: skip
EDGE_VALUES: tuple[Any, ...] = (
    None, True, False, 0.0, -1.5, float("inf"), float("nan"), "", "x", "\0", "é" * 40, b"", b"\0" * 32, [], {}, [[]],
    [{}], {"": None}, msgpack.ExtType(1, b""), msgpack.Timestamp(1), *EDGE_INTS,
)  # fmt: skip
MAX_BYTES = 4096
MARKS = (0, 0x7F, 0x80, 0xC0, 0xC1, 0xC4, 0xC9, 0xD9, 0xDF, 0xFF)  # of msgpack types, and edges


def mutate_bytes(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One to four small changes anywhere."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(_BYTE_CHANGES)(rng, out, others)
    return bytes(out[:MAX_BYTES])


def _flip(rng: random.Random, out: bytearray, others: Sequence[bytes]) -> None:
    if out:
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, out: bytearray, others: Sequence[bytes]) -> None:
    if out:
        out[rng.randrange(len(out))] = rng.choice((*MARKS, rng.randrange(256)))


def _insert(rng: random.Random, out: bytearray, others: Sequence[bytes]) -> None:
    at = rng.randrange(len(out) + 1)
    out[at:at] = rng.randbytes(rng.choice((1, 2, 4, 9)))


def _delete(rng: random.Random, out: bytearray, others: Sequence[bytes]) -> None:
    at = rng.randrange(len(out) + 1)
    del out[at : at + rng.choice((1, 2, 4, 9))]


def _repeat(rng: random.Random, out: bytearray, others: Sequence[bytes]) -> None:
    at, size = rng.randrange(len(out) + 1), rng.randrange(1, 40)
    out[at:at] = out[at : at + size] * rng.choice((1, 1, 8))


def _truncate(rng: random.Random, out: bytearray, others: Sequence[bytes]) -> None:
    del out[rng.randrange(len(out) + 1) :]


def _splice(rng: random.Random, out: bytearray, others: Sequence[bytes]) -> None:
    other = rng.choice(others)
    out[rng.randrange(len(out) + 1) :] = other[rng.randrange(len(other) + 1) :]


_BYTE_CHANGES: tuple[Callable[[random.Random, bytearray, Sequence[bytes]], None], ...] = (
    _flip, _set, _insert, _delete, _repeat, _truncate, _splice,
)  # fmt: skip


def repaired(header: bytes) -> bytes:
    """A damaged header with the version and the checksum it ought to have, so that the damage gets further."""
    return frame_header(header[PREFIX_BYTES:])


def mutate_header(rng: random.Random, header: bytes) -> bytes:
    """Change one value, key or length inside the msgpack of a header; the header itself when it holds none."""
    try:
        record = msgpack.unpackb(header[PREFIX_BYTES:], raw=False, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException):
        return header
    try:
        return frame_header(msgpack.packb(mutate_value(rng, record)))
    except (ValueError, TypeError, OverflowError):
        return header


def mutate_value(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """`value` with one change somewhere inside."""
    if isinstance(value, dict) and value and depth < 8:
        out, key = dict(value), rng.choice(list(value))
        roll = rng.random()
        if roll < 0.8:
            out[key] = mutate_value(rng, value[key], depth + 1)
        elif roll < 0.9:
            del out[key]
        else:
            out[rng.choice(("", "type", "x", 7, None))] = rng.choice(EDGE_VALUES)
        return out
    if isinstance(value, list) and value and depth < 8 and rng.random() < 0.9:
        out_list, at = list(value), rng.randrange(len(value))
        roll = rng.random()
        if roll < 0.6:
            out_list[at] = mutate_value(rng, value[at], depth + 1)
        elif roll < 0.75:
            del out_list[at]
        else:
            out_list[at:at] = [value[at]] * rng.choice((1, 3, 50))
        return out_list
    return _mutate_leaf(rng, value)


def _mutate_leaf(rng: random.Random, value: Any) -> Any:
    roll = rng.random()
    if roll < 0.2:
        return rng.choice(EDGE_VALUES)
    if isinstance(value, bool) or value is None or roll < 0.3:
        return rng.choice((True, False, None, 0, 1, [value], {"x": value}))
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, value * 2, -value, rng.choice(EDGE_INTS)))
    if isinstance(value, (bytes, str)) and value:
        at = rng.randrange(len(value))
        return rng.choice((value[:at], value + value, value[:at] + value[at + 1 :], value[at:] + value[:at], value * 3))
    return rng.choice(EDGE_VALUES)


def mutate_message(rng: random.Random, message: Any, keep: Sequence[str] = ()) -> Any:
    """A message of the same type with one field changed to another value of its type; fields in `keep` stay."""
    names = [field.name for field in dataclasses.fields(message) if field.name not in keep]
    if not names:
        return message
    name = rng.choice(names)
    return dataclasses.replace(message, **{name: _same_type(rng, getattr(message, name))})


def _same_type(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        small = (value + 1, value - 1, value * 2, value // 2, rng.randrange(64), rng.choice(EDGE_INTS))
        return max(0, rng.choice(small))
    if isinstance(value, bytes):
        return mutate_bytes(rng, value, (value,))[: len(value)].ljust(len(value), b"\0") if value else b"\0"
    if isinstance(value, str):
        return rng.choice(("", value[::-1], value + "x", "StreamTimeout", "PeerLost"))
    if isinstance(value, tuple):
        items = list(value)
        rng.shuffle(items)
        return tuple(items[: rng.randrange(len(items) + 1)]) if rng.random() < 0.5 else tuple(items + items[:1])
    if dataclasses.is_dataclass(value):
        return mutate_message(rng, value)
    if isinstance(value, dict):
        return {**value, "x": rng.choice((1, "y", b"z"))}
    return value
