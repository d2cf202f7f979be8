"""Mismatched, forged, late, replayed and corrupted messages: typed errors at both ends, or dropped and counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.transfer.test_streams import configure
from tests.transfer.virtual import PLANES, Pair, VirtualEndpoint, VirtualNetwork, assert_rows_equal, make_rows
from transfer.config import TransferConfig
from transfer.errors import AlignmentError, IncompatibleBlocks, RemoteProtocolError, TicketRejected, TransferError
from transfer.protocol.messages import Abort, Ack, Announce, Block, Close, Grant, Message, Open
from transfer.protocol.negotiate import Offer
from transfer.protocol.ticket import Ticket, proven_open
from transfer.tensors import PlaneSpec

OFFER = Offer(block_size=16, planes=PLANES, max_frame_bytes=1 << 20, credit=4)


def forged_open(ticket: Ticket) -> Open:
    """By who knows the stream's id only."""
    message = proven_open(ticket, b"n" * 16, OFFER, "", None)
    return replace(message, proof=b"\0" * 32)


def assert_both_fail(pair: Pair, change, kind: type[TransferError]) -> None:  # type: ignore[no-untyped-def]
    """`change(message)` is applied to the first stream's messages; it dies typed at both ends, a second one lives."""
    victim: list[str] = []
    fired: list[Message] = []

    def rewrite(message: Message, frames: list[bytes]) -> tuple[Message, list[bytes]]:
        if getattr(message, "stream_id", None) in victim:
            changed = change(message)
            if changed is not None:
                fired.append(changed)
                return changed, frames
        return message, frames

    pair.network.rewrite = rewrite
    ticket = Ticket.issue("victim")
    victim.append(ticket.stream_id)
    consumer, stream = pair.listen(ticket), pair.send(ticket)
    stream.announce(1000)
    stream.write(0, make_rows(1000))
    _, other, data = pair.transfer(1000)
    pair.network.settle()
    assert fired, "the fault did not happen"
    with pytest.raises(kind):
        stream.result(0)
    assert isinstance(consumer.ends[0], kind), consumer.ends
    assert_rows_equal(other, data)
    pair.assert_ledger_zero()


def test_8000_at_128_is_63_blocks_and_8064_tokens() -> None:
    pair = Pair(TransferConfig(block_size=128, default_allocate_tokens=8000))
    pair.transfer(20000, admit=False)
    pair.network.settle()
    (grant,) = [m for _, _, m, _ in pair.network.log if isinstance(m, Grant)]
    assert (len(grant.block_ids), grant.allocated_tokens) == (63, 8064)
    (announce,) = [m for _, _, m, _ in pair.network.log if isinstance(m, Announce)]
    assert announce.allocated_tokens == 8064


WRONG_FOR_63 = [8000, 7936, 8063, 8065, 8191, 0]  # 8065 and 8191 are 63 blocks too when rounded down


@pytest.mark.parametrize("tokens", WRONG_FOR_63)
def test_a_sender_that_announces_other_than_8064_for_63_blocks_is_refused(tokens: int) -> None:
    pair = Pair(TransferConfig(block_size=128, default_allocate_tokens=8000))
    change = lambda m: replace(m, allocated_tokens=tokens) if isinstance(m, Announce) else None  # noqa: E731
    assert_both_fail(pair, change, AlignmentError)
    sent = [m for _, _, m, _ in pair.network.log if isinstance(m, Block)]
    assert sent, "the other stream went on"


@pytest.mark.parametrize("tokens", WRONG_FOR_63)
def test_a_receiver_that_grants_63_blocks_as_other_than_8064_is_refused(tokens: int) -> None:
    pair = Pair(TransferConfig(block_size=128, default_allocate_tokens=8000))
    change = lambda m: replace(m, allocated_tokens=tokens) if isinstance(m, Grant) else None  # noqa: E731
    assert_both_fail(pair, change, AlignmentError)


@pytest.mark.parametrize("kind", [Grant, Announce])
def test_another_block_size_inside_a_message_is_refused(kind: type) -> None:
    pair = Pair(configure(16, 100, 40))
    change = lambda m: replace(m, block_size=32) if isinstance(m, kind) else None  # noqa: E731
    assert_both_fail(pair, change, IncompatibleBlocks)


