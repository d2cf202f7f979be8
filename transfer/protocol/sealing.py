"""Sealed payloads: AES-256-GCM over the blocks of one stream, under keys that only the two ends of the stream have.

Keys come from the ticket's secret by HKDF-SHA256, one per purpose, bound to stream, epoch, owner and a salt that the
sender draws anew whenever it opens the stream; so a second sender, or a second try, never has the key of the first.
A nonce is the plane's number and the block's serial; the object that holds the key also sees to it that no serial is
used twice. Ciphertext goes into buffers that are used again, plaintext straight into the granted block. This is the
only file that knows the cryptography package; it is loaded when a stream is sealed, and not before.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from typing import NoReturn, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from transfer.connection import Frame
from transfer.errors import LocalProtocolError
from transfer.protocol.ticket import Ticket
from transfer.tensors import SEAL_BYTES

KEY_BYTES = 32
TAG_BYTES = SEAL_BYTES
SALT_BYTES = 16
MAX_SERIAL = (1 << 32) - 1  # keeps what one key has encrypted far below the bounds of GCM
POOL_BYTES = 64 * 1024 * 1024
_MIN_BUFFER_BYTES = 4096
_NONCE = struct.Struct(">IQ")  # plane, serial
_HEADER = struct.Struct(">16s32sQQQQQQII")  # domain, then every field of the block, then plane and number of planes
_PROBE = struct.Struct(">32sQQ")
_DOMAIN = b"tandem block 1"


class BlockFields(Protocol):
    """The header of a block: all of it is authenticated."""

    @property
    def stream_id(self) -> str: ...
    @property
    def epoch(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def block_id(self) -> int: ...
    @property
    def first_row(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def serial(self) -> int: ...


def derive_key(ticket: Ticket, salt: bytes, purpose: str) -> bytes:
    """The key of one purpose for one attempt of one sender. LocalProtocolError for a salt of another length."""
    if len(salt) != SALT_BYTES:  # fixed: HMAC takes a key and the same key with zero bytes behind it for one
        raise LocalProtocolError(f"a salt of {len(salt)} bytes; draw {SALT_BYTES} from the system's random source")
    parts = (purpose.encode(), ticket.stream_id.encode("ascii"), ticket.owner.encode("utf-8", "surrogatepass"))
    info = b"tandem seal 1" + struct.pack(">Q", ticket.epoch) + b"".join(struct.pack(">I", len(p)) + p for p in parts)
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(ticket.secret)


def _associated(block: BlockFields, plane: int, num_planes: int) -> bytes:
    return _HEADER.pack(
        _DOMAIN, block.stream_id.encode("ascii"), block.epoch, block.index, block.block_id, block.first_row,
        block.num_rows, block.serial, plane, num_planes,
    )  # fmt: skip


class SealBuffers:
    """Memory for ciphertext on its way out, used again as soon as nobody views it. For one thread."""

    def __init__(self, max_bytes: int = POOL_BYTES) -> None:
        self._max_bytes = max_bytes
        self._buffers: dict[int, list[bytearray]] = {}
        self.num_bytes = 0

    def take(self, num_bytes: int) -> memoryview:
        """Writable memory of exactly `num_bytes`; it returns to the pool when the last view of it is gone."""
        size = max(_MIN_BUFFER_BYTES, 1 << (num_bytes - 1).bit_length())
        buffers = self._buffers.setdefault(size, [])
        buffer = next((buffer for buffer in buffers if _is_unused(buffer)), None)  # the first: the warmest
        if buffer is None:
            buffer = bytearray(size)
            if self.num_bytes + size <= self._max_bytes:
                buffers.append(buffer)
                self.num_bytes += size
        return memoryview(buffer)[:num_bytes]


def _is_unused(buffer: bytearray) -> bool:
    """Whether no memoryview of it lives, here or in a socket's queue: only then can its length change."""
    try:
        last = buffer.pop()
    except BufferError:
        return False
    buffer.append(last)
    return True


class _Keys:
    """What both ends hold. Never copied or pickled: a second holder would use the same serials again."""

    def __init__(self, ticket: Ticket, salt: bytes) -> None:
        self._aead = AESGCM(derive_key(ticket, salt, "blocks"))
        self._probe_key = derive_key(ticket, salt, "probes")
        self._stream = ticket.stream_id, ticket.epoch

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds keys and a counter: it is neither copied nor pickled")

    def probe_tag(self, nonce: int) -> bytes:
        """The tag that a probe of this stream carries."""
        stream_id, epoch = self._stream
        fields = _PROBE.pack(stream_id.encode("ascii"), epoch, nonce)
        return hmac.new(self._probe_key, fields, hashlib.sha256).digest()[:TAG_BYTES]


class BlockSealer(_Keys):
    """The sender's end. For one thread."""

    def __init__(self, ticket: Ticket, salt: bytes, buffers: SealBuffers | None = None) -> None:
        super().__init__(ticket, salt)
        self._buffers = buffers or SealBuffers()
        self._next_serial = 0

    def seal(self, block: BlockFields, frames: Sequence[Frame]) -> list[memoryview]:
        """The frames to send, each TAG_BYTES longer than the plain one, which stays as it is.

        Raises LocalProtocolError when the serial is not above all before it, or the key is used up.
        """
        serial, name = block.serial, f"stream {block.stream_id}"
        if (block.stream_id, block.epoch) != self._stream:
            raise LocalProtocolError(f"{name}, epoch {block.epoch}: this key is of stream {self._stream}")
        if serial < self._next_serial:
            raise LocalProtocolError(f"{name}: serial {serial} was used; {self._next_serial} is the next of this key")
        if serial > MAX_SERIAL:
            raise LocalProtocolError(f"{name}: {serial} blocks were sealed with one key: send the rest as a new stream")
        if not frames:
            raise LocalProtocolError(f"{name}: a block without frames has nothing to seal")
        self._next_serial = serial + 1  # before anything can fail: what was tried once is not tried again
        sealed = [self._buffers.take(len(frame) + TAG_BYTES) for frame in frames]
        for plane, (frame, target) in enumerate(zip(frames, sealed, strict=True)):
            self._aead.encrypt_into(_NONCE.pack(plane, serial), frame, _associated(block, plane, len(frames)), target)
        return sealed


class BlockUnsealer(_Keys):
    """The receiver's end."""

    def unseal(self, block: BlockFields, frames: Sequence[Frame], targets: Sequence[memoryview]) -> bool:
        """Decrypt frame by frame straight into the targets, which are as long as the plain frames.

        False when anything is not as it was sealed. The targets then hold what they may: count the block as not stored,
        and never give targets that hold rows.
        """
        if not frames or [len(frame) - TAG_BYTES for frame in frames] != [len(target) for target in targets]:
            return False
        try:
            for plane, (frame, target) in enumerate(zip(frames, targets, strict=True)):
                nonce = _NONCE.pack(plane, block.serial)
                self._aead.decrypt_into(nonce, frame, _associated(block, plane, len(frames)), target)
        except InvalidTag:
            return False
        return True

    def knows_probe(self, nonce: int, tag: bytes) -> bool:
        """Whether a probe is this stream's sender's, compared in constant time."""
        return hmac.compare_digest(self.probe_tag(nonce), tag)
