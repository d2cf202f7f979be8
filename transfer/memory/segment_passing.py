"""How a sender on this host gets a segment: over the receiver's Unix socket, with the descriptor attached.

That it works at all is the proof that both ends share a host. Who connects must run as the same user (asked of the
kernel) and prove its ticket over a fresh challenge; the answer proves the ticket too, so that a sender does not write
its rows into a stranger's memory. The connection then stays open as a lifeline: its end tells either side that the
other is gone. Holds the fixed formats, which `segment_server` shares, and the sender's end; knows no streams.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import hmac
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from transfer.errors import PeerLost, RemoteProtocolError, TicketRejected
from transfer.memory.segments import Segment, SegmentLayout, attach
from transfer.protocol.ticket import Ticket

HANDSHAKE_S = 2.0
NONCE_BYTES = 32
MAGIC = b"TSG1"
CHALLENGE = struct.Struct(f"<4s{NONCE_BYTES}s")
REQUEST = struct.Struct(f"<4s16sIQ{NONCE_BYTES}s32s")  # magic, stream id, epoch, generation, nonce, proof
ANSWER = struct.Struct("<4s?Q32s")  # magic, granted, number of bytes, proof
CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred


class Lifeline(Protocol):
    """What a connected socket is here: nothing is ever sent over it, and its end is the news."""

    def recv(self, num_bytes: int, /) -> bytes: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class FetchedSegment:
    """A descriptor to map and close, and the lifeline to keep while the segment is used."""

    fd: int
    num_bytes: int
    lifeline: socket.socket

    def attach(self, layout: SegmentLayout, generation: int) -> Segment:
        """Map it and close the descriptor; the lifeline, too, where it cannot be mapped. Raises as `attach` does."""
        try:
            return attach(self.fd, layout, generation)
        except BaseException:
            self.lifeline.close()
            raise
        finally:
            os.close(self.fd)

    def close(self) -> None:
        """Close both; for who does not want it after all."""
        os.close(self.fd)
        self.lifeline.close()


def fetch(path: str, ticket: Ticket, generation: int, timeout_s: float = HANDSHAKE_S) -> FetchedSegment:
    """Get segment `generation`, which the receiver of `ticket` offers at the socket `path`.

    Blocks up to `timeout_s` in all. Raises PeerLost when nobody of this host answers there, TicketRejected when the
    other end refuses or proves nothing, RemoteProtocolError for an answer that makes no sense.
    """
    deadline = time.monotonic() + timeout_s
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        try:
            _set_limit(sock, deadline)
            sock.connect(path)
            if not is_same_user(sock):
                raise TicketRejected(f"{path} is served by another user: its segment is not used")
            nonce = secrets.token_bytes(NONCE_BYTES)
            challenge = _receive_challenge(sock, path, deadline)
            proof = request_proof(ticket, challenge, generation, nonce)
            raw_id = bytes.fromhex(ticket.stream_id)
            sock.send(REQUEST.pack(MAGIC, raw_id, ticket.epoch, generation, nonce, proof))
            fd, num_bytes = _receive_answer(sock, path, ticket, nonce, generation, deadline)
        except OSError as error:
            raise PeerLost(f"no segment from {path}: {error or type(error).__name__}") from error
        sock.setblocking(False)
        return FetchedSegment(fd, num_bytes, sock)
    except BaseException:
        sock.close()
        raise


def is_lifeline_over(lifeline: Lifeline) -> bool:
    """Whether the other end hung up, asked of a lifeline from `fetch`; does not block."""
    try:
        lifeline.recv(1)  # nothing is ever sent: whatever comes is the end
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


def _receive_challenge(sock: socket.socket, path: str, deadline: float) -> bytes:
    _set_limit(sock, deadline)
    data = sock.recv(max(CHALLENGE.size, ANSWER.size) + 1)
    if not data:
        raise PeerLost(f"{path} hung up")
    if len(data) == ANSWER.size:
        raise TicketRejected(f"{path} refuses this process")
    if len(data) != CHALLENGE.size or data[:4] != MAGIC:
        raise RemoteProtocolError(f"{path} does not speak the segment protocol")
    challenge: bytes = CHALLENGE.unpack(data)[1]
    return challenge


def _receive_answer(
    sock: socket.socket, path: str, ticket: Ticket, nonce: bytes, generation: int, deadline: float
) -> tuple[int, int]:
    _set_limit(sock, deadline)
    fds = array.array("i")
    data, ancillary, flags, _ = sock.recvmsg(
        ANSWER.size + 1, socket.CMSG_SPACE(4 * fds.itemsize), socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, payload in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    with _closing_unless_done(fds) as keep:
        if not data:
            raise PeerLost(f"{path} hung up")
        if len(data) != ANSWER.size or data[:4] != MAGIC or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise RemoteProtocolError(f"{path} gave an answer of {len(data)} bytes that makes no sense")
        _, granted, num_bytes, proof = ANSWER.unpack(data)
        if not granted:
            raise TicketRejected(f"{path} refuses the segment {generation:016x} for stream {ticket.stream_id}")
        if not hmac.compare_digest(proof, answer_proof(ticket, nonce, generation, num_bytes)):
            raise TicketRejected(f"{path} does not hold the ticket of stream {ticket.stream_id}: not its receiver")
        if len(fds) != 1:
            raise RemoteProtocolError(f"{path} gave {len(fds)} descriptors for one segment")
        return keep(), num_bytes


@contextlib.contextmanager
def _closing_unless_done(fds: array.array[int]) -> Iterator[Callable[[], int]]:
    def keep() -> int:
        return fds.pop()

    try:
        yield keep
    finally:
        for fd in fds:
            os.close(fd)


def _set_limit(sock: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    sock.settimeout(left)


def is_same_user(sock: socket.socket) -> bool:
    """Whether the process at the other end runs as this one's user; asked of the kernel."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    uid: int = CREDENTIALS.unpack(credentials)[1]
    return uid == os.geteuid()


def request_proof(ticket: Ticket, challenge: bytes, generation: int, nonce: bytes) -> bytes:
    """What a sender proves: that it holds the ticket, now, and wants this segment."""
    return _mac(ticket, b"request", challenge, generation.to_bytes(8, "little"), nonce)


def answer_proof(ticket: Ticket, nonce: bytes, generation: int, num_bytes: int) -> bytes:
    """What the server proves: that it holds the ticket, and how large the segment is."""
    return _mac(ticket, b"answer", nonce, generation.to_bytes(8, "little"), num_bytes.to_bytes(8, "little"))


def _mac(ticket: Ticket, role: bytes, *parts: bytes) -> bytes:
    head = f"tandem segment 1|{ticket.stream_id}|{ticket.epoch}|".encode()
    return hmac.new(ticket.secret, b"".join((head, role, b"|", *parts)), hashlib.sha256).digest()
