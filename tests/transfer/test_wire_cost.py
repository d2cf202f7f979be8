"""What a header costs before it is refused or taken: its size is judged by its kind, its lists and maps are counted.

Memory is counted with tracemalloc, whose peak holds whatever the decoder made, also what it gave up at once.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from contextlib import suppress

import msgpack
import pytest

from transfer.errors import MalformedMessage, MessageTooLarge
from transfer.protocol.messages import Call, Fail, Grant, Part, Parts
from transfer.protocol.wire import (
    COUNTED_FROM_BYTES,
    MAX_COST_BYTES,
    MAX_HEADER_BYTES,
    MAX_LIST,
    SCHEMAS,
    SMALL_HEADER_BYTES,
    decode_header,
    encode_header,
    frame_header,
)
from transfer.protocol.wire_fields import MAX_BLOCKS

MEGABYTE = 1 << 20
CALL_START = b"\x84\xa4type\xa4call\xa7call_id\x01\xa6method\xa1m\xa4body\x81\xa1x"


def assert_takes_less(action: Callable[[], object], limit: int, what: str = "") -> None:
    """Of memory, at most: in one of five tries, for other threads of the process allocate, too."""
    taken = limit
    for _ in range(5):
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        try:
            action()
            taken = tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()
        if taken < limit:
            return
    raise AssertionError(f"{taken} bytes, {limit} are allowed {what}")


def attempt(header: bytes) -> None:
    """Decode, whether or not it is refused."""
    with suppress(MalformedMessage):
        decode_header(header, 0)


def refuse(header: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode_header(header, 0)


def array(count: int) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big")


def lists_of(element: bytes, num_bytes: int) -> bytes:
    """A list of lists, as long as they may be, of nothing but `element`, in so many bytes."""
    per_list = 65536
    count = max(1, num_bytes // (per_list * len(element)))
    return array(count) + (array(per_list) + element * per_list) * count


BOMBS = {
    "empty maps": b"\x80",
    "empty lists": b"\x90",
    "maps of nothing": b"\x81\xa0\xc0",
    "lists of one": b"\x91\x00",
    "small maps": b"\x81\xa1x\xcd\x01\x2c",
    "negative ints": b"\xe0",
    "ints": b"\xcd\x03\xe8",
    "words": b"\xa2xy",
}


@pytest.mark.parametrize("num_bytes", [COUNTED_FROM_BYTES // 2, 400_000, MAX_HEADER_BYTES - 4096])
@pytest.mark.parametrize("element", BOMBS)
def test_a_header_costs_a_small_multiple_of_its_size(element: str, num_bytes: int) -> None:
    small = array(num_bytes // len(BOMBS[element])) + BOMBS[element] * (num_bytes // len(BOMBS[element]))
    header = frame_header(CALL_START + (small if num_bytes <= 65536 else lists_of(BOMBS[element], num_bytes)))
    limit = min(100 * len(header), 20 * MEGABYTE + 20 * len(header), MAX_COST_BYTES + 32 * MEGABYTE)
    assert_takes_less(lambda: attempt(header), limit, f"for {len(header)}")


@pytest.mark.parametrize("element", ["empty maps", "empty lists", "small maps", "maps of nothing"])
def test_what_would_cost_too_much_is_refused_and_not_only_slow(element: str) -> None:
    header = frame_header(CALL_START + lists_of(BOMBS[element], 4 * MEGABYTE))
    with pytest.raises(MalformedMessage):
        decode_header(header, 0)


@pytest.mark.parametrize("claimed", [4000, 65535, MAX_LIST, 1 << 24, (1 << 32) - 1])
@pytest.mark.parametrize("num_bytes", [4000, 300_000])
def test_lists_that_only_claim_to_be_long_take_no_memory(claimed: int, num_bytes: int) -> None:
    header = frame_header(CALL_START + array(claimed) * 500 + b"\0" * (num_bytes - 2500))
    assert_takes_less(lambda: refuse(header), 2 * len(header) + MEGABYTE)


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_every_kind_has_a_size_beyond_which_nothing_is_read(name: str) -> None:
    schema = SCHEMAS[name]
    assert SMALL_HEADER_BYTES <= schema.max_bytes <= MAX_HEADER_BYTES
    start = bytes([0x81 + len(schema.fields)]) + msgpack.packb("type") + msgpack.packb(name)
    header = frame_header(start + b"\x80" * schema.max_bytes)
    assert_takes_less(lambda: refuse(header), 2 * schema.max_bytes + MEGABYTE)


@pytest.mark.parametrize(
    "start",
    [
        b"\x82\xa7call_id\x01\xa4type\xa6cancel",  # the type is not the first
        b"\xde\x00\x02\xa4type\xa6cancel\xa7call_id\x01",  # a long form of a short map
        b"\x83\xa4type\xa6cancel\xa7call_id\x01\xa1x\x01",  # a field too many
        b"\x82\xa4type\xd9\x06cancel\xa7call_id\x01",  # a long form of a short word
    ],
)
def test_a_header_begins_with_its_type(start: bytes) -> None:
    with pytest.raises(MalformedMessage, match="begins with a known type"):
        decode_header(frame_header(start), 0)


def test_what_the_reader_would_refuse_is_refused_at_the_sender() -> None:
    for body in ({"x": [{}] * MAX_LIST}, {"x": [[{}] * 1000] * 1000}, {"x": list(range(MAX_LIST + 1))}):
        with pytest.raises(MessageTooLarge):
            encode_header(Call(call_id=1, method="m", body=body))


def test_what_is_large_for_a_reason_passes() -> None:
    alternatives = [[token, -0.5] for token in range(20)]
    stream = {"stream_id": "0" * 32, "epoch": 1}
    size = {"allocated_tokens": MAX_BLOCKS, "block_size": 1, "credit": 1}
    messages = [
        Call(call_id=1, method="generate", body={"prompt_token_ids": list(range(MAX_LIST))}),
        Call(call_id=1, method="generate", body={"text": "x" * (MAX_HEADER_BYTES - 1000)}),
        Parts(parts=(Part(call_id=1, body={"prompt_logprobs": [[7, -1.5, 3, alternatives]] * 2048}),)),
        Parts(parts=tuple(Part(call_id=n, body={"token_ids": [n], "text": "word"}) for n in range(16384))),
        Grant(**stream, round=0, first_index=0, block_ids=tuple(range(2**31, 2**31 + MAX_BLOCKS)), **size),  # type: ignore[arg-type]
        Fail(call_id=1, code="c" * 128, message="\U0001f600" * 16384),
    ]
    for message in messages:
        assert decode_header(encode_header(message), 0) == message
