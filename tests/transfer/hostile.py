"""What a stranger can send to a port: pickles, junk, wrong versions, oversized frames, forged and replayed messages.

`Attacker` speaks raw ZeroMQ. Each volley ends with a ping whose answer shows that all before it was read.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgpack
import zmq
from zmq.utils.monitor import recv_monitor_message

from transfer.endpoints.peer_book import KEY_BYTES
from transfer.memory.segment_passing import ANSWER, CHALLENGE, MAGIC, NONCE_BYTES, REQUEST
from transfer.memory.segment_server import SOCKET_PREFIX
from transfer.protocol.messages import Abort, Call, Close, End, Message
from transfer.protocol.wire import MAX_HEADER_BYTES, WIRE_VERSION, decode_header, encode_header, frame_header

WAIT_MS = 60_000
LISTENING_TCP, LISTENING_UNIX, STREAM, PACKETS = "0A", "00010000", "0001", "0005"
Frames = Sequence[bytes]


@dataclass
class Bomb:
    """Makes a folder when it is unpickled."""

    path: str

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (self.path,)


def listening_addresses(pid: int) -> list[str]:
    """Every address that a process listens on for ZeroMQ's streams of bytes, from what the kernel knows."""
    inodes, found = _inodes(pid), []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == LISTENING_TCP and fields[9] in inodes:
            host, port = fields[1].split(":")
            found.append(f"tcp://{socket.inet_ntoa(struct.pack('<I', int(host, 16)))}:{int(port, 16)}")
    return found + [f"ipc://{path}" for path in _unix_paths(pid, STREAM)]


def segment_sockets(pid: int) -> list[str]:
    """Every socket file at which a process hands out segments. The kernel knows them by the names they had first."""
    return [path.replace("/.new-", f"/{SOCKET_PREFIX}") for path in _unix_paths(pid, PACKETS)]


def _unix_paths(pid: int, kind: str) -> list[str]:
    inodes, rows = _inodes(pid), Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]
    listening = [f for f in map(str.split, rows) if f[3] == LISTENING_UNIX and f[4] == kind and f[6] in inodes]
    return [fields[7] for fields in listening if len(fields) > 7 and not fields[7].startswith("@")]


def _inodes(pid: int) -> set[str]:
    targets = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            targets.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return {target[8:-1] for target in targets if target.startswith("socket:[")}


def malformed_messages(folder: Path) -> list[Frames]:
    """None of these is a message: pickles that would make a folder, junk, and headers of every other version."""
    version, good = bytes([WIRE_VERSION]), encode_header(Call(call_id=1, method="ping", body={}))
    pickles = [pickle.dumps(Bomb(str(folder / f"pickle-{protocol}")), protocol) for protocol in range(6)]
    messages: list[Frames] = []
    for data in pickles:
        messages += [[data], [frame_header(data)], [data, data], [frame_header(data), b"", data]]
        for value in ({"type": "call", "call_id": 1, "method": "ping", "body": data}, msgpack.ExtType(42, data)):
            messages.append([frame_header(msgpack.packb(value))])
    messages += [[bytes([other]) + good[1:]] for other in range(256) if other != WIRE_VERSION]
    messages += [[], [b""], [version], [b"\xff" * 1000], [frame_header(b"\xc1")], [frame_header(b"\x81" * 5000)]]
    messages += [[good[:size]] for size in range(1, len(good))]
    messages.append([good] + [b"x"] * 5000)
    messages.append([version + bytes(MAX_HEADER_BYTES)])
    return [message or [b""] for message in messages]


def forged_messages(stream_ids: Iterable[str], recorded: Iterable[Frames]) -> list[Frames]:
    """Well-formed messages of one who knows the ids of streams and has overheard them, and holds no ticket."""
    messages: list[Message] = []
    for stream_id in (*stream_ids, secrets.token_hex(16)):
        for epoch in (1, 2, 2**32 - 1):
            values = {"stream_id": stream_id, "epoch": epoch}
            messages += [Close(**values, total_rows=0), Abort(**values, code="Cancelled", message="forged")]  # type: ignore[arg-type]
    return [*([encode_header(message)] for message in messages), *recorded]


def ask_for_segments(path: str, folder: Path) -> int:
    """Everything but a good request, to what hands out segments; how many of them must have been counted as refused."""
    forged = REQUEST.pack(MAGIC, os.urandom(16), 1, 1, os.urandom(NONCE_BYTES), os.urandom(32))
    pickles = [pickle.dumps(Bomb(str(folder / f"segment-{protocol}")), protocol) for protocol in range(6)]
    packets = [forged, forged[:-1], forged + b"x", b"XXXX" + forged[4:], os.urandom(60_000), *pickles]
    num_late = 0
    for packet in packets:
        while not _is_refused(path, packet):
            num_late += 1
    return num_late + len(packets)


