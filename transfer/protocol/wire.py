"""Messages to bytes and back: a version byte, a checksum and a msgpack map, then raw frames never copied or parsed.

Decoding is strict: another version, an unknown type, a missing or unknown field, a value out of range, an extension
type or a nesting too deep is a MalformedMessage. Nothing is ever unpickled. This is the only file that knows msgpack.
"""

from __future__ import annotations

import functools
import operator
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgpack  # type: ignore[import-untyped]

from transfer.errors import LocalProtocolError, MalformedMessage, MessageTooLarge, TransferError
from transfer.protocol.messages import (
    Abort,
    Accept,
    Ack,
    Announce,
    Attached,
    Block,
    Call,
    Cancel,
    Close,
    End,
    Fail,
    Filled,
    Grant,
    Message,
    Open,
    Part,
    Parts,
    Probe,
    Released,
    Resume,
    Revoke,
    Revoked,
)
from transfer.protocol.negotiate import Offer
from transfer.protocol.ticket import STREAM_ID_CHARS, is_stream_id
from transfer.tensors import PlaneSpec

WIRE_VERSION = 2
PREFIX_BYTES = 5  # the version, and the checksum of what follows
MAX_FRAMES = 4096
MAX_HEADER_BYTES = 16 * 1024 * 1024
MAX_BLOCKS = 1 << 20  # blocks in one grant
MAX_PLANES = 1024
MAX_NAMES = 16  # ways to protect or to carry a payload
MAX_ITEMS = 65536
MAX_PARTS = 65536
MAX_DEPTH = 12

Check: TypeAlias = Callable[[Any], Any]
_PREFIX = bytes([WIRE_VERSION])


@dataclass(frozen=True, slots=True)
class _Int:
    """An int from `low` to `high`. Most fields are one, so that `decode_header` looks at them without a call."""

    low: int
    high: int

    def __call__(self, value: Any) -> int:
        if type(value) is not int or not self.low <= value <= self.high:
            raise MalformedMessage(f"expected an int from {self.low} to {self.high}")
        return value


def _int(low: int, high: int) -> Check:
    return _Int(low, high)


def _text(limit: int) -> Check:
    def check(value: Any) -> str:
        if type(value) is not str or len(value) > limit:
            raise MalformedMessage(f"expected a string of at most {limit} characters")
        return value

    return check


def _bytes(low: int, high: int) -> Check:
    def check(value: Any) -> bytes:
        if type(value) is not bytes or not low <= len(value) <= high:
            raise MalformedMessage(f"expected {low} to {high} bytes")
        return value

    return check


def _optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _versions(value: Any) -> tuple[int, int]:
    if type(value) is not list or len(value) != 2:
        raise MalformedMessage("versions are a pair")
    low, high = map(_int(0, 255), value)
    if low > high:
        raise MalformedMessage("the lowest version is above the highest")
    return low, high


def _offer(value: Any) -> Offer:
    if type(value) is not dict or value.keys() != _OFFER.keys():
        raise MalformedMessage(f"an offer is a map of {', '.join(_OFFER)}")
    return Offer(**{field: check(value[field]) for field, check in _OFFER.items()})


def _stream_id(value: Any) -> str:
    if type(value) is not str or len(value) != STREAM_ID_CHARS or not _is_known_stream_id(value):
        raise MalformedMessage("a stream_id is 32 lower-case hexadecimal digits")
    return value


_is_known_stream_id = functools.lru_cache(maxsize=1024)(is_stream_id)  # the same few come with every block


