"""A sender, a receiver or its loop dies in the middle of a stream: take-over or a new start, and the right rows."""

from __future__ import annotations

import pytest

from tests.transfer.processes.harness import (
    BLOCK_ROWS,
    CREDIT,
    MODES,
    Nursery,
    Peer,
    assert_arrived,
    assert_ledger_zero,
    assert_sent,
    held,
    json_of,
    pass_time_until,
    ticket_of,
    until,
)
from transfer.protocol.ticket import Ticket

TOTAL_ROWS = 1000
SEED, OTHER_SEED = 5, 6
SHARES = (0.1, 0.5, 0.9)
KEY = "media 1, model 1"
LOST = {"StreamTimeout", "PeerLost"}  # noticed by its silence, or by the end of its side of shared memory
TAKE_OVER = {"take_over_s": 600.0}


@pytest.fixture(params=list(MODES), autouse=True)
def _mode(request: pytest.FixtureRequest, nursery: Nursery) -> None:
    """Every way that payload travels."""
    nursery.mode = MODES[request.param]


def start(receiver: Peer, sender: Peer, written: int, content_key: str = KEY) -> tuple[Ticket, int]:
    """A stream of which so many rows are written, and all whole blocks of them are with the consumer; these rows."""
    ticket = Ticket.issue("test")
    receiver.expect(ticket, options=TAKE_OVER)
    sender.send(ticket, receiver.address, SEED, TOTAL_ROWS, write=written, content_key=content_key)
    stored = written // BLOCK_ROWS * BLOCK_ROWS
    until(lambda: receiver.consumed(ticket.stream_id)["rows"] == stored, f"first {stored} rows")
    return ticket, stored


def next_ticket(receiver: Peer, ticket: Ticket) -> Ticket:
    """The receiver's ticket for another sender."""
    following = ticket_of(receiver.ask("reissue", stream_id=ticket.stream_id)["ticket"])
    assert following.stream_id == ticket.stream_id and following.epoch > ticket.epoch
    assert following.secret != ticket.secret
    return following


def take_over(sender: Peer, ticket: Ticket, address: str, seed: int, content_key: str) -> int:
    """The row at which `sender`, which has computed nothing yet, goes on."""
    stream = {"ticket": json_of(ticket), "address": address, "seed": seed, "total_rows": TOTAL_ROWS}
    answer = sender.ask("take_over", stream=stream | {"content_key": content_key})
    return int(answer["first_row"])


@pytest.mark.parametrize("share", SHARES)
def test_another_sender_goes_on_where_the_dead_one_stopped(nursery: Nursery, share: float) -> None:
    receiver, first, second = nursery.peer("receiver"), nursery.peer("first"), nursery.peer("second")
    ticket, stored = start(receiver, first, int(TOTAL_ROWS * share))
    first.kill()
    receiver.ask("sender_lost", stream_id=ticket.stream_id)
    following = next_ticket(receiver, ticket)
    assert take_over(second, following, receiver.address, SEED, KEY) == stored
    report = assert_arrived(receiver, ticket, SEED, TOTAL_ROWS)
    assert report["restarts"] == 0
    assert_ledger_zero(receiver, second)
    assert assert_sent(second, ticket)["made"] == TOTAL_ROWS - stored, "rows were computed that were there"


@pytest.mark.parametrize("content_key", ["media 1, model 2", ""], ids=["another fingerprint", "no fingerprint"])
@pytest.mark.parametrize("share", SHARES)
def test_a_sender_with_another_fingerprint_starts_from_zero(nursery: Nursery, share: float, content_key: str) -> None:
    receiver, first, second = nursery.peer("receiver"), nursery.peer("first"), nursery.peer("second")
    ticket, stored = start(receiver, first, int(TOTAL_ROWS * share), content_key)
    assert stored
    first.kill()
    following = next_ticket(receiver, ticket)
    other_key = content_key and content_key + "b"
    assert take_over(second, following, receiver.address, OTHER_SEED, other_key) == 0
    report = assert_arrived(receiver, ticket, OTHER_SEED, TOTAL_ROWS)  # of the second sender alone, from row 0
    assert report["restarts"] == 1
    assert_ledger_zero(receiver, second)


