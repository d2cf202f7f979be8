"""The simulator's runs: no promise is broken, every fault happens, a seed is a run, and a failure tells its story."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.profiles import IS_SOAK
from tests.transfer.simulation.planted.receivers import forget_the_tag_check
from transfer.simulation.faults import FAULT_KINDS
from transfer.simulation.runner import MIN_SEEDS_FOR_FIRINGS, Report, run_seed, run_seeds

NUM_SEEDS = 10_000 if IS_SOAK else MIN_SEEDS_FOR_FIRINGS
FIRST_SEED = 0


@pytest.mark.timeout(3600)
def test_every_promise_is_kept_under_every_fault() -> None:
    report = run_seeds(range(FIRST_SEED, FIRST_SEED + NUM_SEEDS), num_jobs=2 if IS_SOAK else 1)
    assert report.num_seeds == NUM_SEEDS
    assert not report.failures, "\n".join(f"seed {seed}: {text}" for seed, text in report.failures)
    assert not report.silent_kinds, f"faults that never happened: {report.silent_kinds}"
    assert report.counts["complete"] > report.counts["requests"] // 2, "most requests outlive what befalls them"
    assert report.counts["streams_through_slots"] > report.num_seeds // 2, "memory is shared"
    assert report.counts["blocks_through_slots"] > report.counts["blocks_computed_in_slots"] > report.num_seeds // 2


def test_several_processes_come_to_the_same() -> None:
    counted: list[int] = []
    several, one = run_seeds(range(60), num_jobs=2, on_done=counted.append), run_seeds(range(60))
    assert sum(counted) == 60
    assert (several.num_seeds, several.failures, several.fired, several.counts) == (60, [], one.fired, one.counts)


def test_a_fault_that_never_fires_fails_the_run() -> None:
    report = Report(num_seeds=MIN_SEEDS_FOR_FIRINGS)
    report.fired.update({kind: 1 for kind in FAULT_KINDS if kind != "half_open"})
    assert report.silent_kinds == ["half_open"]
    report.num_seeds -= 1
    assert report.silent_kinds == [], "too few seeds to say"


@pytest.mark.parametrize("seed", [0, 13, 27])
def test_a_seed_is_a_run(seed: int) -> None:
    first, second = (run_seed(seed, is_told=True) for _ in range(2))
    assert list(first.story.lines()) == list(second.story.lines())
    assert (first.fired, first.counts) == (second.fired, second.counts)
    assert len(first.story.events) > 100
    untold = run_seed(seed)
    assert (untold.fired, untold.counts) == (first.fired, first.counts), "being watched changes nothing"
    assert not untold.story.events
    assert list(run_seed(seed + 1, is_told=True).story.lines()) != list(first.story.lines())


def test_the_order_of_sets_and_dicts_does_not_matter() -> None:
    code = (
        "from transfer.simulation.runner import run_seed\nprint(*run_seed(13, is_told=True).story.lines(), sep='\\n')"
    )
    stories = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for hash_seed in ("0", "4711")
    }
    assert len(stories) == 1 and len(stories.pop()) > 10_000


def test_a_failure_names_the_promise_and_tells_the_story_of_the_stream() -> None:
    with forget_the_tag_check():
        result = next(r for r in (run_seed(seed, is_told=True) for seed in range(100)) if r.breach is not None)
    breach = result.breach
    assert breach is not None and breach.number is not None and breach.promise.startswith("4")
    lines = list(result.story.lines(breach.number))
    assert any(" sends Open " in line for line in lines) and any(" meets Block" in line for line in lines)
    assert any("state: new -> registered" in line for line in lines)
    assert str(breach) in lines[-1] or str(breach) in lines[-2]
    others = {event.number for event in result.story.events} - {breach.number, None}
    assert others, "other streams ran at the same time"
    assert not any(f"stream {number} " in line for line in lines for number in others)
