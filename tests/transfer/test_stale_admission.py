"""An admission that was decided before a stream started over does not admit what came in its place."""

from __future__ import annotations

import pytest

from tests.transfer.test_streams import configure
from tests.transfer.test_take_over import ROWS, begin, take_over
from tests.transfer.virtual import Pair, assert_rows_equal, make_rows


@pytest.mark.parametrize("total_rows", [None, ROWS])
def test_room_made_for_the_content_before_does_not_count(total_rows: int | None) -> None:
    pair = Pair(configure(16, 100, 64))
    data = make_rows(ROWS)
    consumer, first = begin(pair, content_key="old")
    first.announce(ROWS, [{"rows": ROWS}])
    first.write(0, {name: rows[:32].clone() for name, rows in make_rows(ROWS, seed=9).items()})
    pair.network.settle()
    assert consumer.num_rows == 32
    consumer.admit = False
    second = take_over(pair, first.stream_id, content_key="new")
    assert consumer.restarts == 1
    second.announce(ROWS, [{"rows": ROWS}])
    second.write(0, data)
    pair.network.settle()
    pair.receiver.admit(first.stream_id, total_rows, num_restarts=0)
    pair.network.settle()
    assert consumer.num_rows == 0, "the totals are the same, the content is not"
    pair.receiver.admit(first.stream_id, total_rows, num_restarts=1)
    pair.network.run_until(second._ended.is_set)
    assert_rows_equal(consumer, data)
    pair.assert_ledger_zero()
