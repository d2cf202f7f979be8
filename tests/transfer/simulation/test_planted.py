"""Every planted bug is caught within 500 seeds, and the seed that catches it is clean without the bug."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.profiles import IS_SOAK
from tests.transfer.simulation.planted import BUGS, Planted
from transfer.simulation.runner import run_seed

NUM_SEEDS = 500
# Where each was caught last, so that the everyday profile need not search; any seed below NUM_SEEDS will do.
CAUGHT_AT = {
    "acknowledge_before_storing": 19,
    "believe_every_answer": 38,
    "divide_the_allocation": 2,
    "go_on_one_block_too_far": 16,
    "deliver_again_after_a_restart": 13,
    "lose_what_was_acknowledged": 27,
    "ignore_the_deadline": 1,
    "never_ask_back": 15,
}


def seeds(bug: Planted) -> Iterator[int]:
    if not IS_SOAK:
        yield CAUGHT_AT.get(bug.__name__, 0)
    yield from range(NUM_SEEDS)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_every_planted_bug_is_caught(bug: Planted) -> None:
    for seed in seeds(bug):
        with bug():
            breach = run_seed(seed).breach
        if breach is not None:
            print(f"{bug.__name__}: seed {seed}: {breach}")
            assert run_seed(seed).breach is None, "the seed fails without the bug, too"
            return
    raise AssertionError(f"{bug.__name__} was not caught in {NUM_SEEDS} seeds")


def test_there_are_enough_of_them() -> None:
    assert len({bug.__name__ for bug in BUGS}) == len(BUGS) >= 10
    assert all(bug.__doc__ for bug in BUGS)