def _is_refused(path: str, packet: bytes) -> bool:
    """The packet came and was refused; not, where the visitor was so late that he was refused before it came."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(WAIT_MS / 1000)
        sock.connect(path)
        assert len(sock.recv(1000)) == CHALLENGE.size
        try:
            sock.send(packet)
            answer, fds, _, _ = socket.recv_fds(sock, 1000, 4)
        except (BrokenPipeError, ConnectionResetError):
            return False
        assert answer == ANSWER.pack(MAGIC, False, 0, bytes(32)) and not fds and not sock.recv(1000)
        return True


class Attacker:
    """Raw sockets to one address."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._context = zmq.Context()
        self._dealers: list[zmq.Socket[bytes]] = []

    def __enter__(self) -> Attacker:
        return self

    def __exit__(self, *_: object) -> None:
        for dealer in self._dealers:
            dealer.close(linger=0)
        self._context.destroy(linger=0)

    def volley(self, messages: Iterable[Frames]) -> list[Message]:
        """Send all on one connection; what came back before the answer to the last ping."""
        dealer = self._dealer()
        for frames in messages:
            dealer.send_multipart(list(frames))
        dealer.send(encode_header(Call(call_id=99, method="ping", body={})))
        answers: list[Message] = []
        while True:
            assert dealer.poll(WAIT_MS), f"{self._address} no longer answers"
            frames = dealer.recv_multipart()
            answers.append(decode_header(frames[0], len(frames) - 1))
            if answers[-1] == End(call_id=99, body={}):
                return answers[:-1]

    def oversized(self, num_bytes: int) -> None:
        """Send a frame beyond the cap; it must cost the connection."""
        dealer = self._dealer()
        monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        dealer.send_multipart([encode_header(Call(call_id=1, method="ping", body={})), bytes(num_bytes)])
        assert monitor.poll(WAIT_MS), f"{self._address} took a frame of {num_bytes} bytes"
        dealer.disable_monitor()
        monitor.close(linger=0)

    def assert_refused(self, messages: Iterable[Frames]) -> None:
        """No connection comes about, without CURVE and with a key of our own."""
        public, secret = zmq.curve_keypair()
        for keys in ((), (zmq.CURVE_PUBLICKEY, zmq.CURVE_SECRETKEY, zmq.CURVE_SERVERKEY)):
            dealer = self._context.socket(zmq.DEALER)
            self._dealers.append(dealer)
            dealer.setsockopt(zmq.ROUTING_ID, os.urandom(KEY_BYTES))
            for option, value in zip(keys, (public, secret, zmq.curve_keypair()[0]), strict=False):
                dealer.setsockopt(option, value)
            monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
            dealer.connect(self._address)
            for frames in messages:
                with contextlib.suppress(zmq.Again):  # refused already
                    dealer.send_multipart(list(frames), zmq.NOBLOCK)
            assert monitor.poll(WAIT_MS), f"{self._address} neither lets in nor refuses"
            assert recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED, f"{self._address} lets in"
            dealer.disable_monitor()
            monitor.close(linger=0)

    def raw_bytes(self, folder: Path) -> None:
        """Bytes that are no ZMTP at all."""
        bomb = pickle.dumps(Bomb(str(folder / "raw")))
        greeting = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00NULL" + bytes(48)
        for data in (
            b"GET / HTTP/1.1\r\n\r\n",
            bomb,
            os.urandom(5000),
            greeting + bomb,
            greeting + b"\x02" + b"\xff" * 9,
        ):
            with self._connect() as sock:
                sock.sendall(data)

    def _connect(self) -> socket.socket:
        if self._address.startswith("ipc://"):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self._address.removeprefix("ipc://"))
            return sock
        host, _, port = self._address.removeprefix("tcp://").rpartition(":")
        return socket.create_connection((host, int(port)))

    def _dealer(self) -> zmq.Socket[bytes]:
        dealer = self._context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.SNDHWM, 0)
        dealer.setsockopt(zmq.ROUTING_ID, os.urandom(KEY_BYTES))  # as peers do, or all would be dropped unread
        dealer.connect(self._address)
        self._dealers.append(dealer)
        return dealer


def assert_bombs_are_live(folder: Path) -> None:
    """The pickles would do what they say, if anybody loaded them; and nobody has."""
    assert not list(folder.iterdir()), "a pickle was loaded"
    pickle.loads(pickle.dumps(Bomb(str(folder / "proof"))))
    assert (folder / "proof").is_dir()
