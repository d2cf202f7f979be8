"""Many streams with random cancels, crashes, deadlines and cuts in one pair of processes: nothing is left."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from tests.profiles import IS_SOAK
from tests.transfer.processes.content import expected_digest
from tests.transfer.processes.harness import (
    BLOCK_ROWS,
    MODES,
    STEP_S,
    Nursery,
    Peer,
    assert_arrived,
    assert_ledger_zero,
    json_of,
    pass_time_until,
    until,
)
from transfer.chaos.proxy import ChaosProxy
from transfer.protocol.ticket import Ticket

NUM_STREAMS = {mode: 10_000 if IS_SOAK else 300 if mode == "shared memory" else 100 for mode in MODES}
BATCH = 50
MAX_RESIDENT_GROWTH_KIB = 64 * 1024
SHORT_STEP_S = 5.0  # so that what is on its way still comes first
SEED = 77

# fate -> (how often, ends allowed at the sender, ends allowed at the receiver)
LOST = {"StreamTimeout", "PeerLost"}  # the Abort was on a link that was cut
FATES: dict[str, tuple[int, set[str], set[str]]] = {
    "plain": (10, {"complete"}, {"complete"}),
    "sender aborts": (3, {"Cancelled", "complete"}, {"Cancelled", "complete"} | LOST),
    "sender aborts at once": (1, {"Cancelled"}, {"Cancelled"} | LOST),
    "receiver closes": (3, {"Cancelled", "complete"}, {"closed", "complete"}),
    "receiver closes at once": (1, {"Cancelled", "complete"}, {"closed", "complete"}),
    "consumer crashes": (3, {"InternalError"}, {"InternalError"}),
    "sender's deadline": (1, {"StreamTimeout"}, {"StreamTimeout"}),
    "receiver's deadline": (1, {"StreamTimeout"}, {"StreamTimeout"}),
}
DEADLINE_S = 0.3


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One stream and what is to happen to it."""

    ticket: Ticket
    fate: str
    seed: int
    total_rows: int
    at_row: int

    def expected(self) -> dict[str, Any]:
        names = {"receiver closes": "close_at", "consumer crashes": "crash_at"}
        fate = {names[self.fate]: self.at_row} if self.fate in names else {}
        options = {"deadline_s": DEADLINE_S} if self.fate == "receiver's deadline" else {}
        return {"ticket": json_of(self.ticket), "fate": fate, "options": options}

    def sent(self, address: str) -> dict[str, Any]:
        values = {"ticket": json_of(self.ticket), "address": address, "seed": self.seed, "total_rows": self.total_rows}
        if self.fate == "sender aborts":
            return values | {"write": self.at_row, "abort": "the test asks for it"}
        if self.fate == "sender aborts at once":
            return values | {"write": 0, "abort": "at once"}
        if self.fate.endswith("deadline"):
            values |= {
                "write": self.at_row,
                "options": {"deadline_s": DEADLINE_S} if self.fate.startswith("sender") else {},
            }
        return values


def make_plan(rng: random.Random, number: int) -> Plan:
    (fate,) = rng.choices(list(FATES), [weight for weight, _, _ in FATES.values()])
    total_rows = rng.choice([1, 15, 16, 17, 100, 333, 640])
    return Plan(ticket=Ticket.issue("soak"), fate=fate, seed=number, total_rows=total_rows, at_row=rng.randrange(total_rows))  # fmt: skip  # noqa: E501


def run_batch(
    receiver: Peer,
    sender: Peer,
    proxy: ChaosProxy,
    plans: list[Plan],
    rng: random.Random,
    dead: Ticket | None = None,
) -> None:
    """Run streams at once, with the link cut in their midst, and check how each ended.

    `dead`: of a stream whose sender died; the receiver is told, as nobody waits here until it notices by itself.
    """
    ids = [plan.ticket.stream_id for plan in plans]
    late = rng.random() < 0.3  # the sender may be first
    if not late:
        receiver.ask("expect", streams=[plan.expected() for plan in plans])
    sender.ask("send", streams=[plan.sent(proxy.address) for plan in plans])
    if late:
        receiver.ask("expect", streams=[plan.expected() for plan in plans])
    for plan in plans:
        if plan.fate == "receiver closes at once":
            receiver.ask("end", stream_id=plan.ticket.stream_id, side="receiver")
    if rng.random() < 0.3:
        until(lambda: proxy.counts()["links_open"] > 0, "link to cut")
        proxy.cut()
    if dead is not None:
        receiver.ask("sender_lost", stream_id=dead.stream_id)
    ends: tuple[list[dict[str, Any]], ...] = ([], [])

    def are_over() -> bool:
        ends[0][:] = sender.ask("produced", stream_ids=ids)["streams"]
        ends[1][:] = receiver.ask("consumed", stream_ids=ids)["streams"]
        is_sent, is_received = (all(end["end"] is not None for end in side) for side in ends)
        if is_sent and not is_received:  # the last word of some senders was lost: the receiver goes by their silence
            receiver.ask("advance", seconds=SHORT_STEP_S)
        return is_sent and is_received

    try:
        until(are_over, "end of every stream of the batch")
    except AssertionError as error:
        running = [(p, s, r) for p, s, r in zip(plans, *ends, strict=True) if s["end"] is None or r["end"] is None]
        stats = [peer.ask("stats") for peer in (receiver, sender)]
        raise AssertionError(f"{error}: {running}\nreceiver: {stats[0]}\nsender: {stats[1]}") from None
    for plan, sent, received in zip(plans, *ends, strict=True):
        _, at_sender, at_receiver = FATES[plan.fate]
        assert sent["end"] in at_sender and received["end"] in at_receiver, (plan, sent, received)
        assert received["wrong"] is None, (plan, received)
        assert received["digest"] == expected_digest(plan.seed, received["rows"]), f"wrong rows: {plan}"
        if received["end"] == "complete":
            assert received["rows"] == plan.total_rows
    for peer in (receiver, sender):
        peer.ask("forget", stream_ids=ids)


