"""Real processes over real sockets: the link is cut anywhere, dies, stalls or carries wrong bytes; the rows arrive.

Every case proves that its fault fired. A receiver, a sender and their streams live in processes of their own; the chaos
proxies are this process's, except where one is killed.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.profiles import IS_SOAK
from tests.transfer.processes.content import ROW_BYTES
from tests.transfer.processes.harness import (
    BLOCK_ROWS,
    CREDIT,
    STEP_S,
    Nursery,
    Peer,
    assert_arrived,
    assert_ledger_zero,
    assert_sent,
    run_until_cut,
    until,
)
from tests.transfer.processes.zmtp import BlockTap
from transfer.chaos.proxy import ChaosProxy, Faults
from transfer.protocol.messages import Block
from transfer.protocol.ticket import Ticket

NUM_BLOCKS = 40
TOTAL_ROWS = NUM_BLOCKS * BLOCK_ROWS - 5  # the last block is not full
SHARES = (0.1, 0.5, 0.9)
SEED = 20_26


class Case:
    """One stream through one proxy of its own."""

    def __init__(self, receiver: Peer, number: int, listen: str, faults: Faults | None = None, cut_index: int = -1):
        self.seed, self.ticket = SEED + number, Ticket.issue("test")
        self.cut_index = cut_index
        self.tap = BlockTap(self._should_cut)
        is_legible = faults is None or not faults.corrupt
        self.proxy = ChaosProxy(
            listen, receiver.address, faults, seed=self.seed, watch=self.tap if is_legible else None
        )

    def _should_cut(self, block: Block) -> bool:
        return block.index == self.cut_index and self.tap.passed[block.stream_id, block.index] == 1


@pytest.fixture(params=["tcp", "ipc"])
def listen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """How services and proxies are bound: formatted with a name."""
    if request.param == "tcp":
        yield "tcp://127.0.0.1:0#{}"
    else:
        folder = tmp_path / "s"
        folder.mkdir(mode=0o700)
        yield f"ipc://{folder}/{{}}"


def bind(listen: str, name: object) -> str:
    return listen.format(name).split("#")[0]


def run(receiver: Peer, sender: Peer, cases: list[Case], total_rows: int = TOTAL_ROWS) -> None:
    """Run the streams of all cases at once, and see each arrive whole."""
    for case in cases:
        receiver.expect(case.ticket)
    for case in cases:
        sender.send(case.ticket, case.proxy.address, case.seed, total_rows)
    for case in cases:
        assert_arrived(receiver, case.ticket, case.seed, total_rows)
    assert_ledger_zero(receiver, sender)


def assert_one_window_resent(sender: Peer, case: Case, num_faults: int = 1) -> None:
    report = assert_sent(sender, case.ticket)
    assert report["resent"] <= CREDIT * num_faults, f"{report['resent']} blocks were sent again"
    again = sum(count - 1 for count in case.tap.passed.values())
    assert again <= CREDIT * num_faults, f"{again} blocks passed again: {case.tap.passed}"


def test_the_link_is_cut_at_every_block_boundary(nursery: Nursery, listen: str) -> None:
    receiver, sender = nursery.peer("receiver", bind(listen, "r")), nursery.peer("sender", bind(listen, "s"))
    indexes = range(NUM_BLOCKS) if IS_SOAK or listen.startswith("tcp") else range(0, NUM_BLOCKS, 5)
    with contextlib.ExitStack() as stack:
        cases = [Case(receiver, index, bind(listen, index), cut_index=index) for index in indexes]
        for case in cases:
            stack.enter_context(case.proxy)
        run(receiver, sender, cases)
        for case in cases:
            counts = case.proxy.counts()
            assert counts["watch"] == counts["cut"] == 1, f"the cut after block {case.cut_index} did not happen"
            assert_one_window_resent(sender, case)


def test_the_link_is_cut_at_random_byte_offsets(nursery: Nursery, listen: str) -> None:
    receiver, sender = nursery.peer("receiver", bind(listen, "r")), nursery.peer("sender", bind(listen, "s"))
    clean = Case(receiver, 0, bind(listen, "clean"))
    with clean.proxy:
        run(receiver, sender, [clean])
    num_bytes = clean.tap.bytes_up
    assert num_bytes > TOTAL_ROWS * ROW_BYTES and set(clean.tap.passed.values()) == {1}
    offsets = random.Random(SEED).sample(range(1, num_bytes + 1), 200)
    offsets = sorted(offsets if IS_SOAK else offsets[:32])
    for start in range(0, len(offsets), 40):
        with contextlib.ExitStack() as stack:
            cases = [
                Case(
                    receiver,
                    1 + start + number,
                    bind(listen, start + number),
                    Faults(cut_after_bytes=offset, direction="up"),
                )
                for number, offset in enumerate(offsets[start : start + 40])
            ]
            for case in cases:
                stack.enter_context(case.proxy)
            run(receiver, sender, cases)
            for case in cases:
                run_until_cut(receiver, sender, case.proxy, case.seed)
                assert_one_window_resent(sender, case)


@pytest.mark.parametrize("share", SHARES)
def test_the_proxy_is_killed_and_another_takes_its_place(nursery: Nursery, share: float) -> None:
    receiver, sender = nursery.peer("receiver"), nursery.peer("sender")
    first, second = nursery.process("first proxy"), nursery.process("second proxy")
    address = first.ask("relay", listen="127.0.0.1:0", upstream=receiver.address, faults={})["address"]
    ticket, written = Ticket.issue("test"), int(TOTAL_ROWS * share)
    receiver.expect(ticket)
    sender.send(ticket, address, SEED, TOTAL_ROWS, write=written)
    stored = written // BLOCK_ROWS * BLOCK_ROWS
    until(lambda: receiver.consumed(ticket.stream_id)["rows"] == stored, f"first {stored} rows")
    first.kill()
    sender.ask("write", stream_id=ticket.stream_id, first_row=written, until=TOTAL_ROWS)
    second.ask("relay", listen=address, upstream=receiver.address, faults={})
    assert_arrived(receiver, ticket, SEED, TOTAL_ROWS)
    assert second.ask("relayed")["bytes_up"] > 0
    assert_ledger_zero(receiver, sender)
    assert assert_sent(sender, ticket)["resent"] <= CREDIT


def begin(receiver: Peer, sender: Peer, case: Case, share: float) -> int:
    """Write a share of the case's rows, and see every whole block of them reach the consumer. How many were written."""
    written = int(TOTAL_ROWS * share)
    receiver.expect(case.ticket)
    sender.send(case.ticket, case.proxy.address, case.seed, TOTAL_ROWS, write=written)
    stored = written // BLOCK_ROWS * BLOCK_ROWS
    until(lambda: receiver.consumed(case.ticket.stream_id)["rows"] == stored, f"first {stored} rows")
    return written


