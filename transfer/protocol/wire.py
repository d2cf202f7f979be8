"""Messages to bytes and back: a version byte, a checksum and a msgpack map, then raw frames never copied or parsed.

Decoding is strict: another version, an unknown type, a missing or unknown field, a value out of range, an extension
type or a nesting too deep is a MalformedMessage. The map begins with its type, so that a header's size is judged by its
kind before anything is made of it; what a large one would cost in memory is counted while it is read. Nothing is ever
unpickled. This is the only file that knows msgpack.
"""

from __future__ import annotations

import operator
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack  # type: ignore[import-untyped]

from transfer.errors import LocalProtocolError, MalformedMessage, MessageTooLarge, TransferError
from transfer.protocol.messages import (
    Abort,
    Accept,
    Ack,
    Announce,
    Attached,
    Awaiting,
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
    Parts,
    Probe,
    Released,
    Resume,
    Revoke,
    Revoked,
    Serving,
    Unknown,
)
from transfer.protocol.wire_fields import (
    BLOCK_SIZE,
    CALL,
    CODE,
    MAX_BLOCKS,
    MAX_CALL_IDS,
    MAX_FRAMES,
    MAX_ITEMS,
    MAX_PARTS,
    MAX_PLANES,
    MESSAGE,
    OFFER,
    PROOF,
    ROWS,
    STREAM,
    U32,
    U63,
    Check,
    Int,
    binary,
    body_map,
    counted,
    offer,
    optional,
    part,
    sequence,
    text,
)

WIRE_VERSION = 3
PREFIX_BYTES = 5  # the version, and the checksum of what follows
MAX_HEADER_BYTES = 16 * 1024 * 1024
SMALL_HEADER_BYTES = 4096  # what every kind may have, unless its fields can be longer
MAX_LIST = 1 << 18  # elements of one list or map, also inside a body
COUNTED_FROM_BYTES = 16384  # a smaller header cannot cost much
BASE_COST_BYTES = 16 << 20  # memory that a header's values may take: this much ...
COST_PER_BYTE = 12  # ... and this much more for every byte of it ...
MAX_COST_BYTES = 64 << 20  # ... and no more than this in all

_PREFIX = bytes([WIRE_VERSION])
_LONG_LIST = re.compile(rb"[\xdc\xdd]")  # how msgpack begins a list of more than 15 elements


@dataclass(frozen=True, kw_only=True, slots=True)
class _Schema:
    kind: Any
    fields: dict[str, Check]
    max_frames: int = 0
    max_bytes: int = SMALL_HEADER_BYTES


_CALL_IDS: dict[str, Check] = {"call_ids": sequence(MAX_CALL_IDS, U63)}
_CALL_IDS_BYTES = 9 * MAX_CALL_IDS + 64
_BLOCK_IDS_BYTES = 5 * MAX_BLOCKS + 512
_MESSAGE_BYTES = 4 * (16384 + 128) + 512
_OFFER_BYTES = 1 << 20

