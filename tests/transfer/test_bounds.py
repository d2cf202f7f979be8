"""What a peer can make an end remember or do is bounded, and whatever fails on the way ends its stream for both."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable

import pytest

from tests.transfer.test_sessions import TICKET, opened
from tests.transfer.test_streams import configure
from tests.transfer.virtual import PLANES, Consumer, Pair, VirtualEndpoint, make_rows
from transfer.connection import Connection
from transfer.errors import LocalProtocolError, RemoteProtocolError, StreamAborted
from transfer.protocol import sealing, sender_grants
from transfer.protocol.actions import Failed
from transfer.protocol.messages import Abort, Grant, Open
from transfer.protocol.negotiate import Offer
from transfer.protocol.sender_session import SenderSession
from transfer.protocol.state import SenderState
from transfer.protocol.strays import MAX_PARKED_OPENS, MAX_PARKED_PLANES, Strays
from transfer.protocol.ticket import Ticket
from transfer.tensors import PlaneSpec


def grant(number: int, first_index: int, count: int) -> Grant:
    return Grant(
        stream_id=TICKET.stream_id,
        epoch=1,
        round=number,
        first_index=first_index,
        block_ids=tuple(range(count)),
        allocated_tokens=16 * count,
        block_size=16,
        credit=4,
    )


def refused(session: SenderSession, message: Grant) -> bool:
    actions = session.receive(message, 0.0)
    if session.state is not SenderState.FAILED:
        return False
    failure = actions[-1]
    assert isinstance(failure, Failed) and isinstance(failure.error, RemoteProtocolError)
    return True


def test_no_more_is_granted_than_the_announced_total_needs() -> None:
    session, _ = opened()
    session.announce(100, (), 0.0)  # seven blocks
    assert not refused(session, grant(0, 0, 5))
    assert not refused(session, grant(1, 5, 2))
    assert refused(session, grant(2, 7, 1))


def test_a_first_grant_may_be_larger_than_the_total_for_nobody_knew_it() -> None:
    session, _ = opened()
    session.announce(16, (), 0.0)
    assert not refused(session, grant(0, 0, 50))
    assert refused(session, grant(1, 50, 1))


def test_grants_before_the_announcement_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_grants, "MAX_UNANNOUNCED_BLOCKS", 10)
    session, _ = opened()
    assert not refused(session, grant(0, 0, 6))
    assert not refused(session, grant(1, 6, 4))
    assert refused(session, grant(2, 10, 1))


def test_what_parked_opens_describe_is_bounded_by_planes() -> None:
    connection = Connection(endpoint="here", peer="there", key=b"1", outgoing=False)
    planes = tuple(PlaneSpec(name=f"{i:0128d}", dtype="int8", row_shape=(1,)) for i in range(1024))
    large = Offer(block_size=16, planes=planes, max_frame_bytes=1 << 20, credit=1)
    small = Offer(block_size=16, planes=PLANES, max_frame_bytes=1 << 20, credit=1)

    def open_of(offer: Offer) -> Open:
        stream_id = secrets.token_hex(16)
        return Open(stream_id=stream_id, epoch=1, proof=b"x" * 32, nonce=b"n" * 16, offer=offer, content_key="")

    dropped: Counter[str] = Counter()
    strays = Strays(dropped)
    for _ in range(100):
        strays.answer(connection, open_of(large), 0.0)
        assert strays.num_parked * 1024 <= MAX_PARKED_PLANES
    assert strays.num_parked == MAX_PARKED_PLANES // 1024 and dropped["unknown_stream"] == 100 - strays.num_parked
    strays.expire(1e9)
    assert strays.num_parked == 0
    for _ in range(MAX_PARKED_OPENS):
        strays.answer(connection, open_of(small), 0.0)
    assert strays.num_parked == MAX_PARKED_OPENS, "what went makes room again"


def test_the_end_of_a_key_ends_the_stream_at_both_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "MAX_SERIAL", 3)
    monkeypatch.setattr(VirtualEndpoint, "encrypted", True)
    pair = Pair(configure(16, 128, 8))
    stream, consumer, _ = pair.transfer(160)
    pair.network.settle()
    with pytest.raises(LocalProtocolError, match="new stream"):
        stream.result(0)
    assert len(consumer.ends) == 1 and isinstance(consumer.ends[0], Exception)
    pair.assert_ledger_zero()


@pytest.mark.parametrize("moment", ["frames", "release"])
def test_an_error_while_sending_ends_its_own_stream_only(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(configure(16, 128, 8))
    ticket = Ticket.issue("broken")
    consumer, stream = pair.listen(ticket), pair.send(ticket)

    def broken(*arguments: object) -> None:
        raise RuntimeError("not to be shown to peers")

    monkeypatch.setattr(stream.rows, moment, broken)
    stream.announce(100)
    stream.write(0, make_rows(100))
    pair.network.settle()
    with pytest.raises(StreamAborted, match="RuntimeError") as error:
        stream.result(0)
    assert error.value.code == "InternalError"
    pair.network.settle()
    assert len(consumer.ends) == 1
    assert not any("not to be shown" in m.message for _, _, m, _ in pair.network.log if isinstance(m, Abort))
    _, other, _ = pair.transfer(100)
    pair.network.settle()
    assert other.num_rows == 100
    pair.assert_ledger_zero()


def test_a_listener_that_aborts_at_once_is_never_called() -> None:
    pair = Pair(configure(16, 32, 8))
    ticket = Ticket.issue("early")
    stream = pair.send(ticket)
    pair.network.settle()
    stream.abort("BadImage", "image 0 is broken")
    pair.network.settle()  # the Open and the Abort wait for the ticket
    consumer = Consumer(pair.receiver, ticket.stream_id)
    pair.receiver.open(ticket, consumer)
    pair.receiver.abort(ticket.stream_id, "Cancelled", "gave up")
    pair.network.settle()
    assert consumer.ends == []
    pair.assert_ledger_zero()


def test_who_proves_nothing_takes_no_ones_place_at_a_stream_that_lost_its_sender() -> None:
    pair = Pair(configure(16, 32, 8))
    ticket = Ticket.issue("taken over")
    pair.listen(ticket, take_over_s=30.0)
    stream = pair.send(ticket)
    pair.network.settle()
    connection = pair.receiver._streams.by_id[ticket.stream_id].connection
    assert pair.reissue(ticket.stream_id) is not None
    stranger = pair.another_sender("virtual://stranger")
    forged = Ticket(stream_id=ticket.stream_id, epoch=2, owner="stranger", secret=b"x" * 16)
    refusal = pair.send(forged, sender=stranger)
    pair.network.settle()
    with pytest.raises(Exception, match="not valid here"):
        refusal.result(0)
    lost = pair.receiver._streams.by_id[ticket.stream_id]
    assert lost.connection is None and lost.former == connection
    with pytest.raises(Exception, match="epoch 1"):
        stream.result(0)
    pair.receiver.close(ticket.stream_id)
    pair.network.settle()
    pair.assert_ledger_zero()


@pytest.mark.parametrize("admitted", [True, False])
def test_what_was_given_up_never_completes(admitted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rows come after the consumer left, and before the I/O thread has heard of it."""
    pair = Pair(configure(16, 64, 8))
    ticket, data = Ticket.issue("test"), make_rows(40)
    consumer, stream = pair.listen(ticket, admit=admitted), pair.send(ticket)
    stream.announce(40)
    stream.write(0, {name: rows[:39] for name, rows in data.items()})
    pair.network.settle()
    late: list[Callable[[], None]] = []
    with monkeypatch.context() as patch:
        patch.setattr(pair.receiver_service, "post", late.append)
        if not admitted:
            pair.receiver.admit(ticket.stream_id)
        pair.receiver.abort(ticket.stream_id, "Cancelled", "no longer wanted")
    stream.write(39, {name: rows[39:] for name, rows in data.items()})
    if not admitted:
        late.pop(0)()
    pair.network.settle()
    for callback in late:
        callback()
    pair.network.settle()
    with pytest.raises(StreamAborted, match="no longer wanted"):
        stream.result(0)
    assert not consumer.ends and pair.receiver.stats().get("transfer_streams_completed_total", 0) == 0
    assert pair.receiver.stats()["transfer_blocks_in_use"] == pair.receiver.stats()["transfer_tickets_open"] == 0