def test_another_block_size_at_the_sender_is_refused_before_any_byte_moves() -> None:
    pair = Pair(configure(16, 100, 40), sender_config=configure(32, 100, 40))
    ticket = Ticket.issue("test")
    consumer, stream = pair.listen(ticket), pair.send(ticket)
    stream.announce(100)
    stream.write(0, make_rows(100))
    pair.network.settle()
    with pytest.raises(IncompatibleBlocks):
        stream.result(0)
    assert isinstance(consumer.ends[0], IncompatibleBlocks)
    assert not any(isinstance(m, (Block, Grant)) for _, _, m, _ in pair.network.log)
    pair.assert_ledger_zero()


def test_other_planes_are_refused() -> None:
    pair = Pair(configure(16, 100, 40))
    ticket = Ticket.issue("test")
    consumer = pair.listen(ticket)
    stream = pair.send(ticket, (PLANES[0], PlaneSpec(name="token_ids", dtype="int64", row_shape=())))
    pair.network.settle()
    with pytest.raises(IncompatibleBlocks):
        stream.result(0)
    assert isinstance(consumer.ends[0], IncompatibleBlocks)
    pair.assert_ledger_zero()


@pytest.mark.parametrize("fault", ["secret", "epoch"])
def test_a_wrong_ticket_is_refused_and_the_right_one_goes_on(fault: str) -> None:
    pair = Pair(configure(16, 100, 40))
    ticket = Ticket.issue("test")
    wrong = replace(ticket, secret=b"\0" * 16) if fault == "secret" else replace(ticket, epoch=2)
    consumer, stream = pair.listen(ticket), pair.send(wrong)
    pair.network.settle()
    with pytest.raises(TicketRejected):
        stream.result(0)
    assert not consumer.ends and pair.receiver.stats()["transfer_dropped_bad_proof"] == 1
    right = pair.send(ticket)
    right.announce(40)
    right.write(0, make_rows(40))
    pair.network.settle()
    assert_rows_equal(consumer, make_rows(40))
    pair.assert_ledger_zero()


@pytest.mark.parametrize("parked", [True, False])
def test_who_knows_a_streams_id_only_cannot_end_it(parked: bool) -> None:
    pair = Pair(configure(16, 100, 40))
    ticket = Ticket.issue("test")
    stranger = VirtualEndpoint(pair.network, "virtual://stranger")
    replies: list[Message] = []
    stranger.start(lambda c, m, f: replies.append(m))
    guess = forged_open(ticket)
    consumer = None if parked else pair.listen(ticket)
    pair.network.settle()
    stranger.send(stranger.connect("virtual://receiver"), guess)
    stranger.send(
        stranger.connect("virtual://receiver"), Abort(stream_id=ticket.stream_id, epoch=1, code="x", message="")
    )
    pair.network.settle()
    consumer = consumer or pair.listen(ticket)
    pair.network.settle()
    assert not consumer.ends
    assert [m.code for m in replies if isinstance(m, Abort)] == ["TicketRejected"]
    stream = pair.send(ticket)
    stream.announce(40)
    stream.write(0, make_rows(40))
    pair.network.settle()
    assert_rows_equal(consumer, make_rows(40))
    pair.assert_ledger_zero()


def test_an_open_that_proves_nothing_on_the_senders_own_connection_is_dropped() -> None:
    pair = Pair(configure(16, 32, 4))
    stream, consumer, data = pair.transfer(1000, admit=False)
    pair.network.settle()
    own = next(m for _, _, m, _ in pair.network.log if isinstance(m, Open))
    sender = pair.network.endpoints["virtual://sender"]
    for change in ({"proof": b"\0" * 32}, {"epoch": 2}, {"offer": replace(own.offer, block_size=32)}):
        sender.send(sender.connect("virtual://receiver"), replace(own, **change))
    pair.network.settle()
    assert pair.receiver.stats()["transfer_dropped_bad_proof"] == 3
    pair.receiver.admit(stream.stream_id)
    pair.network.settle()
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


