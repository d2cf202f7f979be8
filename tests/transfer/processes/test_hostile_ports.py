"""Strangers at every port of live processes: dropped, counted, nothing executed, and the streams under way arrive."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.transfer.hostile import (
    Attacker,
    Frames,
    assert_bombs_are_live,
    forged_messages,
    listening_addresses,
    malformed_messages,
)
from tests.transfer.processes.harness import BLOCK_ROWS, Nursery, Peer, assert_arrived, held, until
from tests.transfer.processes.zmtp import ZmtpReader
from transfer.chaos.proxy import ChaosProxy, Direction
from transfer.protocol.messages import Abort
from transfer.protocol.ticket import Ticket
from transfer.protocol.wire import MAX_HEADER_BYTES

TOTAL_ROWS = 1000
WRITTEN = 500


class Recorder:
    """A watch that keeps what passes upwards, message by message."""

    def __init__(self) -> None:
        self.messages: list[list[bytes]] = []
        self._reader = ZmtpReader()

    def __call__(self, link: int, direction: Direction, data: bytes) -> None:
        if direction is Direction.UP:
            for _ in self._reader.feed(data):
                self.messages.append(self._reader.last_frames)


def attack(peer: Peer, address: str, bombs: Path, forged: list[Frames]) -> None:
    """Everything a stranger can send, to one port; each message is counted."""
    malformed = malformed_messages(bombs)
    malformed_before = peer.ask("stats")["dropped_malformed"]
    counts = [dropped(peer)]
    with Attacker(address) as attacker:
        assert attacker.volley(malformed) == []
        malformed_after = peer.ask("stats")["dropped_malformed"]
        counts.append(dropped(peer))
        assert {type(answer) for answer in attacker.volley(forged)} <= {Abort}
        counts.append(dropped(peer))
        attacker.raw_bytes(bombs)
        attacker.oversized(4 * MAX_HEADER_BYTES + 1)
        attacker.volley([])
    assert malformed_after - malformed_before == len(malformed)
    assert counts[1] - counts[0] >= len(malformed)  # and what its own streams, going on meanwhile, dropped
    assert counts[2] - counts[1] >= len(forged)
    assert peer.ask("stats")["handler_errors"] == 0


def dropped(peer: Peer) -> int:
    """All messages that a peer dropped and counted."""
    return sum(count for name, count in peer.ask("stats").items() if "dropped" in name)


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_strangers_at_the_ports_of_a_receiver_and_a_sender(nursery: Nursery, tmp_path: Path, transport: str) -> None:
    sockets, bombs = tmp_path / "s", tmp_path / "bombs"
    sockets.mkdir(mode=0o700)
    bombs.mkdir()
    bind = f"ipc://{sockets}/{{}}" if transport == "ipc" else "tcp://127.0.0.1:0"
    receiver, sender = nursery.peer("receiver", bind.format("r")), nursery.peer("sender", bind.format("s"))
    recorder = Recorder()
    tickets = [Ticket.issue("victim") for _ in range(4)]
    with ChaosProxy(bind.format("proxy"), receiver.address, watch=recorder) as proxy:
        for number, ticket in enumerate(tickets):
            receiver.expect(ticket)
            sender.send(ticket, proxy.address, number, TOTAL_ROWS, write=WRITTEN)
        stored = WRITTEN // BLOCK_ROWS * BLOCK_ROWS
        for ticket in tickets:
            until(lambda ticket=ticket: receiver.consumed(ticket.stream_id)["rows"] == stored, "first half")  # type: ignore[misc]
        overheard = list(recorder.messages)
        assert len(overheard) >= len(tickets) * (2 + stored // BLOCK_ROWS)
        for peer in (receiver, sender):
            addresses = listening_addresses(peer.pid)
            assert peer.address in addresses
            for address in addresses:
                attack(peer, address, bombs, forged_messages([ticket.stream_id for ticket in tickets], overheard))
        for ticket in tickets:
            sender.ask("write", stream_id=ticket.stream_id, first_row=WRITTEN, until=TOTAL_ROWS)
        for number, ticket in enumerate(tickets):
            assert_arrived(receiver, ticket, number, TOTAL_ROWS)
        # the whole conversation once more, now that the streams are over
        with Attacker(receiver.address) as attacker:
            attacker.volley(recorder.messages)
        until(lambda: set(held(receiver)) <= {"opens_parked"}, "nothing but early Opens")
        assert receiver.ask("stats")["handler_errors"] == 0
    assert_bombs_are_live(bombs)
