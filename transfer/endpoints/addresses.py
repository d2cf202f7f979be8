"""What may be bound and reached, and who may come in: addresses, the socket folder's rights, the guest list.

Plain values and file rights; no sockets. The list speaks ZAP 1.0 (rfc.zeromq.org/spec/27) on lists of frames. An
address for sealed payloads is that of a socket of its own with the token that opens it: tcp://HOST:PORT#TOKEN.
"""

from __future__ import annotations

import functools
import hmac
import ipaddress
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from transfer.errors import ConfigError

MAX_IPC_PATH = 100  # sun_path has 108 bytes
ZAP_DOMAIN = b"tandem"
SEALED_DOMAIN = b"tandem sealed"
TOKEN_CHARS = 32
_TCP = re.compile(r"tcp://(?P<host>[A-Za-z0-9_.\-]+|\*|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9_.\-]+)?\]):(?P<port>[0-9]{1,5})")
_TOKEN = re.compile(rf"[0-9a-f]{{{TOKEN_CHARS}}}")
_EVERY_INTERFACE = (0, 0xFFFF_0000_0000)  # 0.0.0.0 and ::, and the first of these as an IPv6 address
_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


def is_loopback(host: str) -> bool:
    """Whether a host name or literal address stays on this machine. False in doubt: that asks for more protection."""
    literal = _literal(host)
    return host == "localhost" if literal is None else literal.is_loopback


def tcp_host(address: str) -> str:
    """The host of tcp://HOST:PORT: a name, an IPv4 address, or an IPv6 address in brackets. ConfigError otherwise."""
    match = _TCP.fullmatch(address)
    if match is None or int(match["port"]) > 65535:
        raise ConfigError(f"{address!r} is no address: use tcp://HOST:PORT, with an IPv6 address in brackets")
    return match["host"]


def check_bind_host(address: str) -> None:
    """ConfigError for an address that would bind every interface."""
    host = tcp_host(address)
    literal = _literal(host)
    if host == "*" or _is_any_ipv4(host) or (literal is not None and int(literal) in _EVERY_INTERFACE):
        raise ConfigError(f"{address!r} would listen on every interface and tells peers nothing: name one address")


def raw_key(public_key: str) -> bytes:
    """The 32 bytes of a CURVE public key in z85 (40 characters). ConfigError for anything else, and for an empty key:
    one of zeros only, which no pair of keys has.
    """
    digits = [_Z85.find(character) for character in public_key]
    if len(digits) != 40 or min(digits) < 0:
        raise ConfigError("a CURVE public key is 40 characters of z85")
    words = [functools.reduce(lambda value, digit: value * 85 + digit, digits[i : i + 5], 0) for i in range(0, 40, 5)]
    if max(words) > 0xFFFFFFFF or not any(words):
        raise ConfigError("a CURVE public key is 40 characters of z85, and not all zero")
    return b"".join(word.to_bytes(4, "big") for word in words)


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None


def _is_any_ipv4(host: str) -> bool:
    """Old spellings of 0.0.0.0 count too: 0, 0.0, 0x0, 00.00."""
    try:
        return socket.inet_aton(host) == bytes(4)
    except OSError:
        return False


def prepare_ipc(address: str) -> None:
    """Make the socket's folder (rights 0700). ConfigError when it exists with wider rights or another owner."""
    path = Path(address.removeprefix("ipc://"))
    if not path.is_absolute() or len(os.fsencode(path)) > MAX_IPC_PATH:
        raise ConfigError(f"{address!r}: an ipc path is absolute and at most {MAX_IPC_PATH} bytes")
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.stat()
    except OSError as error:
        raise ConfigError(f"{folder} cannot be used for sockets: {error.strerror}; use another folder") from error
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
        raise ConfigError(f"{folder} must be this user's with rights 0700, or others could connect: use a new folder")
    if path.exists():
        raise ConfigError(f"{path} exists: another worker listens there, or it is left over; choose another name")


def sealed_address(address: str, token: str) -> str:
    """What a receiver tells its sender: where sealed payloads go, and the token that lets them in."""
    return f"{address}#{token}"


def split_sealed(address: str) -> tuple[str, str]:
    """(tcp address, token) of an address for sealed payloads. ConfigError for anything else; it hides the token."""
    plain, separator, token = address.partition("#")
    if not separator or _TOKEN.fullmatch(token) is None:
        raise ConfigError(f"{plain!r} is no address for sealed payloads: use tcp://HOST:PORT#TOKEN")
    tcp_host(plain)
    return plain, token


class AllowList:
    """Who may connect: peers with a listed CURVE key (raw 32 bytes), and to the socket for sealed payloads whoever has
    its token. A ZAP handler without its socket.
    """

    def __init__(self) -> None:
        self._keys: frozenset[bytes] = frozenset()
        self.token = secrets.token_hex(TOKEN_CHARS // 2)
        self.num_refused = 0

    def replace(self, keys: Iterable[bytes]) -> None:
        """Let these keys in from now on, and no others."""
        self._keys = frozenset(keys)

    def answer(self, request: Sequence[bytes]) -> list[bytes]:
        """The ZAP reply to a ZAP request: 200 for a listed CURVE key or the token, each at its own socket, else 400."""
        request_id = request[1] if len(request) > 1 else b""
        allowed = len(request) > 6 and request[0] == b"1.0" and self._knows(request[2], request[5], request[6:])
        self.num_refused += not allowed
        status = (b"200", b"OK") if allowed else (b"400", b"not on the list of this endpoint")
        return [b"1.0", request_id, *status, b"peer" if allowed else b"", b""]

    def _knows(self, domain: bytes, mechanism: bytes, credentials: Sequence[bytes]) -> bool:
        if (domain, mechanism) == (ZAP_DOMAIN, b"CURVE"):
            return len(credentials) == 1 and credentials[0] in self._keys
        if (domain, mechanism) == (SEALED_DOMAIN, b"PLAIN"):
            named = len(credentials) == 2 and credentials[0] == SEALED_DOMAIN
            return named and hmac.compare_digest(credentials[1], self.token.encode("ascii"))
        return False
