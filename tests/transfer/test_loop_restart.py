"""A real endpoint whose loop dies in the middle of a stream is started anew, and the stream comes whole."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.transfer.test_streams import configure
from tests.transfer.virtual import PLANES, Consumer, make_rows
from transfer.endpoints.endpoint import open_endpoint
from transfer.protocol.ticket import Ticket
from transfer.service.service import Service
from transfer.streams.stream_receiver import StreamReceiver
from transfer.streams.stream_sender import StreamSender


@pytest.mark.parametrize("address", ["inproc://loop-restart", "tcp://127.0.0.1:0"])
def test_a_loop_that_dies_is_started_anew_and_the_stream_comes_whole(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(configure(16, 64, 6), shared_memory=False)  # its rows would be there at once
    endpoint = open_endpoint(address, config)
    service = Service(endpoint, config)
    receiver = StreamReceiver(service, config, PLANES)
    other = open_endpoint(address + "-sender" if address.startswith("inproc") else address, config)
    sending = Service(other, config)
    sender = StreamSender(sending, config)
    ticket, data, done = Ticket.issue("test"), make_rows(300), threading.Event()
    consumer = Consumer(receiver, ticket.stream_id)
    consumer.on_complete = lambda stats: done.set()  # type: ignore[method-assign]
    deaths: list[int] = []
    died = threading.Event()
    run_posted = endpoint._run_posted  # type: ignore[attr-defined]

    def dying(*arguments: Any) -> None:
        run_posted(*arguments)
        if 16 * len(deaths) < consumer.num_rows < 300 and len(deaths) < 3:
            deaths.append(consumer.num_rows)
            died.set()
            raise RuntimeError("the loop dies here")

    monkeypatch.setattr(endpoint, "_run_posted", dying)
    service.start()
    sending.start()
    try:
        receiver.open(ticket, consumer)
        stream = sender.open(ticket, endpoint.address, endpoint.public_key, PLANES)
        stream.announce(300)
        for row in range(0, 300, 50):
            if row == 150:  # the rest is written once the loop has died in the middle
                assert died.wait(60)
            stream.write(row, {name: rows[row : row + 50].clone() for name, rows in data.items()})
        assert done.wait(60)
        stream.result(60)
        assert deaths and endpoint.stats()["loop_restarts"] == len(deaths)
        assert all(torch.equal(consumer.tensor(name), rows) for name, rows in data.items())
        assert receiver.stats()["transfer_blocks_in_use"] == 0
    finally:
        sending.close()
        service.close()
