"""Checks of a header's fields: each takes a value as msgpack gave it and returns it as a message holds it, or raises.

One function or small object per kind of field, with its bounds; `transfer.protocol.wire` says which field has which.
Anything unexpected is a MalformedMessage that says what was expected.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from transfer.errors import MalformedMessage
from transfer.protocol.messages import Part
from transfer.protocol.negotiate import Offer
from transfer.protocol.ticket import STREAM_ID_CHARS, is_stream_id
from transfer.tensors import PlaneSpec

MAX_FRAMES = 4096
MAX_BLOCKS = 1 << 18  # blocks in one grant
MAX_PLANES = 1024
MAX_NAMES = 16  # ways to protect or to carry a payload
MAX_ITEMS = 65536
MAX_PARTS = 65536
MAX_CALL_IDS = 16384  # calls that one question or its answer names
MAX_DEPTH = 12

Check: TypeAlias = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Int:
    """An int from `low` to `high`. Most fields are one, so that `decode_header` looks at them without a call."""

    low: int
    high: int

    def __call__(self, value: Any) -> int:
        if type(value) is not int or not self.low <= value <= self.high:
            raise MalformedMessage(f"expected an int from {self.low} to {self.high}")
        return value


def integer(low: int, high: int) -> Check:
    """An int in this range."""
    return Int(low, high)


def text(limit: int) -> Check:
    """A string of at most `limit` characters."""

    def check(value: Any) -> str:
        if type(value) is not str or len(value) > limit:
            raise MalformedMessage(f"expected a string of at most {limit} characters")
        return value

    return check


def binary(low: int, high: int) -> Check:
    """So many bytes."""

    def check(value: Any) -> bytes:
        if type(value) is not bytes or not low <= len(value) <= high:
            raise MalformedMessage(f"expected {low} to {high} bytes")
        return value

    return check


def optional(check: Check) -> Check:
    """None, or what `check` takes."""
    return lambda value: None if value is None else check(value)


def _versions(value: Any) -> tuple[int, int]:
    if type(value) is not list or len(value) != 2:
        raise MalformedMessage("versions are a pair")
    low, high = map(integer(0, 255), value)
    if low > high:
        raise MalformedMessage("the lowest version is above the highest")
    return low, high


def offer(value: Any) -> Offer:
    """An offer, in the Open and the Accept of a stream."""
    if type(value) is not dict or value.keys() != OFFER.keys():
        raise MalformedMessage(f"an offer is a map of {', '.join(OFFER)}")
    return Offer(**{field: check(value[field]) for field, check in OFFER.items()})


def stream_id(value: Any) -> str:
    """The id of a stream."""
    if type(value) is not str or len(value) != STREAM_ID_CHARS or not _is_known_stream_id(value):
        raise MalformedMessage("a stream_id is 32 lower-case hexadecimal digits")
    return value


_is_known_stream_id = functools.lru_cache(maxsize=1024)(is_stream_id)  # the same few come with every block


_ONLY_INT = {int}


def sequence(limit: int, element: Check) -> Check:
    """A list of at most `limit` elements, as a tuple."""

    def check(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(value) > limit:
            raise MalformedMessage(f"expected a list of at most {limit} elements")
        if type(element) is Int and value and set(map(type, value)) == _ONLY_INT:
            element(min(value))
            element(max(value))
            return tuple(value)
        return tuple(map(element, value))

    return check


_SCALARS = {type(None), bool, int, float, str, bytes}


def _plain(value: Any, depth: int) -> None:
    kind = type(value)
    if kind in _SCALARS:
        return
    if depth >= MAX_DEPTH or kind not in (list, dict):
        raise MalformedMessage(f"a body holds plain values nested at most {MAX_DEPTH} deep")
    children: Any = value
    if kind is dict:
        if not all(type(key) is str for key in value):
            raise MalformedMessage("a body's keys are strings")
        children = value.values()
    if not set(map(type, children)) <= _SCALARS:
        for child in children:
            _plain(child, depth + 1)


def body_map(value: Any) -> dict[str, Any]:
    """A map of plain values: what a caller, a callee or an announcement says in its own words."""
    if type(value) is not dict:
        raise MalformedMessage("a body is a map")
    _plain(value, 0)
    return value


def part(value: Any) -> Part:
    """A partial answer."""
    if type(value) is not list or len(value) != 4:
        raise MalformedMessage("a part is a list of call_id, serial, body and num_frames")
    call_id, serial, body, num_frames = value
    return Part(call_id=U63(call_id), serial=U63(serial), body=body_map(body), num_frames=_NUM_FRAMES(num_frames))


def counted(value: Any) -> tuple[int, int]:
    """The id of a call, and a number of its parts."""
    if type(value) is not list or len(value) != 2:
        raise MalformedMessage("a call that is served is a pair of its id and the number of its parts")
    return U63(value[0]), U63(value[1])


U32 = integer(0, (1 << 32) - 1)
U63 = integer(0, (1 << 63) - 1)
ROWS = integer(0, 1 << 40)
CODE = text(128)
MESSAGE = text(16384)
_NUM_FRAMES = integer(0, MAX_FRAMES)
BLOCK_SIZE = integer(1, 1 << 24)
PROOF = binary(32, 32)
OFFER: dict[str, Check] = {
    "versions": _versions,
    "block_size": BLOCK_SIZE,
    "planes": sequence(MAX_PLANES, PlaneSpec.from_body),
    "integrity": sequence(MAX_NAMES, text(32)),
    "payload": sequence(MAX_NAMES, text(32)),
    "max_frame_bytes": U63,
    "credit": integer(1, (1 << 32) - 1),
}
STREAM: dict[str, Check] = {"stream_id": stream_id, "epoch": integer(1, (1 << 32) - 1)}
CALL: dict[str, Check] = {"call_id": U63}
