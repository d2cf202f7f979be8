"""The lifeline of a segment is cut between processes that both live: the segment is given up, the rows still arrive."""

from __future__ import annotations

import pytest

from tests.transfer.processes.harness import (
    BLOCK_ROWS,
    MODES,
    Nursery,
    assert_arrived,
    assert_ledger_zero,
    json_of,
    ticket_of,
    until,
)
from transfer.memory.segments import is_supported
from transfer.protocol.ticket import Ticket

pytestmark = pytest.mark.skipif(not is_supported(), reason="this system has no sealed memory files")

TOTAL_ROWS, SEED = 1000, 11
KEY = "media 1, model 1"


@pytest.mark.parametrize("share", (0.1, 0.5, 0.9))
def test_a_cut_lifeline_costs_the_segment_and_another_sender_goes_on(nursery: Nursery, share: float) -> None:
    nursery.mode = MODES["shared memory"]
    receiver, first, second = nursery.peer("receiver"), nursery.peer("first"), nursery.peer("second")
    ticket, written = Ticket.issue("test"), int(TOTAL_ROWS * share)
    receiver.expect(ticket, options={"take_over_s": 600.0})
    first.send(ticket, receiver.address, SEED, TOTAL_ROWS, write=written, content_key=KEY)
    stored = written // BLOCK_ROWS * BLOCK_ROWS
    until(lambda: receiver.consumed(ticket.stream_id)["rows"] == stored, f"first {stored} rows")
    assert first.ask("cut_lifelines") == {"cut": 1}
    until(lambda: first.produced(ticket.stream_id)["end"] is not None, "end of the epoch at its sender")
    assert first.produced(ticket.stream_id)["end"] == "TicketRejected"
    assert receiver.ask("stats")["transfer_segments_abandoned_total"] == 1
    following = ticket_of(receiver.ask("reissue", stream_id=ticket.stream_id)["ticket"])
    stream = {"ticket": json_of(following), "address": receiver.address, "seed": SEED, "total_rows": TOTAL_ROWS}
    assert second.ask("take_over", stream=stream | {"content_key": KEY})["first_row"] == stored
    assert assert_arrived(receiver, ticket, SEED, TOTAL_ROWS)["restarts"] == 0
    again = Ticket.issue("again")
    receiver.expect(again)
    first.send(again, receiver.address, SEED + 1, TOTAL_ROWS)
    assert_arrived(receiver, again, SEED + 1, TOTAL_ROWS)
    assert_ledger_zero(receiver, first, second)
    until(lambda: receiver.ask("stats")["transfer_slots_fenced"] == 0, "release of every slot")


def test_a_stream_without_another_sender_ends_with_its_lifeline(nursery: Nursery) -> None:
    nursery.mode = MODES["shared memory"]
    receiver, sender = nursery.peer("receiver"), nursery.peer("sender")
    ticket = Ticket.issue("test")
    receiver.expect(ticket)
    sender.send(ticket, receiver.address, SEED, TOTAL_ROWS, write=TOTAL_ROWS // 2)
    until(lambda: receiver.consumed(ticket.stream_id)["rows"] > 0, "first rows")
    assert sender.ask("cut_lifelines") == {"cut": 1}
    until(lambda: receiver.consumed(ticket.stream_id)["end"] is not None, "end at the receiver")
    assert receiver.consumed(ticket.stream_id)["end"] == "PeerLost"
    assert_ledger_zero(receiver, sender)
