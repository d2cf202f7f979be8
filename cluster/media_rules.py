"""From which hosts this server may read media, and to which addresses it may connect for that.

A URL is allowed by its host name; a connection by the address that the name stands for at that moment, so that a public
name cannot lead to a private service. Pure: resolves nothing and connects to nothing.
"""

from __future__ import annotations

import dataclasses
import ipaddress

from cluster.errors import ConfigError, MediaNotAllowed

ANY_HOST = "*"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052
# Not public either, whatever this Python's table of special addresses holds: protocol assignments (with a cloud's
# metadata service), another cloud's host service, IPv4 in the first IPv6 addresses, local NAT64 (RFC 8215), examples
# (RFC 9637), segment routing (RFC 9602).
_SPECIAL = tuple(
    ipaddress.ip_network(block)
    for block in (
        "192.0.0.0/24", "168.63.129.16/32", "::/96", "::ffff:0:0:0/96", "64:ff9b:1::/48", "3fff::/20", "5f00::/16",
    )
)  # fmt: skip

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclasses.dataclass(frozen=True, slots=True)
class MediaRules:
    """hosts: names from which media are read: "images.example.com", ".example.com" (every name below it), or "*" (any).
    private_networks: CIDR blocks whose addresses are connected to though they are not public, an object store's say."""

    hosts: tuple[str, ...] = ()
    private_networks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ConfigError for what is no host name or no network."""
        for host in self.hosts:
            name = host.removeprefix(".")
            if host != ANY_HOST and (not name or not name.isascii() or set(name) & set("/:*@ []") or name[0] == "."):
                raise ConfigError(
                    f"gateway.media_hosts holds {host!r}; use a host name, .domain for all below it, or * for any"
                )
        for network in self.private_networks:
            try:
                ipaddress.ip_network(network)
            except ValueError as error:
                raise ConfigError(f"gateway.media_private_networks holds {network!r}: {error}; use CIDR") from None

    def lists(self, host: str) -> bool:
        """Whether media may be read from this host: a name in lower case, without a final dot."""
        return any(
            rule == ANY_HOST or (host.endswith(rule) if rule.startswith(".") else host == rule)
            for rule in (rule.lower() for rule in self.hosts)
        )

    def check_address(self, text: str, param: str | None = None) -> str:
        """The address as it is to be connected to; MediaNotAllowed unless it is public, or of a network that is listed.

        IPv6 addresses that stand for an IPv4 address (mapped, 6to4, Teredo, NAT64) are judged by that one as well.
        """
        address = ipaddress.ip_address(text.partition("%")[0])
        for one in _judged(address):
            is_listed = any(one in ipaddress.ip_network(network) for network in self.private_networks)
            is_local = isinstance(one, ipaddress.IPv6Address) and one.is_site_local
            is_special = is_local or one.is_multicast or any(one in block for block in _SPECIAL)
            if not is_listed and (is_special or not one.is_global):
                raise MediaNotAllowed("the URL's host is not at a public address; media are not read from there", param)
        return str(address)


def _judged(address: Address) -> tuple[Address, ...]:
    """The address, and those that it stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        return (address,)
    if address.ipv4_mapped is not None:
        return (address.ipv4_mapped,)
    found = [address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return (address, *(one for one in found if one is not None))