SCHEMAS: Mapping[str, _Schema] = {
    "open": _Schema(
        kind=Open,
        fields={
            **STREAM,
            "proof": PROOF,
            "nonce": binary(16, 16),
            "offer": offer,
            "content_key": text(512),
            "deadline_ms": optional(U63),
        },
        max_bytes=_OFFER_BYTES,
    ),
    "accept": _Schema(
        kind=Accept,
        fields={
            **STREAM,
            "proof": PROOF,
            "offer": offer,
            "first_index": U32,
            "segment": optional(body_map),
            "data_address": optional(text(1024)),
        },
        max_bytes=_OFFER_BYTES,
    ),
    "grant": _Schema(
        kind=Grant,
        fields={
            **STREAM,
            "round": U32,
            "first_index": U32,
            "block_ids": sequence(MAX_BLOCKS, U32),
            "allocated_tokens": ROWS,
            "block_size": BLOCK_SIZE,
            "credit": U32,
        },
        max_bytes=_BLOCK_IDS_BYTES,
    ),
    "revoke": _Schema(kind=Revoke, fields={**STREAM, "serial": U32, "round": U32, "first_index": U32}),
    "revoked": _Schema(kind=Revoked, fields={**STREAM, "serial": U32, "first_index": U32}),
    "announce": _Schema(
        kind=Announce,
        fields={
            **STREAM,
            "total_rows": ROWS,
            "allocated_tokens": ROWS,
            "block_size": BLOCK_SIZE,
            "items": sequence(MAX_ITEMS, body_map),
        },
        max_bytes=MAX_HEADER_BYTES,
    ),
    "block": _Schema(
        kind=Block,
        fields={
            **STREAM,
            "index": U32,
            "block_id": U32,
            "first_row": ROWS,
            "num_rows": ROWS,
            "serial": U63,
            "tag": binary(0, 8),
        },
        max_frames=MAX_PLANES,
    ),
    "attached": _Schema(kind=Attached, fields={**STREAM, "generation": U63}),
    "filled": _Schema(
        kind=Filled,
        fields={**STREAM, "first_index": U32, "block_ids": sequence(MAX_BLOCKS, U32), "serial": U63},
        max_bytes=_BLOCK_IDS_BYTES,
    ),
    "released": _Schema(kind=Released, fields=STREAM),
    "ack": _Schema(kind=Ack, fields={**STREAM, "serial": U32, "next_index": U32, "kept_index": U32}),
    "probe": _Schema(kind=Probe, fields={**STREAM, "nonce": U63, "tag": binary(0, 16)}),
    "resume": _Schema(
        kind=Resume,
        fields={**STREAM, "nonce": U63, "serial": U32, "next_index": U32, "kept_index": U32},
    ),
    "close": _Schema(kind=Close, fields={**STREAM, "total_rows": ROWS}),
    "abort": _Schema(kind=Abort, fields={**STREAM, "code": CODE, "message": MESSAGE}, max_bytes=_MESSAGE_BYTES),
    "call": _Schema(
        kind=Call,
        fields={**CALL, "method": text(128), "body": body_map},
        max_frames=MAX_FRAMES,
        max_bytes=MAX_HEADER_BYTES,
    ),
    "parts": _Schema(
        kind=Parts, fields={"parts": sequence(MAX_PARTS, part)}, max_frames=MAX_FRAMES, max_bytes=MAX_HEADER_BYTES
    ),
    "end": _Schema(kind=End, fields={**CALL, "num_parts": U63, "body": body_map}, max_bytes=MAX_HEADER_BYTES),
    "fail": _Schema(kind=Fail, fields={**CALL, "code": CODE, "message": MESSAGE}, max_bytes=_MESSAGE_BYTES),
    "cancel": _Schema(kind=Cancel, fields=CALL),
    "awaiting": _Schema(kind=Awaiting, fields=_CALL_IDS, max_bytes=_CALL_IDS_BYTES),
    "unknown": _Schema(kind=Unknown, fields=_CALL_IDS, max_bytes=_CALL_IDS_BYTES),
    "serving": _Schema(kind=Serving, fields={"calls": sequence(MAX_CALL_IDS, counted)}, max_bytes=20 * MAX_CALL_IDS),
}
_CHECKS: Mapping[str, tuple[tuple[str, Check], ...]] = {n: tuple(s.fields.items()) for n, s in SCHEMAS.items()}
_NAMES: Mapping[Any, tuple[str, tuple[str, ...]]] = {s.kind: (n, tuple(s.fields)) for n, s in SCHEMAS.items()}
_GETTERS: Mapping[Any, Callable[[Any], tuple[Any, ...]]] = {
    kind: operator.attrgetter(*fields) for kind, (_, fields) in _NAMES.items() if len(fields) > 1
}
_STARTS: Mapping[bytes, str] = {  # a map of so many fields, the first of them the type
    bytes([0x81 + len(schema.fields)]) + msgpack.packb("type") + msgpack.packb(name): name
    for name, schema in SCHEMAS.items()
}
_NAME_AT = 6  # where the name begins: after the byte of the map, and the word "type" with its byte


def encode_header(message: Message) -> bytes:
    """The header frame of `message`.

    Raises LocalProtocolError for a body of other than plain values, MessageTooLarge for one that no peer would read.
    """
    name, fields = _NAMES[type(message)]
    getter = _GETTERS.get(type(message))
    values = (getattr(message, fields[0]),) if getter is None else getter(message)
    record: dict[str, Any] = {"type": name, **dict(zip(fields, values, strict=True))}
    if isinstance(message, (Open, Accept)):
        offered = record["offer"] = {field: getattr(message.offer, field) for field in OFFER}
        offered["planes"] = [plane.to_body() for plane in message.offer.planes]
    elif isinstance(message, Parts):
        record["parts"] = [(part.call_id, part.serial, part.body, part.num_frames) for part in message.parts]
    elif isinstance(message, (Abort, Fail)):
        record["code"], record["message"] = message.code[:128], message.message[:16384]
    try:
        body: bytes = msgpack.packb(record, use_bin_type=True)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise LocalProtocolError(f"a {name!r} message holds something that cannot travel: {error}") from error
    if PREFIX_BYTES + len(body) > SCHEMAS[name].max_bytes:
        size, limit = PREFIX_BYTES + len(body), SCHEMAS[name].max_bytes
        raise MessageTooLarge(f"a {name!r} header of {size} bytes is beyond {limit}: send less at once")
    if len(body) > COUNTED_FROM_BYTES:
        try:
            _unpack(body)
        except (ValueError, MemoryError) as error:
            raise MessageTooLarge(f"a {name!r} header would cost its reader too much: {error}") from error
    return frame_header(body)


