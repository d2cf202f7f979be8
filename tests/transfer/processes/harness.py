"""The parent's half of the process tests: starting, asking, stopping and killing peers, and waiting with a deadline."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.transfer.processes.content import expected_digest
from tests.waiting import eventually
from transfer.chaos.proxy import ChaosProxy
from transfer.protocol.ticket import Ticket

ROOT = Path(__file__).parents[3]
WAIT_S = 120.0
LEDGER_S = 5.0  # the promise: nothing is held any more so soon after the end
STEP_S = 30.0  # of a clock that is set forward; a stream outlives some of these
MAX_MORE = 200  # streams over a link until it is cut
BLOCK_ROWS = 16
CREDIT = 6
CONFIG: dict[str, Any] = {
    "block_size": BLOCK_ROWS,
    "default_allocate_tokens": 4 * BLOCK_ROWS,
    "pool_tokens": 2048 * BLOCK_ROWS,  # so that no stream has to give back what it was granted, and send it again
    "credit_window_blocks": CREDIT,
    "ping_interval_s": 0.2,
    "peer_timeout_s": 60.0,
    "idle_timeout_s": 120.0,
    "tick_s": 0.01,
    "segment_tokens": 64 * BLOCK_ROWS,
    "shared_memory": False,
}
MODES: dict[str, dict[str, Any]] = {"wire": {}, "shared memory": {"shared_memory": True}, "sealed": {"seal": True}}


def until(condition: Callable[[], Any], what: str, deadline_s: float = WAIT_S) -> None:
    """Poll until true; AssertionError with `what` after `deadline_s`."""
    eventually(condition, f"no {what}", deadline_s)


class Nursery:
    """Starts peers by forking a process that has everything loaded."""

    def __init__(self) -> None:
        self.mode: dict[str, Any] = {}  # settings of every peer that says nothing else
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tests.transfer.processes.nursery", str(theirs.fileno())]
        self._process = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()])
        theirs.close()
        self._peers: list[Peer] = []

    def peer(self, name: str, address: str = "tcp://127.0.0.1:0", **config: Any) -> Peer:
        """A new process with an open service."""
        peer = self.process(name)
        peer.address = peer.ask("open", address=address, config=CONFIG | self.mode | config)["address"]
        return peer

    def process(self, name: str) -> Peer:
        """A new process that has opened nothing yet."""
        ours, theirs = socket.socketpair()
        self._socket.settimeout(WAIT_S)
        socket.send_fds(self._socket, [b"1"], [theirs.fileno()])
        theirs.close()
        pid = int.from_bytes(self._socket.recv(4), "big")
        assert pid, "the nursery is gone"
        peer = Peer(name, pid, ours)
        self._peers.append(peer)
        return peer

    def end_peers(self) -> None:
        """Kill what the test left running."""
        for peer in self._peers:
            peer.kill()
        self._peers.clear()
        self.mode = {}

    def close(self) -> None:
        self.end_peers()
        self._socket.close()
        try:
            code = self._process.wait(WAIT_S)
        finally:
            self._process.kill()
        assert code == 0


class Peer:
    """One process; see `peer` for its commands."""

    def __init__(self, name: str, pid: int, control: socket.socket) -> None:
        self.name, self.pid, self.address = name, pid, ""
        self.is_alive = True
        self._control = control
        self._control.settimeout(WAIT_S)
        self._lines = control.makefile("r", encoding="utf-8")

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """The answer to one command. AssertionError with its reason when it failed or the process is gone."""
        self._control.sendall(json.dumps({"do": do, **values}).encode() + b"\n")
        line = self._lines.readline()
        assert line, f"{self.name} is gone, asked to {do!r}"
        answer: dict[str, Any] = json.loads(line)
        assert "error" not in answer, f"{self.name} failed to {do!r}: {answer['error']}"
        return answer

    def stop(self) -> None:
        """SIGSTOP, and wait until every thread of it stands still."""
        os.kill(self.pid, signal.SIGSTOP)
        until(lambda: self._state() == "T", f"stop of {self.name}")

    def wake(self) -> None:
        assert self._state() == "T", f"{self.name} was not stopped"
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self.is_alive:
            self.is_alive = False
            os.kill(self.pid, signal.SIGKILL)
            until(lambda: not os.path.exists(f"/proc/{self.pid}"), f"end of {self.name}")
            self._lines.close()
            self._control.close()

    def end(self) -> None:
        """Close it in good order and wait until it is gone."""
        self.ask("close")
        self._lines.close()
        self._control.close()
        self.is_alive = False
        until(lambda: not os.path.exists(f"/proc/{self.pid}"), f"end of {self.name}")

    def _state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0]

    # -- shorthands -----------------------------------------------------------------------------------------------

    def consumed(self, stream_id: str) -> dict[str, Any]:
        (report,) = self.ask("consumed", stream_ids=[stream_id])["streams"]
        return dict(report)

    def produced(self, stream_id: str) -> dict[str, Any]:
        (report,) = self.ask("produced", stream_ids=[stream_id])["streams"]
        return dict(report)

    def expect(self, ticket: Ticket, **values: Any) -> None:
        self.ask("expect", streams=[{"ticket": json_of(ticket), **values}])

    def send(self, ticket: Ticket, address: str, seed: int, total_rows: int, **values: Any) -> None:
        stream = {"ticket": json_of(ticket), "address": address, "seed": seed, "total_rows": total_rows, **values}
        self.ask("send", streams=[stream])


def ticket_of(body: dict[str, Any]) -> Ticket:
    """A ticket that a peer sent."""
    return Ticket.from_body(body | {"secret": bytes.fromhex(body["secret"])})


def json_of(ticket: Ticket) -> dict[str, Any]:
    """A ticket as it travels to a peer."""
    return {**ticket.to_body(), "secret": ticket.secret.hex()}


def assert_arrived(receiver: Peer, ticket: Ticket, seed: int, total_rows: int) -> dict[str, Any]:
    """Wait for the end at the receiver: complete and bit-identical."""
    until(lambda: receiver.consumed(ticket.stream_id)["end"] is not None, "end of the stream at the receiver")
    report = receiver.consumed(ticket.stream_id)
    assert report["wrong"] is None, report
    assert (report["end"], report["rows"]) == ("complete", total_rows), report
    assert report["digest"] == expected_digest(seed, total_rows), "the rows differ"
    return report


def held(peer: Peer) -> dict[str, int]:
    """What the ledger of a peer still holds."""
    stats = peer.ask("stats")
    names = ("blocks_in_use", "streams_open", "tickets_open", "opens_parked", "streams_sending")
    ledger = {name: stats[f"transfer_{name}"] for name in names}
    ledger |= {name: stats[name] for name in ("calls_incoming", "calls_outgoing")}
    return {name: count for name, count in ledger.items() if count}


def assert_sent(sender: Peer, ticket: Ticket) -> dict[str, Any]:
    """Wait for the end at the sender, which comes a moment after its ledger is empty: complete."""
    until(lambda: sender.produced(ticket.stream_id)["end"] is not None, "end of the stream at the sender")
    report = sender.produced(ticket.stream_id)
    assert report["end"] == "complete", report
    return report


def run_until_cut(receiver: Peer, sender: Peer, proxy: ChaosProxy, seed: int, **options: Any) -> None:
    """More small streams over a link that is to be cut: there may be fewer bytes to a stream than in the clean run."""
    for _ in range(MAX_MORE):
        if proxy.counts()["cut"]:
            break
        more = Ticket.issue("more")
        receiver.expect(more)
        sender.send(more, proxy.address, seed, 1, **options)
        assert_arrived(receiver, more, seed, 1)
        assert assert_sent(sender, more)["resent"] <= CREDIT
    until(lambda: proxy.counts()["cut"] == 1, "cut")


def pass_time_until(peer: Peer, condition: Callable[[], Any], what: str) -> None:
    """Set the clock of one peer forward, again and again, until what it does after a long time has happened."""

    def has_happened() -> bool:
        if condition():
            return True
        peer.ask("advance", seconds=STEP_S)
        return False

    until(has_happened, what)


def assert_ledger_zero(*peers: Peer) -> None:
    """Nothing is held any more, within LEDGER_S."""
    left: dict[str, dict[str, int]] = {}

    def is_zero() -> bool:
        left.update({peer.name: held(peer) for peer in peers})
        return not any(left.values())

    try:
        until(is_zero, "ledger of zero", LEDGER_S)
    except AssertionError as error:
        raise AssertionError(f"{error}: {left}") from None