def test_an_open_of_an_older_epoch_does_not_hurt_the_current_one() -> None:
    pair = Pair(configure(16, 100, 40))
    old = Ticket.issue("test")
    current = old.next_epoch()
    consumer = pair.listen(current)
    late = pair.send(old)
    pair.network.settle()
    assert not consumer.ends and pair.receiver.stats()["transfer_dropped_bad_proof"] == 1
    with pytest.raises(TicketRejected):
        late.result(0)
    stream = pair.send(current)
    stream.announce(40)
    stream.write(0, make_rows(40))
    pair.network.settle()
    assert_rows_equal(consumer, make_rows(40))
    pair.assert_ledger_zero()


def test_a_stranger_cannot_touch_a_running_stream() -> None:
    pair = Pair(configure(16, 32, 4))
    stream, consumer, data = pair.transfer(1000, admit=False)
    pair.network.settle()
    stranger = VirtualEndpoint(pair.network, "virtual://stranger")
    replies: list[Message] = []
    stranger.start(lambda c, m, f: replies.append(m))
    target = stranger.connect("virtual://receiver")
    own = [m for _, _, m, _ in pair.network.log if isinstance(m, (Open, Announce))]
    block = next((m, f) for _, _, m, f in pair.network.log if isinstance(m, Block))
    sid = stream.stream_id
    for message in own:
        stranger.send(target, message)
    stranger.send(target, block[0], block[1])
    stranger.send(target, Abort(stream_id=sid, epoch=1, code="Stop", message=""))
    stranger.send(stranger.connect("virtual://sender"), Close(stream_id=sid, epoch=1, total_rows=1000))
    stranger.send(
        stranger.connect("virtual://sender"), Ack(stream_id=sid, epoch=1, serial=0, next_index=63, kept_index=0)
    )
    pair.network.settle()
    assert pair.receiver.stats()["transfer_dropped_foreign_connection"] == 3
    assert pair.sender.stats()["transfer_dropped_foreign_connection"] == 2
    assert [m.code for m in replies if isinstance(m, Abort)] == ["TicketRejected"]
    pair.receiver.admit(sid)
    pair.network.settle()
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


def inject(pair: Pair, message: Block, frames: list[bytes]) -> None:
    sender = pair.network.endpoints["virtual://sender"]
    path = "virtual://receiver#token" if sender.encrypted else "virtual://receiver"
    sender.send(sender.connect(path), message, frames)
    pair.network.settle()


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("duplicate", lambda m, f: (m, f)),
        ("stale_epoch", lambda m, f: (replace(m, epoch=2), f)),
        ("not_granted", lambda m, f: (replace(m, index=40), f)),
        ("not_granted", lambda m, f: (replace(m, index=2, block_id=m.block_id + 1000), f)),
        ("misaligned", lambda m, f: (replace(m, index=2, block_id=-1, first_row=33), f)),
        ("misaligned", lambda m, f: (replace(m, index=2, block_id=-1, first_row=32, num_rows=15), f)),
        ("wrong_size", lambda m, f: (replace(m, index=2, block_id=-1, first_row=32), [f[0][:-1], f[1]])),
        ("wrong_size", lambda m, f: (replace(m, index=2, block_id=-1, first_row=32), [f[0] + b"x", f[1]])),
        ("wrong_size", lambda m, f: (replace(m, index=2, block_id=-1, first_row=32), [f[0]])),
        ("wrong_size", lambda m, f: (replace(m, index=2, block_id=-1, first_row=32), [*f, b""])),
        ("bad_tag", lambda m, f: (replace(m, index=2, block_id=-1, first_row=32), f)),
        ("unknown_stream", lambda m, f: (replace(m, stream_id="0" * 32), f)),
    ],
)
def test_blocks_that_do_not_belong_are_dropped_and_counted(reason: str, change) -> None:  # type: ignore[no-untyped-def]
    pair = Pair(configure(16, 64, 4))
    ticket = Ticket.issue("test")
    consumer, stream = pair.listen(ticket, admit=False), pair.send(ticket)
    data = make_rows(100)
    stream.announce(100)
    stream.write(0, {n: r[:32].clone() for n, r in data.items()})  # blocks 0 and 1 of the 4 granted
    pair.network.settle()
    blocks = [(m, f) for _, _, m, f in pair.network.log if isinstance(m, Block)]
    grant = next(m for _, _, m, _ in pair.network.log if isinstance(m, Grant))
    message, frames = change(*blocks[1])
    if message.block_id == -1:
        message = replace(message, block_id=grant.block_ids[2])
    before = pair.receiver.stats().get(f"transfer_dropped_{reason}", 0)
    inject(pair, message, frames)
    assert pair.receiver.stats()[f"transfer_dropped_{reason}"] == before + 1
    assert not consumer.ends
    stream.write(32, {n: r[32:].clone() for n, r in data.items()})
    pair.receiver.admit(ticket.stream_id)
    pair.network.settle()
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