def frame_header(body: bytes) -> bytes:
    """The header frame round a msgpack map: the version, a CRC-32 of the map, the map.

    Blocks have tags of their own; this keeps a damaged Ack or Announce from passing for a message with other numbers.
    """
    return _PREFIX + zlib.crc32(body).to_bytes(4, "big") + body


def decode_header(header: bytes | memoryview, num_frames: int) -> Message:
    """The message of a header frame that came with `num_frames` raw frames. MalformedMessage for anything else."""
    name, body = _checked_body(header)
    schema = SCHEMAS[name]
    if num_frames > schema.max_frames:
        raise MalformedMessage(f"a {name!r} message came with {num_frames} frames")
    try:
        record = _unpack(body)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError, MemoryError) as error:
        raise MalformedMessage(f"a header is no msgpack: {type(error).__name__}") from error
    del record["type"]
    if record.keys() != schema.fields.keys():
        raise MalformedMessage(f"a {name!r} message has the fields {sorted(map(str, record))[:32]}")
    try:
        for field, check in _CHECKS[name]:
            value = record[field]
            if type(check) is not Int:
                record[field] = check(value)
            elif type(value) is not int or not check.low <= value <= check.high:
                check(value)
        message: Message = schema.kind(**record)
    except TransferError as error:
        raise MalformedMessage(f"a {name!r} message is not valid: {error}") from error
    if isinstance(message, Parts) and sum(part.num_frames for part in message.parts) != num_frames:
        raise MalformedMessage(f"parts speak of other than the {num_frames} frames that came")
    return message


def _checked_body(header: bytes | memoryview) -> tuple[str, bytes | memoryview]:
    """The kind of message, and its map: judged by version, size and checksum, nothing of it read but its first word."""
    size = len(header)
    if not PREFIX_BYTES + _NAME_AT < size <= MAX_HEADER_BYTES:
        raise MalformedMessage(f"a header of {size} bytes; {PREFIX_BYTES + _NAME_AT + 1} to {MAX_HEADER_BYTES} may be")
    if header[0] != WIRE_VERSION:
        raise MalformedMessage(f"wire version {header[0]}; this side speaks {WIRE_VERSION}: run equal versions")
    end = PREFIX_BYTES + _NAME_AT + 1 + (header[PREFIX_BYTES + _NAME_AT] & 0x1F)
    name = _STARTS.get(bytes(header[PREFIX_BYTES:end]))
    if name is None:
        raise MalformedMessage("a header is no map that begins with a known type and has that type's number of fields")
    if size > SCHEMAS[name].max_bytes:
        raise MalformedMessage(f"a {name!r} header of {size} bytes; {SCHEMAS[name].max_bytes} are allowed")
    body = header[PREFIX_BYTES:] if size <= COUNTED_FROM_BYTES else memoryview(header)[PREFIX_BYTES:]
    if zlib.crc32(body) != int.from_bytes(header[1:PREFIX_BYTES], "big"):
        raise MalformedMessage("a header does not match its checksum: it was damaged on its way")
    return name, body


def _unpack(body: bytes | memoryview) -> dict[str, Any]:
    """The map in `body`. ValueError for what is none, or would take much more memory than its bytes."""
    if _LONG_LIST.search(body):  # memory for a list is taken when it begins: no more of them than there are elements
        whole = msgpack.Unpacker(max_buffer_size=len(body))
        whole.feed(body)
        whole.skip()
    if len(body) <= COUNTED_FROM_BYTES:
        small: dict[str, Any] = msgpack.unpackb(body, raw=False, use_list=True, strict_map_key=True, max_ext_len=0)
        return small
    cost = _Cost(min(BASE_COST_BYTES + COST_PER_BYTE * len(body), MAX_COST_BYTES))
    large: dict[str, Any] = msgpack.unpackb(
        body,
        raw=False,
        use_list=True,
        strict_map_key=True,
        max_ext_len=0,
        max_array_len=MAX_LIST,
        max_map_len=MAX_LIST,
        list_hook=cost.of_list,
        object_hook=cost.of_map,
    )
    return large


class _Cost:
    """Counts, while a header is read, about how much memory its lists and maps take."""

    def __init__(self, budget_bytes: int) -> None:
        self._left = budget_bytes

    def of_list(self, value: list[Any]) -> list[Any]:
        self._take(64 + 56 * len(value))
        return value

    def of_map(self, value: dict[Any, Any]) -> dict[Any, Any]:
        self._take(160 + 60 * len(value) if value else 64)
        return value

    def _take(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise ValueError("its lists and maps would take too much memory")
