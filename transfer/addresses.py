"""What may be bound and reached, and who may come in: addresses, the socket folder's rights, the key allow-list.

Plain values and file rights; no sockets. The allow-list speaks ZAP 1.0 (rfc.zeromq.org/spec/27) on lists of frames.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from transfer.errors import ConfigError

MAX_IPC_PATH = 100  # sun_path has 108 bytes
ZAP_DOMAIN = b"tandem"


def is_loopback(host: str) -> bool:
    """Whether a host name or literal address stays on this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def tcp_host(address: str) -> str:
    """The host of tcp://HOST:PORT. ConfigError when malformed."""
    host, separator, port = address.removeprefix("tcp://").rpartition(":")
    if not separator or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{address!r} is no address: use tcp://HOST:PORT")
    return host


def check_bind_host(address: str) -> None:
    """ConfigError for an address that would bind every interface."""
    host = tcp_host(address)
    if host in ("*", "0.0.0.0", "[::]", "::", "0"):
        raise ConfigError(f"{address!r} would listen on every interface and tells peers nothing: name one address")


def prepare_ipc(address: str) -> None:
    """Make the socket's folder (rights 0700). ConfigError when it exists with wider rights or another owner."""
    path = Path(address.removeprefix("ipc://"))
    if not path.is_absolute() or len(os.fsencode(path)) > MAX_IPC_PATH:
        raise ConfigError(f"{address!r}: an ipc path is absolute and at most {MAX_IPC_PATH} bytes")
    folder = path.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = folder.stat()
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
        raise ConfigError(f"{folder} must be this user's with rights 0700, or others could connect: use a new folder")
    if path.exists():
        raise ConfigError(f"{path} exists: another worker listens there, or it is left over; choose another name")


class AllowList:
    """Public keys that may connect (raw 32 bytes each); a ZAP handler without its socket."""

    def __init__(self) -> None:
        self._keys: set[bytes] = set()
        self.num_refused = 0

    def add(self, key: bytes) -> None:
        """Let `key` in from now on."""
        self._keys.add(key)

    def answer(self, request: Sequence[bytes]) -> list[bytes]:
        """The ZAP reply to a ZAP request: 200 for a listed CURVE key, else 400."""
        request_id = request[1] if len(request) > 1 else b""
        allowed = (
            len(request) == 7
            and request[0] == b"1.0"
            and request[2] == ZAP_DOMAIN
            and request[5] == b"CURVE"
            and request[6] in self._keys
        )
        self.num_refused += not allowed
        status = (b"200", b"OK") if allowed else (b"400", b"this key is not on the allow-list")
        return [b"1.0", request_id, *status, b"peer" if allowed else b"", b""]
