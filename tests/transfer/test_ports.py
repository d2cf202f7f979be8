"""Endpoints stay within the ports they were given, and say so when none is left."""

from __future__ import annotations

import socket
from contextlib import ExitStack, suppress

import pytest

from transfer.config import TransferConfig
from transfer.endpoints.addresses import split_sealed
from transfer.endpoints.endpoint import open_endpoint
from transfer.errors import ConfigError

NUM_PORTS = 4
ATTEMPTS = 5


def _neighbours() -> str:
    """A range of ports that are free right now, as a setting."""
    while True:
        with ExitStack() as stack:
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            try:
                for port in range(first + 1, first + NUM_PORTS):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except (OSError, OverflowError):
                continue
        return f"{first}-{first + NUM_PORTS - 1}"


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _fill_a_range(stack: ExitStack) -> tuple[TransferConfig, list[int]]:
    """Endpoints that take every port of a range. Another range where a stranger was faster at one of its ports."""
    for _ in range(ATTEMPTS):
        config = TransferConfig(ports=_neighbours())
        taken: list[int] = []
        with ExitStack() as mine, suppress(ConfigError):
            for _ in range(NUM_PORTS // 2):
                endpoint = open_endpoint("tcp://127.0.0.1:0", config, curve=True)
                mine.callback(endpoint.close)
                sealed = endpoint.listen_sealed(1024)
                assert sealed is not None
                taken += [_port(endpoint.address), _port(split_sealed(sealed)[0])]
            stack.push(mine.pop_all())
            return config, taken
    raise AssertionError(f"no endpoints in any of {ATTEMPTS} ranges that were free")


def test_every_socket_of_an_endpoint_is_bound_within_the_range() -> None:
    with ExitStack() as stack:
        config, taken = _fill_a_range(stack)
        assert config.port_range is not None and sorted(taken) == list(config.port_range)
        with pytest.raises(ConfigError, match="cannot bind"):
            open_endpoint("tcp://127.0.0.1:0", config)


def test_a_port_that_is_named_counts_more_than_the_range() -> None:
    for _ in range(ATTEMPTS):  # as above
        outside = int(_neighbours().partition("-")[0])
        with suppress(ConfigError):
            endpoint = open_endpoint(f"tcp://127.0.0.1:{outside}", TransferConfig(ports="50000-50001"))
            try:
                assert _port(endpoint.address) == outside
            finally:
                endpoint.close()
            return
    raise AssertionError("no port that was free could be bound")


@pytest.mark.parametrize(
    "ports", ["", "20000", "20000-", "-20000", "20100-20000", "20000-20000", "80-90", "1-70000", "²-³"]
)
def test_what_is_no_range_is_refused(ports: str) -> None:
    with pytest.raises(ConfigError, match=r"transfer\.ports"):
        TransferConfig(ports=ports)


def test_any_port_is_the_default() -> None:
    assert TransferConfig().port_range is None