@pytest.mark.parametrize("peer_timeout_s", [60.0, 0.6], ids=["link stays", "link is given up"])
@pytest.mark.parametrize("share", SHARES)
def test_a_stopped_and_woken_receiver_goes_on(nursery: Nursery, share: float, peer_timeout_s: float) -> None:
    receiver, sender = nursery.peer("receiver"), nursery.peer("sender", peer_timeout_s=peer_timeout_s)
    case = Case(receiver, 0, "127.0.0.1:0")
    with case.proxy:
        written = begin(receiver, sender, case, share)
        receiver.stop()
        probes, links = case.tap.num_probes, case.proxy.counts()["links"]
        sender.ask("write", stream_id=case.ticket.stream_id, first_row=written, until=TOTAL_ROWS)
        if peer_timeout_s < 1:
            until(lambda: case.proxy.counts()["links"] > links, "new link to the stopped receiver")
        else:
            until(lambda: case.tap.num_probes >= probes + 3, "probes for the stopped receiver")
        receiver.wake()
        assert_arrived(receiver, case.ticket, case.seed, TOTAL_ROWS)
        assert_ledger_zero(receiver, sender)
        assert_one_window_resent(sender, case, num_faults=max(1, case.proxy.counts()["links"] - 1))


@pytest.mark.parametrize("share", SHARES)
def test_a_stopped_and_woken_sender_goes_on_and_slows_no_other(nursery: Nursery, share: float) -> None:
    receiver, sender, other = (nursery.peer(name) for name in ("receiver", "sender", "other sender"))
    case = Case(receiver, 0, "127.0.0.1:0")
    with case.proxy:
        written = begin(receiver, sender, case, share)
        sender.stop()
        ticket = Ticket.issue("other")
        receiver.expect(ticket)
        other.send(ticket, receiver.address, SEED, TOTAL_ROWS)
        assert_arrived(receiver, ticket, SEED, TOTAL_ROWS)
        assert receiver.consumed(case.ticket.stream_id)["end"] is None
        sender.wake()
        sender.ask("write", stream_id=case.ticket.stream_id, first_row=written, until=TOTAL_ROWS)
        assert_arrived(receiver, case.ticket, case.seed, TOTAL_ROWS)
        assert_ledger_zero(receiver, sender, other)
        assert_one_window_resent(sender, case)


