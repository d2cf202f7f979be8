"""The wire: round trips of random messages, and every kind of wrong bytes refused with one typed error."""

from __future__ import annotations

import contextlib
import pickle
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.errors import LocalProtocolError, MalformedMessage, MessageTooLarge
from transfer.protocol.messages import (
    Abort,
    Accept,
    Ack,
    Announce,
    Awaiting,
    Block,
    Call,
    Cancel,
    Close,
    End,
    Fail,
    Grant,
    Message,
    Open,
    Part,
    Parts,
    Probe,
    Resume,
    Revoke,
    Revoked,
    Serving,
    Unknown,
)
from transfer.protocol.negotiate import Offer
from transfer.protocol.wire import (
    MAX_HEADER_BYTES,
    PREFIX_BYTES,
    WIRE_VERSION,
    decode_header,
    encode_header,
    frame_header,
)
from transfer.tensors import DTYPE_BYTES, PlaneSpec

hex_ids = st.text("0123456789abcdef", min_size=32, max_size=32)
u32 = st.integers(0, 2**32 - 1)
rows = st.integers(0, 2**40)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
leaves = scalars | st.text(max_size=20) | st.binary(max_size=20)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
bodies = st.dictionaries(st.text(max_size=8), values, max_size=4)
planes = st.builds(
    PlaneSpec,
    name=st.text(min_size=1, max_size=20),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    row_shape=st.lists(st.integers(1, 64), max_size=4).map(tuple),
)
stream = {"stream_id": hex_ids, "epoch": st.integers(1, 2**32 - 1)}
call_ids = st.integers(0, 2**63 - 1)
size = st.integers(1, 2**24)
proofs = st.binary(min_size=32, max_size=32)
names = st.lists(st.text(max_size=32), max_size=4).map(tuple)
offers = st.builds(
    Offer,
    versions=st.tuples(st.integers(0, 255), st.integers(0, 255)).map(sorted).map(tuple),
    block_size=size,
    planes=st.lists(planes, max_size=4).map(tuple),
    integrity=names,
    payload=names,
    max_frame_bytes=call_ids,
    credit=st.integers(1, 2**32 - 1),
)
messages = st.one_of(
    st.builds(Open, **stream, proof=proofs, nonce=st.binary(min_size=16, max_size=16), offer=offers,
              content_key=st.text(max_size=64), deadline_ms=st.none() | call_ids),
    st.builds(Accept, **stream, proof=proofs, offer=offers, first_index=u32, segment=st.none() | bodies,
              data_address=st.none() | st.text(max_size=64)),
    st.builds(Revoke, **stream, serial=u32, round=u32, first_index=u32),
    st.builds(Revoked, **stream, serial=u32, first_index=u32),
    st.builds(Probe, **stream, nonce=call_ids),
    st.builds(Resume, **stream, nonce=call_ids, serial=u32, next_index=u32, kept_index=u32),
    st.builds(Grant, **stream, round=u32, first_index=u32, block_ids=st.lists(u32, max_size=9).map(tuple),
              allocated_tokens=rows,
              block_size=size, credit=u32),
    st.builds(Announce, **stream, total_rows=rows, allocated_tokens=rows, block_size=size,
              items=st.lists(bodies, max_size=3).map(tuple)),
    st.builds(Block, **stream, index=u32, block_id=u32, first_row=rows, num_rows=rows,
              serial=call_ids, tag=st.binary(max_size=8)),
    st.builds(Ack, **stream, serial=u32, next_index=u32, kept_index=u32),
    st.builds(Close, **stream, total_rows=rows),
    st.builds(Abort, **stream, code=st.text(max_size=128), message=st.text(max_size=200)),
    st.builds(Call, call_id=call_ids, method=st.text(max_size=128), body=bodies),
    st.builds(Parts, parts=st.lists(
        st.builds(Part, call_id=call_ids, serial=call_ids, body=bodies, num_frames=st.integers(0, 3)),
        max_size=4).map(tuple)),
    st.builds(End, call_id=call_ids, num_parts=call_ids, body=bodies),
    st.builds(Fail, call_id=call_ids, code=st.text(max_size=128), message=st.text(max_size=200)),
    st.builds(Cancel, call_id=call_ids),
    *(st.builds(kind, call_ids=st.lists(call_ids, max_size=20).map(tuple)) for kind in (Awaiting, Unknown)),
    st.builds(Serving, calls=st.lists(st.tuples(call_ids, call_ids), max_size=20).map(tuple)),
)  # fmt: skip


def frames_of(message: Message) -> int:
    if isinstance(message, Parts):
        return sum(part.num_frames for part in message.parts)
    return int(isinstance(message, Block))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(messages)
def test_round_trip(message: Message) -> None:
    header = encode_header(message)
    assert header[0] == WIRE_VERSION
    assert decode_header(header, frames_of(message)) == message
    assert decode_header(memoryview(header), frames_of(message)) == message


