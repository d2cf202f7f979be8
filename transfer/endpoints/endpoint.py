"""open_endpoint: an endpoint from its address. Loads a transport only when an address asks for it."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import cast

from transfer.config import TransferConfig
from transfer.connection import Connection, Frame
from transfer.endpoints.contract import Endpoint, Handler, Tick
from transfer.errors import ConfigError

__all__ = ["Connection", "Endpoint", "Frame", "Handler", "Tick", "open_endpoint"]

_TRANSPORTS = {
    "inproc": "transfer.endpoints.inproc_endpoint:open_inproc",
    "tcp": "transfer.endpoints.zmq_endpoint:open_zmq",
    "ipc": "transfer.endpoints.zmq_endpoint:open_zmq",
}


def open_endpoint(address: str, config: TransferConfig | None = None, *, curve: bool | None = None) -> Endpoint:
    """An endpoint bound to "inproc://NAME", "tcp://HOST:PORT" (port 0: any free one) or "ipc://PATH".

    `curve`: encrypt and authenticate with CURVE; None means yes for tcp on an address that is not loopback.
    Raises ConfigError for an address that cannot be used.
    """
    scheme, separator, rest = address.partition("://")
    if not separator or not rest or scheme not in _TRANSPORTS:
        raise ConfigError(f"cannot open {address!r}: use inproc://NAME, tcp://HOST:PORT or ipc:///PATH.sock")
    opener = cast(Callable[[str, TransferConfig, bool | None], Endpoint], pkgutil.resolve_name(_TRANSPORTS[scheme]))
    return opener(address, config or TransferConfig(), curve)
