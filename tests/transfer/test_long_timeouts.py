"""Times that a kernel's timers do not reach: peers meet over TCP as ever."""

from __future__ import annotations

import threading

import pytest

from transfer.config import MAX_WAIT_S, TransferConfig
from transfer.endpoints.endpoint import open_endpoint
from transfer.service.service import Service


@pytest.mark.parametrize(
    ("ping_s", "peer_s"), [(2.0, 254.0), (2.0, 600.0), (0.001, MAX_WAIT_S), (40_000.0, MAX_WAIT_S), (0.001, 0.5)]
)
def test_a_call_is_answered_whatever_the_times(ping_s: float, peer_s: float) -> None:
    config = TransferConfig(ping_interval_s=ping_s, peer_timeout_s=peer_s)
    server = Service(open_endpoint("tcp://127.0.0.1:0", config), config)
    client = Service(open_endpoint("tcp://127.0.0.1:0", config), config)
    over = threading.Event()
    ends: list[object] = []

    def on_end(body: object, failure: object) -> None:
        ends.append((body, failure))
        over.set()

    server.register("echo", lambda incoming: incoming.end(incoming.body))
    server.start()
    client.start()
    try:
        connection = client.endpoint.connect(server.endpoint.address, server.endpoint.public_key)
        client.call(connection, "echo", {"x": 1}, on_end=on_end)
        assert over.wait(60) and ends == [({"x": 1}, None)]
    finally:
        client.close()
        server.close()