def test_a_replayed_stream_never_writes_into_freed_or_reused_blocks() -> None:
    pair = Pair(configure(16, 64, 2))
    _, first, data = pair.transfer(200)
    pair.network.settle()
    assert_rows_equal(first, data)
    recorded = list(pair.network.log)
    _, second, other = pair.transfer(150, admit=False)  # now holds the very same blocks
    pair.network.settle()
    for target, source, message, frames in recorded:
        target.deliver(source, message, frames)
    pair.network.settle()
    pair.receiver.admit(second.stream_id)
    pair.network.settle()
    assert pair.receiver.stats()["transfer_dropped_ended_stream"] >= 10
    assert_rows_equal(second, other)
    assert len(first.ends) == 1
    pair.assert_ledger_zero()


@pytest.mark.parametrize(
    "lie",
    [
        lambda sid: Ack(stream_id=sid, epoch=1, serial=0, next_index=99, kept_index=0),
        lambda sid: Close(stream_id=sid, epoch=1, total_rows=7),
        lambda sid: Close(stream_id=sid, epoch=1, total_rows=1000),
        lambda sid: Grant(
            stream_id=sid,
            epoch=1,
            round=1,
            first_index=2,
            block_ids=(1,),
            allocated_tokens=16,
            block_size=16,
            credit=0,
        ),
    ],
)
def test_a_lying_receiver_ends_the_stream_with_a_typed_error(lie) -> None:  # type: ignore[no-untyped-def]
    pair = Pair(configure(16, 32, 4))
    stream, consumer, _ = pair.transfer(1000, admit=False)
    pair.network.settle()
    receiver = pair.network.endpoints["virtual://receiver"]
    (back,) = {c for e, c, _, _ in pair.network.log if e is receiver and not c.is_sealed_path}
    receiver.send(back, lie(stream.stream_id))
    pair.network.settle()
    with pytest.raises(RemoteProtocolError):
        stream.result(0)
    assert isinstance(consumer.ends[0], RemoteProtocolError)
    pair.assert_ledger_zero()


def test_a_changed_total_ends_the_stream() -> None:
    pair = Pair(configure(16, 32, 4))
    stream, consumer, _ = pair.transfer(1000, admit=False)
    pair.network.settle()
    sender = pair.network.endpoints["virtual://sender"]
    announce = next(m for _, _, m, _ in pair.network.log if isinstance(m, Announce))
    sender.send(sender.connect("virtual://receiver"), replace(announce, total_rows=999))
    pair.network.settle()
    assert isinstance(consumer.ends[0], RemoteProtocolError)
    with pytest.raises(RemoteProtocolError):
        stream.result(0)
    pair.assert_ledger_zero()


def test_early_opens_are_bounded() -> None:
    pair = Pair(configure(16, 32, 4), network=VirtualNetwork())
    sender = pair.network.endpoints["virtual://sender"]
    for number in range(3000):
        ticket = Ticket.issue(str(number))
        sender.send(sender.connect("virtual://receiver"), forged_open(ticket))
    pair.network.settle()
    assert pair.receiver.stats()["transfer_opens_parked"] == 1024
    pair.network.advance(6, step=1.0)
    assert pair.receiver.stats()["transfer_opens_parked"] == 0
    pair.assert_ledger_zero()
