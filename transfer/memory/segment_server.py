"""SegmentServer: hands segments to peers of this host, over a Unix socket in the runtime folder.

Its own thread runs the receiving worker's end of what `segment_passing` describes. Bounded throughout: messages by
fixed structs, handshakes by a deadline, connections by number. A peer's lifeline that ends is reported to whoever
offered the segment. The socket file is removed at close; files of processes that were killed, at the next start.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from transfer.endpoints.addresses import prepare_ipc
from transfer.errors import ConfigError
from transfer.memory.segment_passing import (
    ANSWER,
    CHALLENGE,
    HANDSHAKE_S,
    MAGIC,
    NONCE_BYTES,
    REQUEST,
    answer_proof,
    is_same_user,
    request_proof,
)
from transfer.protocol.ticket import Ticket

PAUSE_S = 0.1  # without a descriptor for a visitor
SOCKET_PREFIX = "segments-"
MAX_HANDSHAKES = 64
MAX_LIFELINES = 4096
STALE_S = 60.0  # age from which a half-made socket file is left over

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentOffer:
    """A segment that the holder of `ticket` may have: its descriptor (ours, not closed here), and who wants to know."""

    ticket: Ticket
    generation: int
    fd: int
    num_bytes: int
    on_lost: Callable[[], None] = field(compare=False)  # on the server's thread, once: the peer's lifeline ended


@dataclass(slots=True)
class _Visitor:
    sock: socket.socket
    challenge: bytes
    expires_s: float
    offer: SegmentOffer | None = None  # set once it has the segment


class SegmentServer:
    """Hands segments to peers of this host that hold the ticket they are offered for."""

    def __init__(self, folder: str | Path) -> None:
        """Listen in `folder`, made with rights 0700 if missing; socket files of dead processes there are removed.

        ConfigError when the folder is open to others or cannot be used.
        """
        self._offers: dict[str, SegmentOffer] = {}  # by stream
        self._lock = threading.Lock()
        self._counts = {"segments_passed": 0, "segments_refused": 0}
        self._visitors: dict[int, _Visitor] = {}
        self._hang_ups: list[int] = []  # generations whose lifelines are to end; guarded by the lock
        self._closing = False
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        try:
            self._listener, self.path = _listen(Path(folder))
        except BaseException:
            self._wake_read.close()
            self._wake_write.close()
            raise
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name=f"segments {self.path}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._dispose()
            raise ConfigError(f"no thread is left to pass segments at {self.path}: {error}") from error

    # -- any thread -----------------------------------------------------------------------------------------------

    def offer(self, offer: SegmentOffer) -> None:
        """Give the segment to whoever proves the ticket, as often as it asks, until withdrawn."""
        with self._lock:
            self._offers[offer.ticket.stream_id] = offer

    def withdraw(self, stream_id: str) -> None:
        """The stream no longer offers a segment."""
        with self._lock:
            self._offers.pop(stream_id, None)

    def hang_up(self, generation: int) -> None:
        """The segment is to be closed: withdraw it, and end its lifelines so that its peer lets go of it.

        `on_lost` is not called for them. Afterwards its descriptor may be closed.
        """
        with self._lock:
            self._offers = {key: offer for key, offer in self._offers.items() if offer.generation != generation}
            self._hang_ups.append(generation)
        self._wake()

    def stats(self) -> dict[str, int]:
        """Segments passed and refused, open lifelines, open handshakes."""
        visitors = tuple(self._visitors.values())
        num_lifelines = sum(visitor.offer is not None for visitor in visitors)
        return {**self._counts, "lifelines": num_lifelines, "handshakes": len(visitors) - num_lifelines}

    def close(self) -> None:
        """Stop listening, end every lifeline, remove the socket file. Safe to repeat."""
        self._closing = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes anyway; closed: nobody to wake
            self._wake_write.send(b"\0")

    # -- the server's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                for key, _ in self._selector.select(self._seconds_to_expiry()):
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj is self._wake_read:
                        with contextlib.suppress(BlockingIOError):
                            self._wake_read.recv(4096)
                    elif (visitor := self._visitors.get(key.fd)) is not None:
                        self._read(visitor)
                self._hang_up_all()
                self._expire()
        finally:
            self._dispose()

    def _seconds_to_expiry(self) -> float | None:
        pending = [v.expires_s for v in self._visitors.values() if v.offer is None]
        return max(0.0, min(pending) - time.monotonic()) if pending else None

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:  # it went away meanwhile, or no descriptor is left for it
            logger.debug("a visitor of %s was not taken: %s", self.path, error)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(PAUSE_S)  # the visitor still stands at the door, and would be announced at once again
            return
        sock.setblocking(False)
        visitor = _Visitor(sock, secrets.token_bytes(NONCE_BYTES), time.monotonic() + HANDSHAKE_S)
        num_waiting = sum(v.offer is None for v in self._visitors.values())
        self._visitors[sock.fileno()] = visitor
        self._selector.register(sock, selectors.EVENT_READ)
        full = num_waiting >= MAX_HANDSHAKES or len(self._visitors) > MAX_LIFELINES
        if full or not is_same_user(sock):
            self._refuse(visitor, "too many connections" if full else "another user's process")
            return
        try:
            sock.send(CHALLENGE.pack(MAGIC, visitor.challenge))
        except OSError:
            self._drop(visitor)

    def _read(self, visitor: _Visitor) -> None:
        try:
            data = visitor.sock.recv(REQUEST.size + 1)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if visitor.offer is not None:  # a lifeline: only its end means something, and anything else ends it
            self._drop(visitor)
            visitor.offer.on_lost()
        elif not data:
            self._drop(visitor)
        else:
            self._answer(visitor, data)

    def _answer(self, visitor: _Visitor, data: bytes) -> None:
        if len(data) != REQUEST.size:
            self._refuse(visitor, f"a request of {len(data)} bytes")
            return
        magic, raw_id, epoch, generation, nonce, proof = REQUEST.unpack(data)
        with self._lock:  # while the answer leaves: `withdraw` so keeps the descriptor from being closed under it
            offer = self._offers.get(raw_id.hex())
            if magic != MAGIC or offer is None or (offer.ticket.epoch, offer.generation) != (epoch, generation):
                self._refuse(visitor, "no such segment")
                return
            if not hmac.compare_digest(proof, request_proof(offer.ticket, visitor.challenge, generation, nonce)):
                self._refuse(visitor, "a wrong proof")
                return
            proof = answer_proof(offer.ticket, nonce, generation, offer.num_bytes)
            try:
                answer = ANSWER.pack(MAGIC, True, offer.num_bytes, proof)
                socket.send_fds(visitor.sock, [answer], [offer.fd])
            except OSError as error:
                logger.debug("a segment did not leave through %s: %s", self.path, error)
                self._drop(visitor)
                return
        visitor.offer = offer
        self._counts["segments_passed"] += 1

    def _refuse(self, visitor: _Visitor, reason: str) -> None:
        self._counts["segments_refused"] += 1
        logger.info("refused a segment at %s: %s", self.path, reason)
        with contextlib.suppress(OSError):
            visitor.sock.send(ANSWER.pack(MAGIC, False, 0, bytes(32)))
        self._drop(visitor)

    def _drop(self, visitor: _Visitor) -> None:
        if self._visitors.pop(visitor.sock.fileno(), None) is not None:
            self._selector.unregister(visitor.sock)
        visitor.sock.close()

    def _hang_up_all(self) -> None:
        with self._lock:
            generations, self._hang_ups = set(self._hang_ups), []
        if generations:
            for visitor in tuple(self._visitors.values()):
                if visitor.offer is not None and visitor.offer.generation in generations:
                    self._drop(visitor)

    def _expire(self) -> None:
        now = time.monotonic()
        for visitor in tuple(self._visitors.values()):
            if visitor.offer is None and visitor.expires_s <= now:
                self._refuse(visitor, f"no request within {HANDSHAKE_S:g} s")

    def _dispose(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        for visitor in tuple(self._visitors.values()):
            self._drop(visitor)
        self._selector.close()
        for sock in (self._listener, self._wake_read, self._wake_write):
            sock.close()


def _listen(folder: Path) -> tuple[socket.socket, str]:
    """A listening socket and its path. The name appears only once it listens, so that no other start takes it for old.

    The socket files of processes that were killed are removed on the way.
    """
    name = f"{os.getpid()}-{secrets.token_hex(4)}.sock"
    path, new = folder / (SOCKET_PREFIX + name), folder / (".new-" + name)
    prepare_ipc(f"ipc://{path}")
    _remove_stale(folder)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.bind(str(new))
        sock.listen(MAX_HANDSHAKES)
        sock.setblocking(False)
        new.rename(path)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen at {path}: {error}") from error
    return sock, str(path)


def _remove_stale(folder: Path) -> None:
    for path in (*folder.glob(f"{SOCKET_PREFIX}*.sock"), *folder.glob(".new-*.sock")):
        with contextlib.suppress(OSError):
            is_old = path.name.startswith(SOCKET_PREFIX) or time.time() - path.stat().st_mtime > STALE_S
            if is_old and not _is_answered(path):
                path.unlink()


def _is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.setblocking(False)
        try:
            sock.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True  # busy, or not ours to judge
        return True
