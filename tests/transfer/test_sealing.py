"""Sealing against independent paths: published vectors, HKDF written out with hmac, one-shot AESGCM, flipped bits."""

from __future__ import annotations

import copy
import hashlib
import hmac
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.errors import LocalProtocolError
from transfer.protocol.sealing import (
    MAX_SERIAL,
    SALT_BYTES,
    TAG_BYTES,
    BlockSealer,
    BlockUnsealer,
    SealBuffers,
    derive_key,
)
from transfer.protocol.ticket import Ticket


@dataclass(frozen=True, kw_only=True)
class Header:
    stream_id: str
    epoch: int = 1
    index: int = 3
    block_id: int = 17
    first_row: int = 384
    num_rows: int = 128
    serial: int = 5


TICKET = Ticket(stream_id="0123456789abcdef" * 2, epoch=1, owner="request 7", secret=bytes(range(16)))
SALT = bytes(range(100, 116))
HEADER = Header(stream_id=TICKET.stream_id)
PLAIN = [bytes(range(256)) * 8, b"\x01\x02\x03\x04" * 128]


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 with SHA-256, written out."""
    key = hmac.new(salt, secret, hashlib.sha256).digest()
    out, piece = b"", b""
    for number in range(1, -(-length // 32) + 1):
        piece = hmac.new(key, piece + info + bytes([number]), hashlib.sha256).digest()
        out += piece
    return out[:length]


def reference_key(ticket: Ticket, salt: bytes, purpose: str) -> bytes:
    info = b"tandem seal 1" + ticket.epoch.to_bytes(8, "big")
    for text in (purpose, ticket.stream_id, ticket.owner):
        info += len(text.encode()).to_bytes(4, "big") + text.encode()
    return hkdf(ticket.secret, salt, info, 32)


def reference_seal(block: Header, plain: list[bytes]) -> list[bytes]:
    aead = AESGCM(reference_key(TICKET, SALT, "blocks"))
    sealed = []
    for plane, frame in enumerate(plain):
        header = b"tandem block 1".ljust(16, b"\0") + block.stream_id.encode()
        for value in (block.epoch, block.index, block.block_id, block.first_row, block.num_rows, block.serial):
            header += value.to_bytes(8, "big")
        header += plane.to_bytes(4, "big") + len(plain).to_bytes(4, "big")
        sealed.append(aead.encrypt(plane.to_bytes(4, "big") + block.serial.to_bytes(8, "big"), frame, header))
    return sealed


def unsealed(block: Header, frames: list[bytes], sizes: list[int] | None = None) -> list[bytes] | None:
    """The plain frames; None when they are refused."""
    targets = [bytearray(size) for size in (map(len, PLAIN) if sizes is None else sizes)]
    is_right = BlockUnsealer(TICKET, SALT).unseal(block, frames, [memoryview(target) for target in targets])
    return [bytes(target) for target in targets] if is_right else None


def test_the_written_out_hkdf_gives_the_published_vector() -> None:
    okm = hkdf(b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)), 42)  # RFC 5869, test case 1
    assert okm.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"


GCM_VECTORS = [  # McGrew and Viega, AES-256 test cases 14 and 16: key, nonce, plain, associated, cipher, tag
    ("00" * 32, "00" * 12, "00" * 16, "", "cea7403d4d606b6e074ec5d3baf39d18", "d0d1c8a799996bf0265b98b5d48ab919"),
    (
        "feffe9928665731c6d6a8f9467308308" * 2,
        "cafebabefacedbaddecaf888",
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39",
        "feedfacedeadbeeffeedfacedeadbeefabaddad2",
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
        "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662",
        "76fc6ece0f4e1768cddf8853bb2d551b",
    ),
]


@pytest.mark.parametrize("vector", GCM_VECTORS)
def test_the_buffer_to_buffer_calls_give_the_published_vectors(vector: tuple[str, ...]) -> None:
    key, nonce, plain, associated, cipher, tag = map(bytes.fromhex, vector)
    sealed, opened = bytearray(len(plain) + TAG_BYTES), bytearray(len(plain))
    assert AESGCM(key).encrypt_into(nonce, plain, associated, sealed) == len(sealed)
    assert sealed == cipher + tag
    assert AESGCM(key).decrypt_into(nonce, bytes(sealed), associated, opened) == len(plain)
    assert opened == plain


def test_keys_are_hkdf_of_everything_that_names_the_attempt() -> None:
    assert derive_key(TICKET, SALT, "blocks") == reference_key(TICKET, SALT, "blocks")
    others = [
        derive_key(TICKET, SALT, "probes"),
        derive_key(TICKET, SALT[:-1] + b"\0", "blocks"),
        derive_key(replace(TICKET, epoch=2), SALT, "blocks"),
        derive_key(replace(TICKET, owner="request 8"), SALT, "blocks"),
        derive_key(replace(TICKET, stream_id="f" * 32), SALT, "blocks"),
        derive_key(replace(TICKET, secret=bytes(16)), SALT, "blocks"),
    ]
    assert len({derive_key(TICKET, SALT, "blocks"), *others}) == 7
    for length in (0, SALT_BYTES - 1, SALT_BYTES + 1):
        with pytest.raises(LocalProtocolError, match="salt"):
            derive_key(TICKET, bytes(length), "blocks")


def test_sealed_frames_are_those_of_the_one_shot_call_and_the_rows_stay() -> None:
    plain = [bytearray(frame) for frame in PLAIN]
    sealed = BlockSealer(TICKET, SALT).seal(HEADER, [memoryview(frame) for frame in plain])
    assert [bytes(frame) for frame in sealed] == reference_seal(HEADER, PLAIN)
    assert plain == PLAIN
    assert unsealed(HEADER, [bytes(frame) for frame in sealed]) == PLAIN


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    frames=st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=5),
    serials=st.lists(st.integers(0, MAX_SERIAL), min_size=1, max_size=5, unique=True).map(sorted),
)
def test_what_was_sealed_comes_back(frames: list[bytes], serials: list[int]) -> None:
    sealer = BlockSealer(TICKET, SALT)
    seen = set()
    for serial in serials:
        block = replace(HEADER, serial=serial)
        sealed = [bytes(frame) for frame in sealer.seal(block, frames)]
        assert sealed == reference_seal(block, frames)
        assert unsealed(block, sealed, list(map(len, frames))) == frames
        seen.add(tuple(sealed))
    assert len(seen) == len(serials)


SEALED = reference_seal(HEADER, PLAIN)
NUM_BITS = sum(map(len, SEALED)) * 8


@settings(max_examples=300, deadline=None, derandomize=True)
@given(bit=st.one_of(st.integers(0, NUM_BITS - 1), st.integers(NUM_BITS - TAG_BYTES * 8, NUM_BITS - 1)))
def test_any_flipped_bit_of_ciphertext_or_tag_is_refused(bit: int) -> None:
    joined = bytearray(b"".join(SEALED))
    joined[bit // 8] ^= 1 << bit % 8
    assert unsealed(HEADER, [bytes(joined[: len(SEALED[0])]), bytes(joined[len(SEALED[0]) :])]) is None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    field=st.sampled_from(["epoch", "index", "block_id", "first_row", "num_rows", "serial"]),
    bit=st.integers(0, 62),
)
def test_any_flipped_bit_of_the_header_is_refused(field: str, bit: int) -> None:
    block = replace(HEADER, **{field: getattr(HEADER, field) ^ 1 << bit})
    assert unsealed(block, SEALED) is None


@given(digit=st.integers(0, 31), other=st.sampled_from("0123456789abcdef"))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_block_of_another_stream_is_refused(digit: int, other: str) -> None:
    stream_id = HEADER.stream_id[:digit] + other + HEADER.stream_id[digit + 1 :]
    block = replace(HEADER, stream_id=stream_id)
    assert unsealed(block, SEALED) == (PLAIN if stream_id == HEADER.stream_id else None)


@pytest.mark.parametrize(
    "frames",
    [
        [SEALED[1], SEALED[0]],
        [SEALED[0]],
        [*SEALED, SEALED[0]],
        [SEALED[0][:-1], SEALED[1]],
        [SEALED[0] + b"\0", SEALED[1]],
        [SEALED[0], b""],
        [SEALED[0], SEALED[1][:TAG_BYTES]],
        [],
    ],
)
def test_frames_that_are_swapped_missing_or_of_another_size_are_refused(frames: list[bytes]) -> None:
    assert unsealed(HEADER, frames) is None


def test_planes_of_equal_size_cannot_be_swapped_or_dropped() -> None:
    plain = [b"a" * 64, b"b" * 64]
    sealed = reference_seal(HEADER, plain)
    assert unsealed(HEADER, sealed, [64, 64]) == plain
    for frames in (sealed[::-1], [sealed[0], sealed[0]]):
        assert unsealed(HEADER, frames, [64, 64]) is None
    assert unsealed(HEADER, sealed[:1], [64]) is None
    assert unsealed(HEADER, [], []) is None, "nothing proves nothing"


@pytest.mark.parametrize(
    ("ticket", "salt"),
    [
        (replace(TICKET, secret=bytes(16)), SALT),
        (replace(TICKET, epoch=2), SALT),
        (TICKET, SALT[::-1]),
    ],
)
def test_another_secret_epoch_or_salt_opens_nothing(ticket: Ticket, salt: bytes) -> None:
    targets = [memoryview(bytearray(len(frame))) for frame in PLAIN]
    assert not BlockUnsealer(ticket, salt).unseal(HEADER, SEALED, targets)


def test_no_serial_is_used_twice_with_one_key() -> None:
    sealer = BlockSealer(TICKET, SALT)
    sealer.seal(HEADER, PLAIN)
    for serial in (HEADER.serial, HEADER.serial - 1, 0):
        with pytest.raises(LocalProtocolError, match=f"serial {serial} was used; 6 is the next"):
            sealer.seal(replace(HEADER, serial=serial), PLAIN)
    sealer.seal(replace(HEADER, serial=6), PLAIN)


def test_a_serial_whose_sealing_failed_is_used_up_too() -> None:
    sealer = BlockSealer(TICKET, SALT)
    with pytest.raises(TypeError):
        sealer.seal(HEADER, [PLAIN[0], [1, 2, 3]])  # type: ignore[list-item]
    with pytest.raises(LocalProtocolError, match="was used"):
        sealer.seal(HEADER, PLAIN)


def test_a_key_ends_after_its_last_serial() -> None:
    sealer = BlockSealer(TICKET, SALT)
    sealer.seal(replace(HEADER, serial=MAX_SERIAL), PLAIN)
    with pytest.raises(LocalProtocolError, match="new stream"):
        sealer.seal(replace(HEADER, serial=MAX_SERIAL + 1), PLAIN)
    assert MAX_SERIAL + 1 == 2**32


def test_a_sealer_seals_its_own_stream_only_and_something() -> None:
    sealer = BlockSealer(TICKET, SALT)
    for block in (replace(HEADER, stream_id="f" * 32), replace(HEADER, epoch=2)):
        with pytest.raises(LocalProtocolError, match="this key is of"):
            sealer.seal(block, PLAIN)
    with pytest.raises(LocalProtocolError, match="without frames"):
        sealer.seal(HEADER, [])


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_keys_with_their_counter_cannot_be_duplicated(duplicate) -> None:  # type: ignore[no-untyped-def]
    for holder in (BlockSealer(TICKET, SALT), BlockUnsealer(TICKET, SALT)):
        with pytest.raises(TypeError, match="neither copied nor pickled"):
            duplicate(holder)
        assert TICKET.secret.hex() not in repr(holder)


def test_probes_are_tagged_with_a_key_of_their_own() -> None:
    sealer, unsealer = BlockSealer(TICKET, SALT), BlockUnsealer(TICKET, SALT)
    tag = sealer.probe_tag(9)
    fields = TICKET.stream_id.encode() + (1).to_bytes(8, "big") + (9).to_bytes(8, "big")
    assert tag == hmac.new(reference_key(TICKET, SALT, "probes"), fields, hashlib.sha256).digest()[:16]
    assert unsealer.knows_probe(9, tag)
    assert (
        not unsealer.knows_probe(8, tag) and not unsealer.knows_probe(9, tag[:-1]) and not unsealer.knows_probe(9, b"")
    )
    assert not BlockUnsealer(replace(TICKET, epoch=2), SALT).knows_probe(9, tag)


def test_buffers_return_when_their_last_view_is_gone_and_not_before() -> None:
    buffers = SealBuffers(max_bytes=1 << 16)
    first = buffers.take(5000)
    assert len(first) == 5000
    slice_of_first = first[10:20]
    second = buffers.take(5000)
    first[:] = b"1" * 5000
    second[:] = b"2" * 5000
    assert bytes(slice_of_first) == b"1" * 10 and buffers.num_bytes == 2 * 8192
    del first
    third = buffers.take(6000)
    third[:] = b"3" * 6000
    assert bytes(slice_of_first) == b"1" * 10, "a view of a part keeps the whole"
    assert buffers.num_bytes == 3 * 8192
    del slice_of_first
    again = buffers.take(8192)
    assert buffers.num_bytes == 3 * 8192 and bytes(again[:4]) == b"1111"
    assert bytes(third[:3]) == b"333" and bytes(second[:3]) == b"222"


def test_the_pool_of_buffers_is_bounded() -> None:
    buffers = SealBuffers(max_bytes=3 * 4096)
    held = [buffers.take(4096) for _ in range(10)]
    assert buffers.num_bytes == 3 * 4096
    for number, view in enumerate(held):
        view[:] = bytes([number]) * 4096
    assert [view[0] for view in held] == list(range(10))
    del held, view
    assert len(buffers.take(1)) == 1 and buffers.num_bytes == 3 * 4096


def test_sealing_is_loaded_only_when_it_is_used() -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None;"
        "from transfer.endpoints.endpoint import open_endpoint; from transfer.service.service import Service;"
        "from transfer.streams.stream_receiver import StreamReceiver;"
        "from transfer.streams.stream_sender import StreamSender;"
        "open_endpoint('inproc://x').close(); open_endpoint('tcp://127.0.0.1:0').close();"
        "assert 'transfer.protocol.sealing' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
