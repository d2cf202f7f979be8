"""The status table walked whole, and what a sequence derives from its two numbers."""

import itertools

import pytest

from language_worker.errors import IllegalTransition
from language_worker.request import TRANSITIONS, Event, Sequence, Status


@pytest.mark.parametrize(("status", "event"), list(itertools.product(Status, Event)))
def test_every_pair_moves_by_the_table_or_changes_nothing(status: Status, event: Event) -> None:
    seq = Sequence(key=(0, 0), prompt=[1, 2, 3], max_len=9)
    seq.status, seq.kv_len, seq.pages = status, 2, [7]
    if (status, event) in TRANSITIONS:
        seq.apply(event)
        assert seq.status is TRANSITIONS[status, event]
        keeps = seq.status is Status.RUNNING
        assert (seq.kv_len, seq.pages) == ((2, [7]) if keeps else (0, []))
    else:
        with pytest.raises(IllegalTransition, match=event.value):
            seq.apply(event)
        assert (seq.status, seq.kv_len, seq.pages) == (status, 2, [7])


def test_nothing_leaves_the_finished_state() -> None:
    assert not [pair for pair in TRANSITIONS if pair[0] is Status.FINISHED]


def test_ready_length_follows_the_rows() -> None:
    class Rows:
        num_filled = 0

    rows = Rows()
    seq = Sequence(key=(0, 0), prompt=range(10), max_len=12, media_positions=(3, 4, 8), media=rows)
    ready = []
    for rows.num_filled in range(4):
        ready.append(seq.ready_len)
    assert ready == [3, 4, 8, 10]
    assert seq.media_rows(0, 4) == (0, 1)
    assert seq.media_rows(4, 9) == (1, 3)
    assert seq.media_rows(5, 8) == (2, 2)
