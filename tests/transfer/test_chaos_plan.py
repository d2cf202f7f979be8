"""The fault plan: pure, seeded, and blind to how the reads fall; every fault does what its description says."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.chaos.plan import Cut, Direction, FaultPlan, Faults, LinkPlan, Pace, Pass, Swallow
from transfer.errors import ConfigError

UP, DOWN = Direction.UP, Direction.DOWN


def feed_all(link: LinkPlan, data: bytes, sizes: list[int], direction: Direction = UP) -> tuple[bytes, str | None, int]:
    """(bytes delivered, why it was cut, bytes swallowed) when the data comes in reads of these sizes, in turn."""
    delivered, reason, swallowed, start, turn = b"", None, 0, 0, 0
    while start < len(data):
        piece = data[start : start + sizes[turn % len(sizes)]]
        start, turn = start + len(piece), turn + 1
        steps = link.feed(direction, piece)
        passed = sum(len(step.data) for step in steps if isinstance(step, Pass))
        assert passed + sum(step.num_bytes for step in steps if isinstance(step, Swallow)) == len(piece)
        for step in steps:
            if isinstance(step, Pass):
                assert reason is None, "bytes passed after the cut"
                delivered += step.data
            elif isinstance(step, Cut):
                assert reason is None, "cut twice"
                reason = step.reason
            else:
                swallowed += step.num_bytes
    return delivered, reason, swallowed


faults_strategy = st.builds(
    Faults,
    drop=st.sampled_from([0.0, 0.05, 1.0]),
    corrupt=st.sampled_from([0.0, 0.3, 1.0]),
    cut_after_bytes=st.sampled_from([0, 1, 999, 1000, 5000]),
    cut_every_bytes=st.sampled_from([0, 1, 64, 1000, 1001]),
    segment_bytes=st.sampled_from([1, 7, 64, 1000]),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    faults=faults_strategy,
    seed=st.integers(0, 10**6),
    num_bytes=st.integers(0, 3000),
    one=st.lists(st.integers(1, 2000), min_size=1, max_size=5),
    two=st.lists(st.integers(1, 2000), min_size=1, max_size=5),
)
def test_what_is_delivered_does_not_hang_on_how_the_reads_fall(
    faults: Faults, seed: int, num_bytes: int, one: list[int], two: list[int]
) -> None:
    data = random.Random(seed).randbytes(num_bytes)
    results = [feed_all(FaultPlan(faults, seed).link(), data, sizes)[:2] for sizes in (one, two)]
    assert results[0] == results[1]
    delivered, reason = results[0]
    differing = [a ^ b for a, b in zip(delivered, data, strict=False) if a != b]
    assert all(bits.bit_count() == 1 for bits in differing), "one bit per corrupted byte"
    if not faults.corrupt:
        assert not differing
    if reason is None:
        assert len(delivered) == num_bytes
    elif reason in ("cut_after", "cut_every"):
        assert len(delivered) == getattr(faults, f"{reason}_bytes")


def test_without_faults_everything_passes_at_once() -> None:
    plan = FaultPlan(Faults())
    assert plan.link().feed(UP, b"abc") == [Pass(b"abc")]
    assert not plan.fired and Faults().asked_for() == ()


def test_the_seed_decides_and_links_differ() -> None:
    data = bytes(4000)
    faults = Faults(corrupt=0.5, segment_bytes=100)

    def run(seed: int) -> list[bytes]:
        plan = FaultPlan(faults, seed)
        return [feed_all(plan.link(), data, [700], direction)[0] for direction in (UP, DOWN, UP)]

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert len(set(run(1))) == 3, "every link and direction has draws of its own"


@pytest.mark.parametrize(("kind", "probability"), [("drop", 0.2), ("corrupt", 0.2), ("corrupt", 1.0)])
def test_probabilities_are_per_segment(kind: str, probability: float) -> None:
    plan = FaultPlan(Faults(**{kind: probability}, segment_bytes=50), 3)
    num_segments = 0
    for _ in range(400):
        delivered, reason, swallowed = feed_all(plan.link(), bytes(1000), [333])
        num_segments += -(-len(delivered) // 50) if reason else 20
        assert reason in (None, "drop")
        assert len(delivered) + swallowed == 1000 and (swallowed > 0) == (reason == "drop")
    expected = probability * num_segments
    assert abs(plan.fired[kind] - expected) < 5 * (num_segments * probability * (1 - probability)) ** 0.5 + 25


def test_cut_after_happens_once_and_counts_all_links() -> None:
    plan = FaultPlan(Faults(cut_after_bytes=250))
    first, second, third = plan.link(), plan.link(), plan.link()
    assert feed_all(first, bytes(100), [30]) == (bytes(100), None, 0)
    assert feed_all(second, bytes(400), [60], DOWN) == (bytes(150), "cut_after", 250)
    assert feed_all(first, bytes(500), [60]) == (bytes(500), None, 0)
    assert feed_all(third, bytes(500), [60]) == (bytes(500), None, 0)
    assert plan.fired == {"cut_after": 1}


@pytest.mark.parametrize("name", ["cut_after", "cut_every"])
def test_a_cut_does_not_wait_for_the_byte_after_it(name: str) -> None:
    link = FaultPlan(Faults(**{f"{name}_bytes": 100})).link()  # type: ignore[arg-type]
    assert link.feed(UP, bytes(99)) == [Pass(bytes(99))]
    assert link.feed(UP, bytes(1)) == [Pass(bytes(1)), Cut(name)]


def test_cut_every_counts_each_link_by_itself_both_ways() -> None:
    plan = FaultPlan(Faults(cut_every_bytes=100))
    for _ in range(3):
        link = plan.link()
        assert feed_all(link, bytes(60), [7], DOWN) == (bytes(60), None, 0)
        assert feed_all(link, bytes(50), [9]) == (bytes(40), "cut_every", 10)
        assert link.feed(DOWN, b"late") == [Swallow(4)]
    assert plan.fired == {"cut_every": 3}


def test_a_direction_that_is_left_alone_neither_suffers_nor_counts() -> None:
    plan = FaultPlan(Faults(corrupt=1.0, drop=0.0, cut_every_bytes=100, delay_ms=5, segment_bytes=10, direction="up"))
    link = plan.link()
    assert link.feed(DOWN, bytes(1000)) == [Pass(bytes(1000))]
    assert feed_all(link, bytes(1000), [1000])[1] == "cut_every"


def test_delays_vary_by_segment_within_the_jitter() -> None:
    plan = FaultPlan(Faults(delay_ms=50, jitter_ms=20, segment_bytes=10))
    steps = plan.link().feed(UP, bytes(10000))
    delays = [step.delay_s for step in steps if isinstance(step, Pass)]
    assert len(delays) == 1000 and len(set(delays)) > 900
    assert 0.03 <= min(delays) < 0.033 and 0.067 < max(delays) <= 0.07
    steady = FaultPlan(Faults(delay_ms=50)).link().feed(UP, bytes(100000))
    assert steady == [Pass(bytes(100000), 0.05)]


def test_pace_spreads_bytes_evenly_and_forgives_idleness() -> None:
    pace = Pace(1000)
    assert pace.piece_bytes == 50
    assert pace.wait_s(500, now=10.0) == 0.0
    assert pace.wait_s(500, now=10.0) == pytest.approx(0.5)
    assert pace.wait_s(100, now=10.5) == pytest.approx(0.5)
    assert pace.wait_s(100, now=99.0) == 0.0
    assert Pace(1).piece_bytes == 1


@pytest.mark.parametrize(
    "values",
    [
        {"drop": 1.1}, {"corrupt": -0.1}, {"drop": float("nan")}, {"delay_ms": float("inf")}, {"jitter_ms": 1},
        {"segment_bytes": 0}, {"cut_after_bytes": -1}, {"direction": "sideways"}, {"throttle_bytes_per_s": -5},
    ],
)  # fmt: skip
def test_faults_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Faults(**values)  # type: ignore[arg-type]
