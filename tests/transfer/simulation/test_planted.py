"""Every planted bug is caught within 500 seeds (one, which needs a late answer at the right moment, within 1000), and
the seed that catches it is clean without the bug."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.profiles import IS_SOAK
from tests.transfer.simulation.planted import BUGS, Planted
from transfer.simulation.runner import run_seed

NUM_SEEDS = 500
MORE_SEEDS = {"confirm_twice": 1000}
# Where each was caught last, so that the everyday profile need not search; any seed below its number will do.
CAUGHT_AT = {
    "acknowledge_before_storing": 5,
    "believe_every_answer": 2,
    "divide_the_allocation": 15,
    "go_on_one_block_too_far": 18,
    "deliver_again_after_a_restart": 8,
    "lose_what_was_acknowledged": 27,
    "write_revoked_blocks": 2,
    "forget_rows_too_early": 0,
    "ignore_the_deadline": 13,
    "never_ask_back": 2,
    "keep_what_was_admitted": 2,
    "keep_the_last_block": 2,
    "use_a_slot_before_its_release": 1,
    "count_a_release_twice": 4,
    "take_any_seal": 308,
    "use_withdrawn_slots_at_once": 19,
    "let_go_while_the_producer_writes": 85,
    "give_back_while_the_producer_writes": 1,
    "leave_rows_in_withdrawn_slots": 1,
    "fill_a_sealed_slot_again": 99,
    "ignore_the_end_of_a_lifeline": 48,
    "fence_what_was_handed_on": 196,
    "forget_where_blocks_are_to_be": 85,
    "wait_for_word_of_the_pools_blocks": 18,
    "confirm_twice": 805,
}
# What each breaks: the breach that is found must be of one of these promises, by its first words.
BREAKS: dict[str, tuple[str, ...]] = {
    "acknowledge_before_storing": ("3: acknowledged means stored",),
    "forget_the_tag_check": ("4: damaged or foreign bytes are dropped",),
    "divide_the_allocation": ("1: a misaligned grant is a typed error", "2: only granted blocks are sent"),
    "fence_late": ("3: a stream outlives faults shorter than its limits", "4: an old epoch is fenced"),
    "keep_the_surplus": ("5: the surplus comes back",),
    "send_everything_again_per_probe": ("3: a fault costs at most one credit window",),
    "believe_every_answer": ("3: a fault costs at most one credit window",),
    "go_on_one_block_too_far": ("3: another sender goes on at the same offset",),
    "grant_the_rest_to_everybody": ("2: the rest is granted once admitted",),
    "forget_last_words": ("3: a stream outlives faults shorter than its limits", "7: nothing leaks"),
    "deliver_again_after_a_restart": ("3: rows come in order, each once",),
    "lose_what_was_acknowledged": ("3: what is acknowledged stays", "3: kept means kept"),
    "write_revoked_blocks": ("4: a block is its owner's alone", "4: a freed block is never written"),
    "forget_rows_too_early": ("3: a block holds the producer's rows",),
    "use_a_serial_twice": ("4: a serial is used once",),
    "ignore_the_credit": ("6: the credit bounds what is under way",),
    "take_any_content": ("3: another sender goes on at the same offset", "4: never another request's bytes"),
    "hide_the_restart": ("3: totals are said once per start",),
    "ignore_the_deadline": ("6: a deadline ends a stream",),
    "never_ask_back": ("5: who ",),
    "keep_what_was_admitted": ("5: who stands still gives its blocks to who waits",),
    "keep_the_last_block": ("5: who stands still gives its blocks to who waits",),
    "ignore_resumes": ("3: a stream outlives faults shorter than its limits",),
    "use_a_slot_before_its_release": ("4: a slot is used again only after its sender's word",),
    "count_a_release_twice": ("4: no block has two owners", "4: a slot is used again only after its sender's word"),
    "take_any_seal": ("4: damaged or foreign bytes are dropped",),
    "use_withdrawn_slots_at_once": ("4: a slot is its writer's alone", "4: a freed block is never written"),
    "let_go_while_the_producer_writes": ("4: released means let go",),
    "give_back_while_the_producer_writes": ("3: a block holds the producer's rows", "4: a freed block"),
    "leave_rows_in_withdrawn_slots": ("3: a block holds the producer's rows",),
    "fill_a_sealed_slot_again": ("4: a sealed slot is given away",),
    "ignore_the_end_of_a_lifeline": ("3: a stream outlives faults shorter than its limits",),
    "fence_what_was_handed_on": ("7: nothing leaks",),
    "forget_where_blocks_are_to_be": ("4: a grant names the stream's own blocks",),
    "wait_for_word_of_the_pools_blocks": ("5: the surplus comes back",),
    "confirm_twice": ("3: a block holds the producer's rows", "4: a slot is its writer's alone"),
}


def num_seeds(bug: Planted) -> int:
    return MORE_SEEDS.get(bug.__name__, NUM_SEEDS)


def seeds(bug: Planted) -> Iterator[int]:
    if not IS_SOAK:
        yield CAUGHT_AT.get(bug.__name__, 0)
    yield from range(num_seeds(bug))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_every_planted_bug_is_caught(bug: Planted) -> None:
    for seed in seeds(bug):
        with bug():
            breach = run_seed(seed).breach
        if breach is not None:
            print(f"{bug.__name__}: seed {seed}: {breach}")
            assert breach.promise.startswith(BREAKS[bug.__name__]), f"another promise is broken: {breach}"
            assert "TypeError" not in breach.text and "AttributeError" not in breach.text, "the patch itself is broken"
            assert run_seed(seed).breach is None, "the seed fails without the bug, too"
            return
    raise AssertionError(f"{bug.__name__} was not caught in {num_seeds(bug)} seeds")


def test_there_are_enough_of_them() -> None:
    assert len({bug.__name__ for bug in BUGS}) == len(BUGS) >= 10
    assert all(bug.__doc__ for bug in BUGS)