def test_a_dead_sender_is_noticed_by_its_silence(nursery: Nursery) -> None:
    receiver, first, second = nursery.peer("receiver"), nursery.peer("first"), nursery.peer("second")
    ticket, stored = start(receiver, first, TOTAL_ROWS // 2)

    def in_use() -> int:
        return int(receiver.ask("stats")["transfer_blocks_in_use"])

    assert in_use() > 0, "nothing is granted that could come back"
    first.kill()
    pass_time_until(receiver, lambda: in_use() == 0, "return of the dead sender's blocks")
    assert receiver.consumed(ticket.stream_id)["end"] is None
    assert take_over(second, next_ticket(receiver, ticket), receiver.address, SEED, KEY) == stored
    assert_arrived(receiver, ticket, SEED, TOTAL_ROWS)
    assert_ledger_zero(receiver, second)


def test_a_sender_that_was_thought_dead_wakes_to_no_effect(nursery: Nursery) -> None:
    receiver, first, second = nursery.peer("receiver"), nursery.peer("first"), nursery.peer("second")
    ticket, stored = start(receiver, first, TOTAL_ROWS // 2)
    first.stop()
    following = next_ticket(receiver, ticket)
    first.wake()
    first.ask("write", stream_id=ticket.stream_id, first_row=TOTAL_ROWS // 2, until=TOTAL_ROWS)
    until(lambda: first.produced(ticket.stream_id)["end"] is not None, "end of the old epoch at its sender")
    assert first.produced(ticket.stream_id)["end"] == "TicketRejected"
    assert receiver.consumed(ticket.stream_id)["rows"] == stored, "rows of the old epoch got in"
    assert take_over(second, following, receiver.address, SEED, KEY) == stored
    assert_arrived(receiver, ticket, SEED, TOTAL_ROWS)
    assert_ledger_zero(receiver, first, second)


def test_a_stream_that_nobody_takes_over_ends(nursery: Nursery) -> None:
    receiver, sender = nursery.peer("receiver"), nursery.peer("sender")
    ticket = Ticket.issue("test")
    receiver.expect(ticket, options=TAKE_OVER)
    sender.send(ticket, receiver.address, SEED, TOTAL_ROWS, write=TOTAL_ROWS // 2, content_key=KEY)
    until(lambda: receiver.consumed(ticket.stream_id)["rows"] > 0, "first rows")
    sender.kill()
    pass_time_until(receiver, lambda: receiver.consumed(ticket.stream_id)["end"], "end of the orphaned stream")
    assert receiver.consumed(ticket.stream_id)["end"] in LOST
    assert receiver.ask("reissue", stream_id=ticket.stream_id)["ticket"] is None
    assert_ledger_zero(receiver)


@pytest.mark.parametrize("share", SHARES)
def test_a_dead_receiver_means_a_new_start_under_a_new_epoch(nursery: Nursery, share: float) -> None:
    first, sender = nursery.peer("first receiver"), nursery.peer("sender")
    ticket, stored = start(first, sender, int(TOTAL_ROWS * share))
    assert stored
    first.kill()
    second = nursery.peer("second receiver", first.address)  # at the same address: the old epoch's probes reach it
    following = ticket.next_epoch()
    second.expect(following, options=TAKE_OVER)
    assert take_over(sender, following, second.address, SEED, KEY) == 0
    report = assert_arrived(second, following, SEED, TOTAL_ROWS)
    assert report["restarts"] == 0
    assert_ledger_zero(second, sender)
    assert_sent(sender, ticket)


def test_streams_to_a_dead_receiver_end(nursery: Nursery) -> None:
    receiver, sender = nursery.peer("receiver"), nursery.peer("sender")
    ticket, _ = start(receiver, sender, TOTAL_ROWS // 2)
    receiver.kill()
    pass_time_until(sender, lambda: not held(sender), "end of a dead receiver's stream")
    until(lambda: sender.produced(ticket.stream_id)["end"] is not None, "news of the end")
    assert sender.produced(ticket.stream_id)["end"] in LOST


@pytest.mark.parametrize("share", SHARES)
def test_a_restarted_receiving_loop_loses_nothing(nursery: Nursery, share: float) -> None:
    receiver, sender = nursery.peer("receiver"), nursery.peer("sender")
    ticket, _ = start(receiver, sender, int(TOTAL_ROWS * share))
    receiver.ask("restart_loop")
    sender.ask("write", stream_id=ticket.stream_id, first_row=int(TOTAL_ROWS * share), until=TOTAL_ROWS)
    receiver.ask("restart_loop")
    report = assert_arrived(receiver, ticket, SEED, TOTAL_ROWS)
    assert report["restarts"] == 0
    assert_ledger_zero(receiver, sender)
    assert assert_sent(sender, ticket)["resent"] <= CREDIT
