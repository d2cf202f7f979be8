"""Running seeds: one, or many over several processes, and what they came to together."""

from __future__ import annotations

import logging
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context

from transfer.simulation.faults import FAULT_KINDS
from transfer.simulation.scenario import draw_scenario
from transfer.simulation.world import Result, World

CHUNK = 20
MIN_SEEDS_FOR_FIRINGS = 200


@dataclass(slots=True)
class Report:
    """What many seeds came to."""

    num_seeds: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def add_result(self, result: Result) -> None:
        """Take in what one seed came to."""
        self.num_seeds += 1
        self.fired.update(result.fired)
        self.counts.update(result.counts)
        if result.breach is not None:
            self.failures.append((result.seed, str(result.breach)))

    def add(self, other: Report) -> None:
        """Take in what other seeds came to."""
        self.num_seeds += other.num_seeds
        self.failures += other.failures
        self.fired.update(other.fired)
        self.counts.update(other.counts)

    @property
    def silent_kinds(self) -> list[str]:
        """Faults that never fired, where there were enough seeds for all of them."""
        if self.num_seeds < MIN_SEEDS_FOR_FIRINGS:
            return []
        return [kind for kind in FAULT_KINDS if not self.fired[kind]]


def run_seed(seed: int, *, is_told: bool = False) -> Result:
    """Play one seed. The same seed always comes to the same."""
    with quiet_logs():
        return World(draw_scenario(seed), is_told=is_told).run()


def run_seeds(
    seeds: Sequence[int], *, num_jobs: int = 1, on_done: Callable[[int], None] = lambda count: None
) -> Report:
    """Play many seeds; `on_done(count)` is called as they are done."""
    report = Report()
    chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    if num_jobs == 1:
        for chunk in chunks:
            report.add(_run_chunk(chunk))
            on_done(len(chunk))
        return report
    executor = ProcessPoolExecutor(num_jobs, mp_context=get_context("spawn"), initializer=_begin_worker)
    try:
        futures = {executor.submit(_run_chunk, chunk): len(chunk) for chunk in chunks}
        for future in as_completed(futures):
            report.add(future.result())
            on_done(futures[future])
    finally:
        executor.shutdown(cancel_futures=True)
    report.failures.sort()
    return report


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and ends this process


def _run_chunk(seeds: Sequence[int]) -> Report:
    report = Report()
    for seed in seeds:
        try:
            report.add_result(run_seed(seed))
        except Exception as error:
            error.add_note(f"in the simulator itself, at seed {seed}")
            raise
    return report


@contextmanager
def quiet_logs() -> Iterator[None]:
    """No log lines of the code under test: faults are what a run is made of."""
    logger = logging.getLogger("transfer")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