def kill_a_sender(nursery: Nursery, receiver: Peer, number: int) -> Ticket:
    """A third process dies in the middle of its stream."""
    victim = nursery.peer("victim")
    ticket = Ticket.issue("victim")
    receiver.expect(ticket)
    victim.send(ticket, receiver.address, number, 1000, write=500)
    until(lambda: receiver.consumed(ticket.stream_id)["rows"] >= 16 * BLOCK_ROWS, "first rows of the victim")
    victim.kill()
    return ticket


def assert_lost(receiver: Peer, ticket: Ticket) -> None:
    """No other stream is open now: time may pass."""
    pass_time_until(receiver, lambda: receiver.consumed(ticket.stream_id)["end"], "end of a dead sender's stream")
    assert receiver.consumed(ticket.stream_id)["end"] in LOST


def inventories(receiver: Peer, sender: Peer, proxy: ChaosProxy) -> list[dict[str, Any]]:
    """What each process holds right after a stream: with its link up, however long nothing went over it before."""
    ticket = Ticket.issue("inventory")
    receiver.expect(ticket)
    sender.send(ticket, proxy.address, 1, 500)
    assert_arrived(receiver, ticket, 1, 500)
    until(lambda: sender.produced(ticket.stream_id)["end"] == "complete", "end at the sender")
    return [peer.ask("inventory") for peer in (receiver, sender)]


def shares_memory(receiver: Peer, sender: Peer, proxy: ChaosProxy, baselines: list[dict[str, Any]]) -> bool:
    """Whether the baselines are of streams in shared memory. A sender that could not get it does without for a while,
    and so would have less of everything than later on; then they are taken again.
    """
    if sender.ask("stats")["transfer_segments_mapped"]:
        return True
    baselines[:] = inventories(receiver, sender, proxy)
    return False


def grown_kinds(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Kinds of which there is more. Fewer is no leak: what a dead peer left may have gone since."""
    kinds = [f"tasks: {after['num_tasks']}"] if after["num_tasks"] > before["num_tasks"] else []
    for name in ("descriptors", "shared_mappings", "threads"):
        kinds += [f"{name}: {kind}" for kind in Counter(after[name]) - Counter(before[name])]
    return kinds


def assert_settled(receiver: Peer, sender: Peer, proxy: ChaosProxy, baselines: list[dict[str, Any]]) -> None:
    """Nothing is there that was not before: descriptors, shared mappings, threads; memory grew by little."""
    now: list[dict[str, Any]] = []

    def is_settled() -> bool:
        receiver.ask("advance", seconds=STEP_S)  # segments that are kept for a while are given up at last
        now[:] = inventories(receiver, sender, proxy)
        return all(grown_kinds(before, after) == [] for before, after in zip(baselines, now, strict=True))

    try:
        until(is_settled, "old inventory")
    except AssertionError as error:
        raise AssertionError(f"{error}\nbefore: {baselines}\nafter:  {now}") from None
    for peer, before, after in zip((receiver, sender), baselines, now, strict=True):
        grown = after["resident_kib"] - before["resident_kib"]
        assert grown < MAX_RESIDENT_GROWTH_KIB, f"{peer.name} grew by {grown} KiB"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", list(MODES))
def test_streams_with_cancels_crashes_and_cuts_leave_nothing(nursery: Nursery, mode: str) -> None:
    nursery.mode, num_streams = MODES[mode], NUM_STREAMS[mode]
    rng = random.Random(SEED)
    receiver = nursery.peer("receiver", pool_tokens=64 * BLOCK_ROWS)
    sender = nursery.peer("sender", idle_timeout_s=3600.0)  # so that its link is the same before and after
    with ChaosProxy("127.0.0.1:0", receiver.address) as proxy:
        lost = [kill_a_sender(nursery, receiver, 0)]
        run_batch(receiver, sender, proxy, [make_plan(rng, number) for number in range(BATCH)], rng)
        assert_lost(receiver, lost[0])
        assert_ledger_zero(receiver, sender)
        baselines = inventories(receiver, sender, proxy)
        if mode == "shared memory":
            pass_time_until(sender, lambda: shares_memory(receiver, sender, proxy, baselines), "segment in use")
        seen: set[str] = set()
        for start in range(0, num_streams, BATCH):
            plans = [make_plan(rng, BATCH + start + number) for number in range(BATCH)]
            seen |= {plan.fate for plan in plans}
            dead = kill_a_sender(nursery, receiver, start) if start % (num_streams // 3) < BATCH else None
            lost += [] if dead is None else [dead]
            run_batch(receiver, sender, proxy, plans, rng, dead)
        for ticket in lost:
            assert_lost(receiver, ticket)
        assert_ledger_zero(receiver, sender)
        assert seen == set(FATES) and proxy.counts()["cut"] > num_streams // BATCH // 10
        assert_settled(receiver, sender, proxy, baselines)
    stats = receiver.ask("stats")
    assert stats["handler_errors"] == 0 and stats["transfer_streams_completed_total"] > num_streams // 3
