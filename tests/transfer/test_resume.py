"""Resume: any message lost, links cut anywhere, peers stopped for a minute, a receiving loop that dies at any step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.transfer.test_streams import configure
from tests.transfer.virtual import Consumer, Pair, assert_rows_equal, make_rows
from transfer.config import TransferConfig
from transfer.errors import StreamAborted
from transfer.protocol.messages import Accept, Ack, Announce, Block, Close, Grant, Message, Open, Probe, Resume
from transfer.protocol.ticket import Ticket
from transfer.streams import incoming_streams

CREDIT = 4
CONFIG = configure(16, 64, 6)


def run(
    rewrite: Callable[[Message, list[bytes]], tuple[Message, list[bytes]] | None] | None = None,
    *,
    config: TransferConfig = CONFIG,
    num_rows: int = 300,
) -> tuple[Pair, int]:
    """One stream under a fault; checked whole. Returns the pair and how many blocks went twice."""
    pair = Pair(config)
    pair.network.rewrite = rewrite
    stream, consumer, data = pair.transfer(num_rows)
    pair.network.run_until(lambda: bool(consumer.ends) and stream._ended.is_set())
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()
    return pair, stream.result(0).resent_blocks


NUM_MESSAGES = len(run()[0].network.log)


def test_the_messages_of_a_whole_stream() -> None:
    kinds = {type(message) for _, _, message, _ in run()[0].network.log}
    assert kinds == {Open, Accept, Grant, Announce, Block, Ack, Close}
    assert NUM_MESSAGES > 30


@pytest.mark.parametrize("number", range(NUM_MESSAGES))
def test_any_one_message_may_be_lost(number: int) -> None:
    seen = lost = 0

    def rewrite(message: Message, frames: list[bytes]) -> tuple[Message, list[bytes]] | None:
        nonlocal seen, lost
        seen += 1
        lost += seen == number + 1
        return None if seen == number + 1 else (message, frames)

    _, resent = run(rewrite)
    assert lost == 1 and resent <= CREDIT


@pytest.mark.parametrize("number", range(NUM_MESSAGES))
def test_a_link_cut_at_any_message_costs_at_most_one_window(number: int) -> None:
    pair = Pair(CONFIG)
    stream, consumer, data = pair.transfer(300)
    seen = 0

    def rewrite(message: Message, frames: list[bytes]) -> tuple[Message, list[bytes]] | None:
        nonlocal seen
        seen += 1
        return (message, frames) if seen <= number or pair.network.now > 1010.0 else None

    pair.network.rewrite = rewrite
    pair.network.run_until(lambda: bool(consumer.ends) and stream._ended.is_set())
    assert pair.network.fired["rewritten away"]
    assert_rows_equal(consumer, data)
    assert stream.result(0).resent_blocks <= CREDIT
    pair.assert_ledger_zero()


@pytest.mark.parametrize("who", ["receiver", "sender"])
@pytest.mark.parametrize("percent", [10, 50, 90])
def test_a_peer_that_was_stopped_for_a_minute_is_sent_nothing_twice(who: str, percent: int) -> None:
    pair = Pair(replace(CONFIG, idle_timeout_s=120.0))
    stop_at = 1 + NUM_MESSAGES * percent // 100
    stream, consumer, data = pair.transfer(300)

    def rewrite(message: Message, frames: list[bytes]) -> tuple[Message, list[bytes]]:
        if len(pair.network.log) == stop_at:
            pair.network.stopped.add(f"virtual://{who}")
        return message, frames

    pair.network.rewrite = rewrite
    pair.network.settle()
    assert pair.network.stopped and not stream._ended.is_set()
    blocks = sum(isinstance(m, Block) for _, _, m, _ in pair.network.log)
    pair.network.advance(60, step=0.25)
    assert sum(isinstance(m, Block) for _, _, m, _ in pair.network.log) <= blocks + CREDIT
    if who == "receiver":
        assert sum(isinstance(m, (Probe, Open)) for _, _, m, _ in pair.network.log) > 20
    pair.network.wake(f"virtual://{who}")
    pair.network.rewrite = None
    pair.network.run_until(lambda: bool(consumer.ends) and stream._ended.is_set())
    assert_rows_equal(consumer, data)
    assert stream.result(0).resent_blocks == 0
    assert sum(isinstance(m, Block) for _, _, m, _ in pair.network.log) == 19
    pair.assert_ledger_zero()


def test_many_answers_about_one_loss_send_it_again_once() -> None:
    pair = Pair(replace(CONFIG, idle_timeout_s=120.0))
    ticket, data = Ticket.issue("test"), make_rows(300)
    consumer, stream = pair.listen(ticket), pair.send(ticket)
    stream.announce(300)
    pair.network.settle()
    pair.network.rewrite = lambda m, f: None if isinstance(m, Block) else (m, f)
    stream.write(0, data)
    pair.network.settle()
    assert pair.network.fired["rewritten away"] == CREDIT
    pair.network.rewrite = None
    pair.network.stopped.add("virtual://receiver")
    pair.network.advance(30, step=0.25)
    pair.network.wake("virtual://receiver")
    pair.network.run_until(lambda: bool(consumer.ends))
    assert sum(isinstance(m, Resume) for _, _, m, _ in pair.network.log) > 10
    pair.network.run_until(stream._ended.is_set)
    assert stream.result(0).resent_blocks == CREDIT
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


class LoopDied(BaseException):
    """Goes past every handler, as a dying thread does."""


def run_dying(monkeypatch: pytest.MonkeyPatch, number: int, *, after: bool, consumer_takes: bool = True) -> bool:
    """A stream whose receiving loop dies before (or after) the `number`th action; False when it had fewer."""
    pair = Pair(configure(16, 64, 6))
    execute, count, died = incoming_streams.IncomingStreams._execute, 0, False

    def dying(self, stream, action) -> None:  # type: ignore[no-untyped-def]
        nonlocal count, died
        count += 1
        if count == number and not after:
            died = True
            raise LoopDied
        execute(self, stream, action)
        if count == number and after:
            died = True
            raise LoopDied

    monkeypatch.setattr(incoming_streams.IncomingStreams, "_execute", dying)
    consumers: list[tuple[Consumer, dict[str, object]]] = []
    sizes = (150, 60)
    pending = [lambda n=n: consumers.append(pair.transfer(n)[1:]) for n in sizes]  # type: ignore[misc,arg-type]
    for start in pending:
        start()
    deadline = pair.network.now + 600
    while not all(consumer.ends for consumer, _ in consumers):
        assert pair.network.now < deadline
        try:
            pair.network.advance(0.05)
        except LoopDied:
            pair.receiver.restart_loop()
    monkeypatch.setattr(incoming_streams.IncomingStreams, "_execute", execute)
    pair.network.run_until(lambda: not pair.sender.stats()["transfer_streams_sending"])
    for consumer, data in consumers:
        assert len(consumer.ends) == 1 and not isinstance(consumer.ends[0], StreamAborted)
        assert_rows_equal(consumer, data)  # type: ignore[arg-type]
    pair.assert_ledger_zero()
    return died


@pytest.mark.parametrize("after", [False, True])
def test_the_receiving_loop_may_die_at_any_step(monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    number = 1
    while run_dying(monkeypatch, number, after=after):
        number += 1
    assert number > 50, "the loop died at every one of these steps"


def test_a_restarted_loop_keeps_what_waits_for_its_consumer() -> None:
    pair = Pair(configure(16, 64, 6))
    stream, consumer, data = pair.transfer(300, admit=False)
    pair.network.settle()
    in_use = pair.receiver.stats()["transfer_blocks_in_use"]
    sent = sum(isinstance(m, Block) for _, _, m, _ in pair.network.log)
    assert in_use == sent == 4
    pair.receiver.restart_loop()
    assert pair.receiver.stats()["transfer_blocks_in_use"] == in_use
    pair.receiver.admit(stream.stream_id)
    pair.network.run_until(lambda: bool(consumer.ends))
    assert_rows_equal(consumer, data)
    assert sum(isinstance(m, Block) for _, _, m, _ in pair.network.log) == 19
    pair.assert_ledger_zero()