@settings(max_examples=300, deadline=None, derandomize=True)
@given(messages, st.data())
def test_damaged_headers_raise_one_error_or_decode(message: Message, data: st.DataObject) -> None:
    header = bytearray(encode_header(message))
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(header)))
    for candidate in (bytes(header), bytes(header[:cut]), bytes(header) + b"\0"):
        with contextlib.suppress(MalformedMessage):
            decode_header(candidate, data.draw(st.integers(0, 3)))
        with contextlib.suppress(MalformedMessage):
            decode_header(frame_header(candidate[PREFIX_BYTES:]), data.draw(st.integers(0, 3)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(messages, st.data())
def test_no_turned_bit_and_no_missing_byte_goes_unseen(message: Message, data: st.DataObject) -> None:
    header = bytearray(encode_header(message))
    header[data.draw(st.integers(0, len(header) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    cut = encode_header(message)[: data.draw(st.integers(0, len(header) - 1))]
    for damaged in (bytes(header), cut):
        with pytest.raises(MalformedMessage):
            decode_header(damaged, frames_of(message))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_random_bytes_raise_one_error(junk: bytes) -> None:
    for header in (junk, bytes([WIRE_VERSION]) + junk, frame_header(junk)):
        with pytest.raises(MalformedMessage):
            decode_header(header, 0)


def packed(record: object) -> bytes:
    return frame_header(bytes(msgpack.packb(record)))


ACK = {"type": "ack", "stream_id": "0" * 32, "epoch": 1, "serial": 0, "next_index": 0, "kept_index": 0}
FILLED = {"type": "filled", "stream_id": "0" * 32, "epoch": 1, "first_index": 0, "block_ids": [1, 2], "serial": 1}
CALL = {"type": "call", "call_id": 1, "method": "m", "body": {}}


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\x01",
        bytes([WIRE_VERSION + 1]) + packed(ACK)[1:],
        frame_header(packed(ACK)[PREFIX_BYTES:] * 2),
        packed(ACK)[:PREFIX_BYTES],
        packed(ACK)[:1] + bytes(4) + packed(ACK)[PREFIX_BYTES:],
        packed([ACK]),
        packed({**ACK, "type": "nonsense"}),
        packed({**ACK, "type": ["ack"]}),
        packed({k: v for k, v in ACK.items() if k != "epoch"}),
        packed({**ACK, "extra": 1}),
        packed({**ACK, "epoch": 0}),
        packed({**ACK, "epoch": True}),
        packed({**ACK, "next_index": -1}),
        packed({**ACK, "next_index": 1.0}),
        packed({**ACK, "next_index": 2**32}),
        *(packed({**FILLED, "block_ids": [1, wrong, 2]}) for wrong in (-1, 2**32, True, 1.0, "1", None, [1])),
        packed({**ACK, "stream_id": "0" * 31}),
        packed({**ACK, "stream_id": "G" * 32}),
        packed({**ACK, "stream_id": b"0" * 32}),
        packed({**CALL, "body": []}),
        packed({**CALL, "body": {"x": nested(20)}}),
        packed({**CALL, "body": {"x": msgpack.ExtType(1, b"x")}}),
        packed({**CALL, "body": {"x": msgpack.Timestamp(1, 2)}}),
        packed({**CALL, "body": {1: 2}}),
        packed({**CALL, "body": {"x": {1: 2}}}),
        packed({**CALL, "method": "m" * 200}),
        packed({"type": "parts", "parts": [[1, 0, {}, 1]]}),
        packed({"type": "parts", "parts": [[1, {}, 0]]}),
        packed({"type": "parts", "parts": [[1, -1, {}, 0]]}),
        packed({"type": "serving", "calls": [[1]]}),
        packed({"type": "serving", "calls": [1]}),
        frame_header(b"\x91" * 100_000),
        frame_header(b"\xdf\xff\xff\xff\xff"),
        frame_header(b"\xdd\xff\xff\xff\xff"),
        pickle.dumps({"type": "ack"}),
        frame_header(pickle.dumps({"type": "ack"})),
    ],
)
def test_wrong_headers_are_malformed(header: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode_header(header, 0)


def test_frames_where_none_belong_are_malformed() -> None:
    for record, num_frames in ((ACK, 1), (CALL, 5000)):
        with pytest.raises(MalformedMessage, match="frames"):
            decode_header(packed(record), num_frames)
    block = {"type": "block", "stream_id": "0" * 32, "epoch": 1, "index": 0, "block_id": 0, "first_row": 0,
             "num_rows": 1, "serial": 1, "tag": b""}  # fmt: skip
    for num_frames in (0, 1, 1024):  # none: the payload is in shared memory
        decode_header(packed(block), num_frames)
    with pytest.raises(MalformedMessage, match="frames"):
        decode_header(packed(block), 1025)


def test_what_cannot_travel_is_refused_at_the_sender() -> None:
    call = Call(call_id=1, method="m", body={})
    for value in (object(), {1, 2}, 2**70):
        with pytest.raises(LocalProtocolError):
            encode_header(replace(call, body={"x": value}))
    with pytest.raises(MessageTooLarge):
        encode_header(replace(call, body={"x": b"0" * (MAX_HEADER_BYTES + 1)}))
    long = Fail(call_id=1, code="c" * 500, message="m" * 50_000)
    decoded = decode_header(encode_header(long), 0)
    assert isinstance(decoded, Fail) and (len(decoded.code), len(decoded.message)) == (128, 16384)
