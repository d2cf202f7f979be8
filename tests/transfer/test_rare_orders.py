"""Orders of events that are rare on a good network; a simulation found each of them, and each once went wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from tests.transfer.test_sessions import TICKET
from tests.transfer.test_streams import configure
from tests.transfer.virtual import PLANES, Pair, VirtualEndpoint, assert_rows_equal, make_rows
from transfer.connection import Connection
from transfer.protocol.messages import Announce, Message, Open, Revoke
from transfer.protocol.negotiate import Offer
from transfer.protocol.strays import Strays
from transfer.protocol.ticket import Ticket, proven_open

Queued = tuple[VirtualEndpoint, Connection, Message, list[bytes]]


def test_a_stream_need_not_wait_for_the_answer_to_somebody_elses_revocation() -> None:
    """The sender that is to give back is out of reach: over the wire its blocks are free all the same, any number."""
    pair = Pair(configure(16, 128, 8))
    held, consumer, data = pair.transfer(200, admit=False)
    pair.network.settle()
    assert pair.receiver.stats()["transfer_blocks_in_use"] == 8
    lost: list[Revoke] = []

    def lose_revocations(message: Message, frames: list[bytes]) -> tuple[Message, list[bytes]] | None:
        if isinstance(message, Revoke):
            lost.append(message)
            return None
        return message, frames

    pair.network.rewrite = lose_revocations
    for number in range(7):
        _, other, _ = pair.transfer(16, admit=False)
        pair.network.settle()
        assert other.total_rows == 16, f"stream {number} waits"
        assert len(lost) >= number + 1
    assert [revoke.serial for revoke in lost] == sorted({revoke.serial for revoke in lost})
    pair.network.rewrite = None
    for stream_id in list(pair.receiver._streams.by_id):
        pair.receiver.admit(stream_id)
    pair.network.run_until(lambda: bool(consumer.ends))
    assert_rows_equal(consumer, data)
    assert held.result(0).resent_blocks == 0, "a withdrawn block is not a lost one"
    pair.network.run_until(lambda: not pair.sender.stats()["transfer_streams_sending"])
    pair.assert_ledger_zero()


@pytest.mark.parametrize("gives_up", ["abort", "close"])
def test_a_consumer_that_gives_up_hears_nothing_more_whatever_is_on_its_way(gives_up: str) -> None:
    pair = Pair(configure(16, 128, 8))
    kept: list[Queued] = []
    push = pair.network.push

    def keep_announcements(target: VirtualEndpoint, source: Connection, message: Message, frames: list[bytes]) -> None:
        (
            kept.append((target, source, message, frames))
            if isinstance(message, Announce)
            else push(target, source, message, frames)
        )

    pair.network.push = keep_announcements  # type: ignore[method-assign]
    stream, consumer, _ = pair.transfer(100)
    pair.network.settle()
    assert kept and consumer.total_rows is None
    if gives_up == "abort":
        pair.receiver.abort(stream.stream_id, "Cancelled", "no longer wanted")
    else:
        pair.receiver.close(stream.stream_id)
    target, source, message, frames = kept[0]
    target.deliver(source, message, frames)  # before the callback that ends the stream gets its turn
    pair.network.settle()
    assert consumer.total_rows is None and not consumer.rows and not consumer.ends
    pair.network.push = push  # type: ignore[method-assign]
    pair.network.run_until(lambda: not pair.sender.stats()["transfer_streams_sending"])
    pair.assert_ledger_zero()


def opened(ticket: Ticket) -> Open:
    offer = Offer(block_size=16, planes=PLANES, max_frame_bytes=1 << 20, credit=4)
    return proven_open(ticket, b"n" * 16, offer, "key", None)


def test_the_open_of_a_later_epoch_waits_in_the_place_of_an_earlier_one() -> None:
    """A receiver that crashed is back: the Open of an old epoch comes before that of the sender it is to wait for."""
    strays = Strays(Counter())
    old, new = TICKET, replace(TICKET, epoch=7, secret=b"x" * 16)
    one, two = (Connection(endpoint="here", peer=p, key=p.encode(), outgoing=False) for p in ("one", "two"))
    assert strays.answer(one, opened(old), 0.0) is None
    assert strays.answer(two, opened(new), 1.0) is None
    assert strays.answer(one, opened(old), 2.0) is None
    assert strays.num_parked == 1
    strays.expire(5.5)
    assert strays.num_parked == 1, "the time of the later one counts"
    assert strays.opened(TICKET.stream_id) == (two, (opened(new),))


def test_a_stream_that_comes_back_under_a_later_epoch_opens_at_once() -> None:
    pair = Pair(configure(16, 128, 8))
    zombie = pair.send(TICKET)
    pair.network.settle()
    later = replace(TICKET, epoch=9, secret=b"y" * 16)
    stream = pair.send(later, sender=pair.another_sender())
    pair.network.settle()
    consumer, data = pair.listen(later), make_rows(100)
    stream.announce(100)
    stream.write(0, data)
    pair.network.settle()
    assert_rows_equal(consumer, data)
    zombie.abort("Cancelled", "its time is over")
    pair.network.settle()
    pair.assert_ledger_zero()


@pytest.mark.parametrize("has_segments", [False, True], ids=["wire", "shm"])
def test_an_announcement_that_a_restart_swallowed_is_said_again(
    has_segments: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The restarted loop says again what is stored. The sender that took over must not read that as the answer."""
    monkeypatch.setattr(Pair, "has_segments", has_segments)
    pair, data, ticket = Pair(configure(16, 128, 8)), make_rows(200), Ticket.issue("test")
    consumer = pair.listen(ticket, take_over_s=60.0)
    first = pair.send(ticket, content_key="k")
    first.announce(200)
    first.write(0, {name: rows[:64] for name, rows in data.items()})
    pair.network.settle()
    assert consumer.num_rows == 64
    del pair.network.endpoints["virtual://sender"]
    later = pair.reissue(ticket.stream_id)
    assert later is not None
    second = pair.send(later, sender=pair.another_sender(), content_key="k")
    pair.network.settle()
    lost: list[Message] = []

    def lose_announcements(message: Message, frames: list[bytes]) -> tuple[Message, list[bytes]] | None:
        if not isinstance(message, Announce):
            return message, frames
        lost.append(message)
        return None

    pair.network.rewrite = lose_announcements
    second.announce(200)
    pair.network.settle()
    pair.receiver.restart_loop()
    pair.network.advance(0.2)
    pair.network.rewrite = None
    assert lost
    second.write(64, {name: rows[64:] for name, rows in data.items()})
    pair.network.run_until(lambda: bool(consumer.ends), limit_s=10.0)
    assert_rows_equal(consumer, data)
    assert second.result(0).resent_blocks <= pair.config.credit_window_blocks
