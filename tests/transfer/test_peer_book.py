"""The book of connections: one per address and key, bounded, and what may be reached at all."""

from __future__ import annotations

import pytest
import zmq

from transfer.endpoints.peer_book import KEY_BYTES, MAX_PEERS, PeerBook, check_peer
from transfer.errors import ConfigError, Overloaded

KEY, OTHER = (zmq.curve_keypair()[0].decode() for _ in range(2))
TOKEN = "0123456789abcdef" * 2


def test_an_address_has_one_connection_until_it_is_forgotten() -> None:
    book = PeerBook("tcp://192.0.2.1:1")
    first = book.make("tcp://192.0.2.2:7", KEY)
    assert book.make("tcp://192.0.2.2:7", KEY) is first and first.outgoing and not first.is_sealed_path
    assert book.way_to(first) == ("tcp://192.0.2.2:7", KEY) and len(book) == 1
    with pytest.raises(ConfigError, match="another public key"):
        book.make("tcp://192.0.2.2:7", OTHER)
    book.forget(first)
    book.forget(first)
    assert book.way_to(first) is None and len(book) == 0
    again = book.make("tcp://192.0.2.2:7", OTHER)
    assert again != first and book.way_to(first) is None
    book.forget(first)
    assert book.way_to(again) == ("tcp://192.0.2.2:7", OTHER), "an old handle forgets nothing new"


def test_a_path_for_sealed_payloads_is_another_connection_and_shows_no_token() -> None:
    book = PeerBook("tcp://192.0.2.1:1")
    address = f"tcp://192.0.2.2:8#{TOKEN}"
    path = book.make(address, None)
    assert path.is_sealed_path and path.peer == "tcp://192.0.2.2:8" and TOKEN not in repr(path)
    assert book.make(address, None) is path and book.way_to(path) == (address, None)
    renewed = book.make(f"tcp://192.0.2.2:8#{TOKEN[::-1]}", None)  # another process has the port now
    assert renewed != path and book.way_to(path) is not None
    assert book.sealed_path.is_sealed_path and not book.sealed_path.outgoing


def test_connections_that_came_are_known_by_their_identity() -> None:
    book = PeerBook("tcp://192.0.2.1:1")
    first, second = b"1" * KEY_BYTES, b"2" * KEY_BYTES
    one, two = book.came(first), book.came(second)
    assert one is not None and book.came(first) is one and not one.outgoing and two != one
    for number in range(MAX_PEERS):
        book.came(number.to_bytes(KEY_BYTES, "big"))
    assert book.came(first) == one, "forgotten meanwhile, and equal"
    assert book.came(b"name") is None, "not a name that a peer gives itself"
    assert len(book) == 0 and book.way_to(one) is None


def test_the_book_is_bounded() -> None:
    book = PeerBook("tcp://192.0.2.1:1")
    connections = [book.make(f"tcp://192.0.2.2:{port}", None) for port in range(1, MAX_PEERS + 1)]
    with pytest.raises(Overloaded, match="disconnect some"):
        book.make("tcp://192.0.2.3:1", None)
    book.forget(connections[0])
    book.make("tcp://192.0.2.3:1", None)


@pytest.mark.parametrize(
    ("address", "key", "is_encrypted", "problem"),
    [
        ("tcp://127.0.0.1:1", None, False, None),
        ("tcp://127.0.0.1:1", None, True, "public key is needed"),
        ("tcp://127.0.0.1:1", KEY, True, None),
        ("tcp://192.0.2.2:1", None, False, "public key is needed"),
        ("tcp://192.0.2.2:1", KEY, False, None),
        ("tcp://192.0.2.2:1", "short", True, "z85"),
        (f"tcp://192.0.2.2:1#{TOKEN}", None, True, None),
        ("tcp://192.0.2.2:1#", None, True, "sealed payloads"),
        (f"ipc:///run/x.sock#{TOKEN}", None, True, "is no address"),
        ("ipc:///run/x.sock", None, False, None),
        ("inproc://x", None, False, "cannot reach"),
        ("tcp://nowhere", KEY, True, "is no address"),
        ("tcp://*:1", KEY, True, "name its host"),
        ("tcp://nowhere", None, False, "is no address"),
    ],
)
def test_what_can_be_reached(address: str, key: str | None, is_encrypted: bool, problem: str | None) -> None:
    if problem is None:
        check_peer("tcp://192.0.2.1:1", address, key, is_encrypted=is_encrypted)
        return
    with pytest.raises(ConfigError, match=problem):
        check_peer("tcp://192.0.2.1:1", address, key, is_encrypted=is_encrypted)
