"""What may be bound, which folder sockets may lie in, which keys are keys, and whom the allow-list lets in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from zmq.utils import z85

from transfer.endpoints.addresses import (
    SEALED_DOMAIN,
    ZAP_DOMAIN,
    AllowList,
    check_bind_host,
    is_loopback,
    prepare_ipc,
    raw_key,
    sealed_address,
    split_sealed,
    tcp_host,
)
from transfer.errors import ConfigError

EVERY_INTERFACE = [
    "*", "0.0.0.0", "0", "0.0", "0.0.0", "00.0.0.0", "0x0", "0x0.0", "[::]", "[::0]", "[0:0:0:0:0:0:0:0]", "[0::]",
    "[::ffff:0.0.0.0]", "[::ffff:0:0]", "[::%lo]",
]  # fmt: skip


@pytest.mark.parametrize("host", EVERY_INTERFACE)
def test_every_spelling_of_every_interface_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="every interface"):
        check_bind_host(f"tcp://{host}:0")
    assert not is_loopback(host)


def test_the_list_of_spellings_is_not_made_up() -> None:
    """ZeroMQ binds all of them to every interface (but the one with a scope, which not every system takes)."""
    context = zmq.Context()
    try:
        for host in EVERY_INTERFACE[:-1]:
            with context.socket(zmq.ROUTER) as sock:
                sock.setsockopt(zmq.IPV6, int("[" in host))
                try:
                    sock.bind(f"tcp://{host}:0")
                except zmq.ZMQError:
                    assert "[" in host, "only systems without IPv6 may refuse"
                    continue
                bound = sock.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[0]
                assert bound in ("tcp://0.0.0.0", "tcp://[::]", "tcp://[::ffff:0.0.0.0]"), (host, bound)
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize(
    "address", ["tcp://192.0.2.2:0", "tcp://[fd00::2]:65535", "tcp://worker-7.example:5555", "tcp://[fe80::1%eth0]:1"]
)
def test_one_address_is_not_loopback_and_may_be_bound(address: str) -> None:
    check_bind_host(address)
    assert not is_loopback(tcp_host(address))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "[::1]", "::1"])
def test_loopback_addresses(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["127.1", "localhost.example", "2130706433", "[::2]", "0x7f000001", ""])
def test_what_is_loopback_only_perhaps_counts_as_the_outside(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "address",
    [
        "tcp://", "tcp://:1", "tcp://host", "tcp://host:", "tcp://host:65536", "tcp://host:-1", "tcp://host:²",
        "tcp://ho st:1", "tcp://host:1 ", "tcp://host:1\n", "tcp://192.0.2.1:0;127.0.0.1:1", "tcp://fd00::2:1",
        "tcp://[host]:1", "tcp://host/path:1", "tcp://a:b:1", "host:1", "udp://host:1", "tcp://[::1:1",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        tcp_host(address)


@settings(max_examples=200, derandomize=True)
@given(st.binary(min_size=32, max_size=32).filter(any))
def test_keys_are_read_as_z85(key: bytes) -> None:
    assert raw_key(z85.encode(key).decode("ascii")) == key


@pytest.mark.parametrize(
    "key", ["", "0" * 39, "0" * 41, "0" * 40, "#" * 40, "0" * 39 + "~", "0" * 39 + "é", "0" * 39 + "\n", " " * 40]
)
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="40 characters of z85"):
        raw_key(key)


def test_the_socket_folder_is_its_users_alone(tmp_path: Path) -> None:
    prepare_ipc(f"ipc://{tmp_path}/new/a.sock")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    for mode in (0o750, 0o705, 0o777):
        os.chmod(tmp_path / "new", mode)
        with pytest.raises(ConfigError, match="rights 0700"):
            prepare_ipc(f"ipc://{tmp_path}/new/a.sock")
    os.chmod(tmp_path / "new", 0o700)
    (tmp_path / "new" / "taken.sock").touch()
    with pytest.raises(ConfigError, match="exists"):
        prepare_ipc(f"ipc://{tmp_path}/new/taken.sock")
    for address in ("ipc://relative.sock", "ipc://", f"ipc://{tmp_path}/{'x' * 100}"):
        with pytest.raises(ConfigError, match="absolute and at most"):
            prepare_ipc(address)


def _zap(*credentials: bytes, **changes: bytes) -> list[bytes]:
    names = ("version", "request", "domain", "address", "identity", "mechanism")
    values = (b"1.0", b"7", ZAP_DOMAIN, b"192.0.2.9", b"", b"CURVE")
    return [*{**dict(zip(names, values, strict=True)), **changes}.values(), *credentials]


def assert_refused(allowed: AllowList, requests: list[list[bytes]]) -> None:
    before = allowed.num_refused
    for request in requests:
        answer = allowed.answer(request)
        assert answer[2] == b"400" and answer[4] == b"" and len(answer) == 6
    assert allowed.num_refused == before + len(requests)


def test_the_allow_list_lets_in_listed_curve_keys_only() -> None:
    allowed, key, other = AllowList(), b"k" * 32, b"o" * 32
    assert_refused(allowed, [_zap(key)])  # nobody is listed at the start
    allowed.replace([key])
    assert allowed.answer(_zap(key)) == [b"1.0", b"7", b"200", b"OK", b"peer", b""]
    odd = [_zap(other), _zap(b""), _zap(), _zap(key[:-1]), _zap(key, key), []]
    changed = [{"mechanism": b"NULL"}, {"mechanism": b"PLAIN"}, {"domain": b""}, {"domain": SEALED_DOMAIN}]
    assert_refused(allowed, [*odd, *(_zap(key, **change) for change in (*changed, {"version": b"2.0"}))])
    allowed.replace([other])
    assert allowed.answer(_zap(other))[2] == b"200"
    assert_refused(allowed, [_zap(key)])  # who is no longer listed may not come back


def test_the_token_opens_the_socket_for_sealed_payloads_only() -> None:
    allowed, key = AllowList(), b"k" * 32
    allowed.replace([key])
    token = allowed.token.encode()
    sealed = {"domain": SEALED_DOMAIN, "mechanism": b"PLAIN"}
    right = (SEALED_DOMAIN, token)
    assert allowed.answer(_zap(*right, **sealed))[2] == b"200"
    assert len(token) == 32 and AllowList().token != allowed.token
    wrong: list[tuple[bytes, ...]] = [(SEALED_DOMAIN, token[:-1]), (SEALED_DOMAIN, b""), (token, b""), (b"", token)]
    wrong += [(token,), (SEALED_DOMAIN,), (), (*right, b""), (key, b""), (SEALED_DOMAIN, key)]
    changed = [{"domain": ZAP_DOMAIN}, {"mechanism": b"CURVE"}, {"mechanism": b"NULL"}, {"version": b"2.0"}]
    assert_refused(allowed, [_zap(*credentials, **sealed) for credentials in wrong])
    assert_refused(allowed, [_zap(*right, **sealed | change) for change in changed])


def test_addresses_for_sealed_payloads() -> None:
    token = AllowList().token
    for plain in ("tcp://192.0.2.2:7", "tcp://[fd00::2]:7"):
        assert split_sealed(sealed_address(plain, token)) == (plain, token)
    for wrong in (
        "tcp://192.0.2.2:7",
        "tcp://192.0.2.2:7#",
        f"tcp://192.0.2.2:7#{token[:-1]}",
        f"tcp://192.0.2.2:7#{token}#{token}",
        f"tcp://192.0.2.2:7#{token.upper()[:-1]}G",
        f"ipc:///x#{token}",
        f"tcp://192.0.2.2#{token}",
        "",
    ):
        with pytest.raises(ConfigError, match="is no address") as caught:
            split_sealed(wrong)
        assert token not in str(caught.value)


@pytest.mark.parametrize("kind", ["file", "dangling link", "file above"])
def test_a_folder_that_cannot_be_one_is_a_config_error(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "taken"
    if kind == "dangling link":
        folder.symlink_to(tmp_path / "nowhere" / "at" / "all")
    else:
        folder.write_text("no folder")
    with pytest.raises(ConfigError, match="cannot be used for sockets"):
        prepare_ipc(f"ipc://{folder / 'below' if kind == 'file above' else folder}/name.sock")