def _list(limit: int, element: Check) -> Check:
    def check(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or len(value) > limit:
            raise MalformedMessage(f"expected a list of at most {limit} elements")
        return tuple(element(item) for item in value)

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


def _body(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise MalformedMessage("a body is a map")
    _plain(value, 0)
    return value


def _part(value: Any) -> Part:
    if type(value) is not list or len(value) != 3:
        raise MalformedMessage("a part is a list of call_id, body and num_frames")
    return Part(call_id=_u63(value[0]), body=_body(value[1]), num_frames=_int(0, MAX_FRAMES)(value[2]))


_u32 = _int(0, (1 << 32) - 1)
_u63 = _int(0, (1 << 63) - 1)
_rows = _int(0, 1 << 40)
_code = _text(128)
_message = _text(16384)

_block_size = _int(1, 1 << 24)
_proof = _bytes(32, 32)
_OFFER: dict[str, Check] = {
    "versions": _versions,
    "block_size": _block_size,
    "planes": _list(MAX_PLANES, PlaneSpec.from_body),
    "integrity": _list(MAX_NAMES, _text(32)),
    "payload": _list(MAX_NAMES, _text(32)),
    "max_frame_bytes": _u63,
    "credit": _int(1, (1 << 32) - 1),
}
_STREAM: dict[str, Check] = {"stream_id": _stream_id, "epoch": _int(1, (1 << 32) - 1)}
_CALL: dict[str, Check] = {"call_id": _u63}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Schema:
    kind: Any
    fields: dict[str, Check]
    min_frames: int = 0
    max_frames: int = 0


SCHEMAS: Mapping[str, _Schema] = {
    "open": _Schema(
        kind=Open,
        fields={
            **_STREAM,
            "proof": _proof,
            "nonce": _bytes(16, 16),
            "offer": _offer,
            "content_key": _text(512),
            "deadline_ms": _optional(_u63),
        },
    ),
    "accept": _Schema(
        kind=Accept,
        fields={
            **_STREAM,
            "proof": _proof,
            "offer": _offer,
            "first_index": _u32,
            "segment": _optional(_body),
            "data_address": _optional(_text(1024)),
        },
    ),
    "grant": _Schema(
        kind=Grant,
        fields={
            **_STREAM,
            "round": _u32,
            "first_index": _u32,
            "block_ids": _list(MAX_BLOCKS, _u32),
            "allocated_tokens": _rows,
            "block_size": _block_size,
            "credit": _u32,
        },
    ),
    "revoke": _Schema(kind=Revoke, fields={**_STREAM, "serial": _u32, "round": _u32, "first_index": _u32}),
    "revoked": _Schema(kind=Revoked, fields={**_STREAM, "serial": _u32, "first_index": _u32}),
    "announce": _Schema(
        kind=Announce,
        fields={
            **_STREAM,
            "total_rows": _rows,
            "allocated_tokens": _rows,
            "block_size": _block_size,
            "items": _list(MAX_ITEMS, _body),
        },
    ),
    "block": _Schema(
        kind=Block,
        fields={
            **_STREAM,
            "index": _u32,
            "block_id": _u32,
            "first_row": _rows,
            "num_rows": _rows,
            "serial": _u63,
            "tag": _bytes(0, 8),
        },
        max_frames=MAX_PLANES,
    ),
    "attached": _Schema(kind=Attached, fields={**_STREAM, "generation": _u63}),
    "filled": _Schema(
        kind=Filled,
        fields={**_STREAM, "first_index": _u32, "block_ids": _list(MAX_BLOCKS, _u32), "serial": _u63},
    ),
    "released": _Schema(kind=Released, fields=_STREAM),
    "ack": _Schema(kind=Ack, fields={**_STREAM, "serial": _u32, "next_index": _u32, "kept_index": _u32}),
    "probe": _Schema(kind=Probe, fields={**_STREAM, "nonce": _u63, "tag": _bytes(0, 16)}),
    "resume": _Schema(
        kind=Resume,
        fields={**_STREAM, "nonce": _u63, "serial": _u32, "next_index": _u32, "kept_index": _u32},
    ),
    "close": _Schema(kind=Close, fields={**_STREAM, "total_rows": _rows}),
    "abort": _Schema(kind=Abort, fields={**_STREAM, "code": _code, "message": _message}),
    "call": _Schema(kind=Call, fields={**_CALL, "method": _text(128), "body": _body}, max_frames=MAX_FRAMES),
    "parts": _Schema(kind=Parts, fields={"parts": _list(MAX_PARTS, _part)}, max_frames=MAX_FRAMES),
    "end": _Schema(kind=End, fields={**_CALL, "body": _body}),
    "fail": _Schema(kind=Fail, fields={**_CALL, "code": _code, "message": _message}),
    "cancel": _Schema(kind=Cancel, fields=_CALL),
}
_CHECKS: Mapping[str, tuple[tuple[str, Check], ...]] = {n: tuple(s.fields.items()) for n, s in SCHEMAS.items()}
_NAMES: Mapping[Any, tuple[str, tuple[str, ...]]] = {s.kind: (n, tuple(s.fields)) for n, s in SCHEMAS.items()}
_GETTERS: Mapping[Any, Callable[[Any], tuple[Any, ...]]] = {
    kind: operator.attrgetter(*fields) for kind, (_, fields) in _NAMES.items() if len(fields) > 1
}


def encode_header(message: Message) -> bytes:
    """The header frame of `message`.

    Raises LocalProtocolError for a body of other than plain values, MessageTooLarge beyond MAX_HEADER_BYTES.
    """
    name, fields = _NAMES[type(message)]
    getter = _GETTERS.get(type(message))
    values = (getattr(message, fields[0]),) if getter is None else getter(message)
    record: dict[str, Any] = {"type": name, **dict(zip(fields, values, strict=True))}
    if isinstance(message, (Open, Accept)):
        offer = record["offer"] = {field: getattr(message.offer, field) for field in _OFFER}
        offer["planes"] = [plane.to_body() for plane in message.offer.planes]
    elif isinstance(message, Parts):
        record["parts"] = [(part.call_id, part.body, part.num_frames) for part in message.parts]
    elif isinstance(message, (Abort, Fail)):
        record["code"], record["message"] = message.code[:128], message.message[:16384]
    try:
        body: bytes = msgpack.packb(record, use_bin_type=True)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise LocalProtocolError(f"a {name!r} message holds something that cannot travel: {error}") from error
    header = frame_header(body)
    if len(header) > MAX_HEADER_BYTES:
        raise MessageTooLarge(f"a {name!r} header of {len(header)} bytes is beyond {MAX_HEADER_BYTES}")
    return header


def frame_header(body: bytes) -> bytes:
    """The header frame round a msgpack map: the version, a CRC-32 of the map, the map.

    Blocks have tags of their own; this keeps a damaged Ack or Announce from passing for a message with other numbers.
    """
    return _PREFIX + zlib.crc32(body).to_bytes(4, "big") + body


def decode_header(header: bytes | memoryview, num_frames: int) -> Message:
    """The message of a header frame that came with `num_frames` raw frames. MalformedMessage for anything else."""
    if not PREFIX_BYTES < len(header) <= MAX_HEADER_BYTES:
        raise MalformedMessage(f"a header of {len(header)} bytes; {PREFIX_BYTES + 1} to {MAX_HEADER_BYTES} are allowed")
    if header[0] != WIRE_VERSION:
        raise MalformedMessage(f"wire version {header[0]}; this side speaks {WIRE_VERSION}: run equal versions")
    body = memoryview(header)[PREFIX_BYTES:]
    if zlib.crc32(body) != int.from_bytes(header[1:PREFIX_BYTES], "big"):
        raise MalformedMessage("a header does not match its checksum: it was damaged on its way")
    try:
        record = msgpack.unpackb(body, raw=False, use_list=True, strict_map_key=True, max_ext_len=0)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise MalformedMessage(f"a header is no msgpack: {type(error).__name__}") from error
    if type(record) is not dict or not isinstance(record.get("type"), str) or record["type"] not in SCHEMAS:
        raise MalformedMessage("a header is no map of a known type")
    name = record.pop("type")
    schema = SCHEMAS[name]
    if record.keys() != schema.fields.keys():
        raise MalformedMessage(f"a {name!r} message has the fields {sorted(map(str, record))[:32]}")
    if not schema.min_frames <= num_frames <= schema.max_frames:
        raise MalformedMessage(f"a {name!r} message came with {num_frames} frames")
    try:
        for field, check in _CHECKS[name]:
            value = record[field]
            if type(check) is not _Int:
                record[field] = check(value)
            elif type(value) is not int or not check.low <= value <= check.high:
                check(value)
        message: Message = schema.kind(**record)
    except TransferError as error:
        raise MalformedMessage(f"a {name!r} message is not valid: {error}") from error
    if isinstance(message, Parts) and sum(part.num_frames for part in message.parts) != num_frames:
        raise MalformedMessage(f"parts speak of other than the {num_frames} frames that came")
    return message
