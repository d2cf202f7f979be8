"""PeerBook: the connections of one endpoint, those it made and those that came. Plain values; its owner locks.

A connection that was made is known by its address: with the peer's public key, or with the token for sealed payloads
that is part of it. One that came is known by the identity under which its messages arrive.
"""

from __future__ import annotations

import secrets

from transfer.connection import Connection
from transfer.endpoints.addresses import is_loopback, raw_key, split_sealed, tcp_host
from transfer.errors import ConfigError, Overloaded

MAX_PEERS = 4096
KEY_BYTES = 16  # of the name under which a peer's messages arrive


class PeerBook:
    """At most MAX_PEERS connections each way."""

    def __init__(self, own_address: str) -> None:
        self.sealed_path = Connection(
            endpoint=own_address, peer=f"{own_address}<-sealed", key=b"", outgoing=False, is_sealed_path=True
        )  # whoever sends us sealed payloads
        self._own_address = own_address
        self._made: dict[str, tuple[Connection, str | None]] = {}
        self._addresses: dict[Connection, str] = {}  # of those made
        self._came: dict[bytes, Connection] = {}

    def __len__(self) -> int:
        """Connections made."""
        return len(self._made)

    def make(self, address: str, public_key: str | None) -> Connection:
        """The connection to `address`, new or known. ConfigError for another key than before, Overloaded."""
        known = self._made.get(address)
        if known is not None and known[1] == public_key:
            return known[0]
        if known is not None:
            raise ConfigError(f"{address} is connected with another public key: disconnect it first")
        if len(self._made) >= MAX_PEERS:
            raise Overloaded(f"{MAX_PEERS} peers are connected: disconnect some")
        peer, _, token = address.partition("#")
        key = secrets.token_bytes(KEY_BYTES)
        connection = Connection(
            endpoint=self._own_address, peer=peer, key=key, outgoing=True, is_sealed_path=bool(token)
        )
        self._made[address] = connection, public_key
        self._addresses[connection] = address
        return connection

    def way_to(self, connection: Connection) -> tuple[str, str | None] | None:
        """(address, public key) of a connection that was made and not forgotten."""
        address = self._addresses.get(connection)
        return None if address is None else (address, self._made[address][1])

    def forget(self, connection: Connection) -> None:
        """Nothing happens when it is not known."""
        address = self._addresses.pop(connection, None)
        if address is not None:
            del self._made[address]

    def came(self, identity: bytes) -> Connection | None:
        """The connection of messages that arrive under `identity`; None where that is no peer's name.

        When a peer comes back, ZeroMQ gives a name of its own to what is left of the link that broke. Taken for a
        peer's, it would bind a stream to a connection that its sender never has again.
        """
        if len(identity) != KEY_BYTES:
            return None
        connection = self._came.get(identity)
        if connection is None:
            if len(self._came) >= MAX_PEERS:
                self._came.clear()  # only a cache: equal identities give equal connections
            peer = f"{self._own_address}<-{identity.hex()}"
            connection = Connection(endpoint=self._own_address, peer=peer, key=identity, outgoing=False)
            self._came[identity] = connection
        return connection


def check_peer(own_address: str, address: str, public_key: str | None, *, is_encrypted: bool) -> None:
    """ConfigError for an address that an endpoint on sockets cannot reach, or not without the peer's key."""
    if "#" in address:
        split_sealed(address)
    elif address.startswith("tcp://"):
        host = tcp_host(address)
        if host == "*":
            raise ConfigError(f"{address!r} is no peer's address: name its host")
        if public_key is None and (is_encrypted or not is_loopback(host)):
            raise ConfigError(f"{address} is reached with CURVE only: its public key is needed")
    elif not address.startswith("ipc://"):
        raise ConfigError(f"{own_address} cannot reach {address!r}: use tcp:// or ipc://")
    if public_key is not None:
        raw_key(public_key)