def test_a_half_open_link_is_noticed_and_made_anew(nursery: Nursery) -> None:
    receiver, sender = nursery.peer("receiver"), nursery.peer("sender", peer_timeout_s=0.6)
    size = NUM_BLOCKS // 2 * BLOCK_ROWS * ROW_BYTES
    case = Case(receiver, 0, "127.0.0.1:0", Faults(cut_after_bytes=size, direction="up", half_open=True))
    with case.proxy:
        run(receiver, sender, [case])
        counts = case.proxy.counts()
    assert counts["half_open"] == 1 and counts["links"] >= 2 and counts["bytes_swallowed"] > 0
    assert sender.ask("stats")["connections_renewed"] >= 1


def test_slow_and_breaking_links(nursery: Nursery) -> None:
    receiver, sender = nursery.peer("receiver"), nursery.peer("sender")
    kinds = [
        Faults(delay_ms=20, jitter_ms=15, segment_bytes=1000),
        Faults(throttle_bytes_per_s=200_000),
        Faults(cut_every_bytes=30_000),
        Faults(cut_every_bytes=30_000, reset=True),
        Faults(drop=0.07, segment_bytes=2000),
        Faults(drop=0.07, delay_ms=5, jitter_ms=5, cut_every_bytes=12_000, segment_bytes=1500),
    ]
    with contextlib.ExitStack() as stack:
        cases = [Case(receiver, number, "127.0.0.1:0", faults) for number, faults in enumerate(kinds)]
        for case in cases:
            stack.enter_context(case.proxy)
        run(receiver, sender, cases)
        for case in cases:
            assert not case.proxy.never_fired(), case.proxy.counts()
            assert_one_window_resent(sender, case, num_faults=case.proxy.counts()["cut"])


def test_corrupted_links_never_give_wrong_rows(nursery: Nursery) -> None:
    receiver, sender = nursery.peer("receiver"), nursery.peer("sender", peer_timeout_s=0.6)
    num_fired = 0
    with contextlib.ExitStack() as stack:
        faults = Faults(corrupt=0.1, segment_bytes=2000, direction="up")
        cases = [Case(receiver, number, "127.0.0.1:0", faults) for number in range(16)]
        for case in cases:
            stack.enter_context(case.proxy)
            receiver.expect(case.ticket)
            sender.send(case.ticket, case.proxy.address, case.seed, TOTAL_ROWS)
        ids = [case.ticket.stream_id for case in cases]

        def are_over() -> bool:
            is_sent, is_received = (
                all(report["end"] is not None for report in peer.ask(what, stream_ids=ids)["streams"])
                for peer, what in ((sender, "produced"), (receiver, "consumed"))
            )
            if is_sent and not is_received:  # the last word of some came damaged: the receiver goes by their silence
                receiver.ask("advance", seconds=STEP_S)
            return is_sent and is_received

        until(are_over, "end of every stream")
        ends: list[str] = []
        for case in cases:
            report = receiver.consumed(case.ticket.stream_id)
            ends.append(report["end"])
            assert report["wrong"] is None
            if report["end"] == "complete":
                assert_arrived(receiver, case.ticket, case.seed, TOTAL_ROWS)
            num_fired += case.proxy.counts()["corrupt"]
        assert_ledger_zero(receiver, sender)
    stats = receiver.ask("stats")
    assert num_fired > 10 and stats["transfer_dropped_bad_tag"] > 3, (num_fired, stats)
    assert ends.count("complete") > 0, ends
