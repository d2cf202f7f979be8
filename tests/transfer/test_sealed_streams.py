"""The suites of the streams once more, as between hosts: payloads sealed, Blocks and Probes on a path of their own.

The tests are those of the modules imported here, the faults too: what is lost, repeated, reordered or corrupted on
either path, or who crashes, changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.transfer.test_hostile import *  # noqa: F403
from tests.transfer.test_resume import *  # noqa: F403
from tests.transfer.test_revocation import *  # noqa: F403
from tests.transfer.test_slow_producers import *  # noqa: F403
from tests.transfer.test_streams import *  # noqa: F403
from tests.transfer.test_streams import configure
from tests.transfer.test_take_over import *  # noqa: F403
from tests.transfer.virtual import Pair, VirtualEndpoint, assert_rows_equal, make_rows
from transfer.protocol.messages import Ack, Block, Message
from transfer.protocol.ticket import Ticket

pytestmark: list[pytest.MarkDecorator] = []


@pytest.fixture(scope="module")
def payload() -> str:
    """Over the wire only: what is shared within one host is not sealed."""
    return "wire"


@pytest.fixture(autouse=True, scope="module")
def encrypted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VirtualEndpoint, "encrypted", True)
        yield


del test_a_block_that_fits_no_message_is_refused_at_both_ends  # noqa: F821 (its caps leave no room for seals)


def test_blocks_wait_for_the_ack_of_the_announcement() -> None:
    """The two paths are not in order with each other: a block that overtakes the totals would be dropped as early."""
    pair = Pair(configure(16, 64, 8))
    pair.network.settle()
    _, consumer, data = pair.transfer(300)
    pair.network.run_until(lambda: bool(consumer.ends))
    kinds = [type(message).__name__ for _, _, message, _ in pair.network.log]
    assert kinds.index("Announce") < kinds.index("Ack") < kinds.index("Block")
    assert not pair.receiver.stats().get("transfer_dropped_early")
    assert_rows_equal(consumer, data)


@pytest.mark.parametrize("num_lost", [1, 3])
def test_a_lost_answer_to_the_announcement_is_asked_for_though_blocks_come_and_go(num_lost: int) -> None:
    """Streams that share one block give it to each other twice a second: that news answers nothing."""
    pair, lost = Pair(configure(16, 16, 1)), Counter[str]()

    def rewrite(message: Message, frames: list[bytes]) -> tuple[Message, list[bytes]] | None:
        if isinstance(message, Ack) and lost[message.stream_id] < num_lost:
            lost[message.stream_id] += 1
            return None
        return message, frames

    pair.network.rewrite = rewrite
    streams = [pair.transfer(40) for _ in range(3)]
    pair.network.run_until(lambda: all(consumer.ends for _, consumer, _ in streams), limit_s=60.0)
    assert list(lost.values()) == [num_lost] * 3
    for _, consumer, data in streams:
        assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()


def test_two_attempts_with_one_ticket_share_no_key() -> None:
    ticket, data = Ticket.issue("test"), make_rows(100)
    sealed: list[set[bytes]] = []
    for _ in range(2):
        pair = Pair(configure(16, 128, 8))
        consumer, stream = pair.listen(ticket), pair.send(ticket)
        stream.announce(100)
        stream.write(0, data)
        pair.network.settle()
        assert_rows_equal(consumer, data)
        blocks = [(m, f) for _, _, m, f in pair.network.log if isinstance(m, Block)]
        assert [block.serial for block, _ in blocks] == sorted({block.serial for block, _ in blocks})
        sealed.append({frame for _, frames in blocks for frame in frames})
    assert len(sealed[0]) == len(sealed[1]) == 14 and not sealed[0] & sealed[1]
