"""An encrypted link is cut at any byte, either way, in its handshake too: the rows arrive, at most a window twice."""

from __future__ import annotations

import contextlib
import random

from tests.profiles import IS_SOAK
from tests.transfer.processes.harness import (
    BLOCK_ROWS,
    CONFIG,
    CREDIT,
    Nursery,
    Peer,
    assert_arrived,
    assert_ledger_zero,
    assert_sent,
    run_until_cut,
)
from transfer.chaos.proxy import ChaosProxy, Faults
from transfer.protocol.ticket import Ticket

TOTAL_ROWS = 20 * BLOCK_ROWS - 5
SEED = 20_26
NUM_OFFSETS = 100 if IS_SOAK else 8  # each way


class Link:
    """One stream whose encrypted link goes through a proxy; its sealed payload does not."""

    def __init__(self, receiver: Peer, number: int, faults: Faults | None = None) -> None:
        self.seed, self.ticket = SEED + number, Ticket.issue("test")
        self.proxy = ChaosProxy("127.0.0.1:0", receiver.address, faults, seed=self.seed)


def run(receiver: Peer, sender: Peer, key: str, links: list[Link]) -> None:
    for link in links:
        receiver.expect(link.ticket)
        sender.send(link.ticket, link.proxy.address, link.seed, TOTAL_ROWS, public_key=key)
    for link in links:
        assert_arrived(receiver, link.ticket, link.seed, TOTAL_ROWS)
    assert_ledger_zero(receiver, sender)


def test_an_encrypted_link_is_cut_at_byte_offsets(nursery: Nursery) -> None:
    keys: dict[str, str] = {}
    receiver, sender = nursery.process("receiver"), nursery.process("sender")
    for peer in (receiver, sender):
        answer = peer.ask("open", address="tcp://127.0.0.1:0", config=CONFIG, curve=True)
        peer.address, keys[peer.name] = answer["address"], answer["public_key"]
    receiver.ask("allow", public_keys=[keys["sender"]])
    clean = Link(receiver, 0)
    with clean.proxy:
        run(receiver, sender, keys["receiver"], [clean])
        counts = clean.proxy.counts()
    dice = random.Random(SEED)
    faults = [
        Faults(cut_after_bytes=offset, direction=way)  # type: ignore[arg-type]
        for way in ("up", "down")
        for offset in sorted(dice.sample(range(1, counts[f"bytes_{way}"] + 1), NUM_OFFSETS))
    ]
    for start in range(0, len(faults), 20):
        with contextlib.ExitStack() as stack:
            links = [Link(receiver, 1 + start + n, fault) for n, fault in enumerate(faults[start : start + 20])]
            for link in links:
                stack.enter_context(link.proxy)
            run(receiver, sender, keys["receiver"], links)
            for link in links:
                assert assert_sent(sender, link.ticket)["resent"] <= CREDIT
                run_until_cut(receiver, sender, link.proxy, link.seed, public_key=keys["receiver"])
    assert receiver.ask("stats")["transfer_blocks_received_total"] >= 20 * (1 + len(faults))
