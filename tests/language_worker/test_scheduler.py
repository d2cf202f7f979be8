"""Random traffic against the pure scheduler: invariants after every step, and every sequence ends right."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from language_worker.decode.autoregressive import Autoregressive
from language_worker.errors import InvalidRequest
from language_worker.page_pool import PagePool
from language_worker.prefix_cache import PrefixCache
from language_worker.request import Sequence, Status
from language_worker.scheduler import OVERTAKING_STEPS, Scheduler

PAGE = 4


class Rows:
    """A media buffer that only counts."""

    def __init__(self) -> None:
        self.num_filled = 0


class ToyKV:
    """What a model would see: per physical slot, the token written there last."""

    def __init__(self) -> None:
        self.slots: dict[tuple[int, int], int] = {}

    def run(self, window) -> None:
        """Write the window's tokens into the sequence's pages; then the whole prefix must read back."""
        seq = window.seq
        for p in range(window.start, window.end):
            self.slots[seq.pages[p // PAGE], p % PAGE] = seq.tokens[p]
        read = [self.slots.get((seq.pages[p // PAGE], p % PAGE)) for p in range(window.end)]
        assert read == seq.tokens[: window.end], f"{seq} sees another's or stale KV"


class Aligned(Autoregressive):
    alignment = 3


class Traffic(RuleBasedStateMachine):
    """Adds, steps, row arrivals and aborts in any order."""

    @initialize(
        pages=st.integers(4, 20),
        seats=st.integers(1, 5),
        budget=st.integers(5, 24),
        chunk=st.integers(3, 24),
        partial=st.sampled_from([1, 1, 3, 6]),
    )
    def start(self, pages: int, seats: int, budget: int, chunk: int, partial: int) -> None:
        self.strategy = Aligned() if chunk % 2 else Autoregressive()
        self.scheduler = Scheduler(
            pool=PagePool(pages),
            strategy=self.strategy,
            page_size=PAGE,
            max_num_seqs=seats,
            max_step_tokens=budget,
            max_prefill_chunk=chunk,
            min_partial_chunk=partial,
        )
        self.kv, self.live, self.order = ToyKV(), [], 0

    @rule(prompt=st.integers(1, 16), new=st.integers(1, 8), media=st.integers(0, 5), delay=st.integers(-3, 3))
    def add(self, prompt: int, new: int, media: int, delay: int) -> None:
        self.order += 1
        positions = tuple(range(prompt))[1 : 1 + media]
        seq = Sequence(
            key=(self.order, 0),
            prompt=[self.order * 1000 + i for i in range(prompt)],
            max_len=prompt + new,
            media_positions=positions,
            media=Rows() if positions else None,
            came_at=self.order + delay,
        )
        try:
            self.scheduler.add(seq)
        except InvalidRequest:
            assert -(-seq.max_len // PAGE) > self.scheduler.pool.num_pages
        else:
            self.live.append(seq)

    @rule()
    def step(self) -> None:
        self._step()

    def _step(self) -> int:
        could_run = any(seq.is_ready for seq in self.scheduler.running)
        plan = self.scheduler.plan()
        assert plan.windows or not could_run, "a running sequence has all its inputs and nothing runs"
        assert plan.num_tokens <= self.scheduler.max_step_tokens
        assert len({w.seq.key for w in plan.windows}) == len(plan.windows), "a sequence is planned twice"
        for window in plan.windows:
            seq = window.seq
            assert seq.status is Status.RUNNING and window.start == seq.kv_len < window.end <= seq.ready_len
            assert window.length <= self.scheduler.max_prefill_chunk
            assert window.end == len(seq.tokens) or window.end % self.strategy.alignment == 0 or seq.media is not None
            self.kv.run(window)
        for window in plan.windows:
            seq = window.seq
            self.scheduler.commit(window, [seq.key[0] * 1000 + len(seq.tokens)] if window.samples else [])
            if len(seq.tokens) == seq.max_len:
                self._end(seq)
        for seq in plan.preempted:
            older = [s for s in self.scheduler.running if s.key > seq.key and s not in [w.seq for w in plan.windows]]
            assert not older or seq.status is Status.WAITING
        return len(plan.windows)

    def _end(self, seq: Sequence) -> None:
        assert seq.tokens == [seq.key[0] * 1000 + i for i in range(len(seq.tokens))]
        self.scheduler.end(seq)
        self.live.remove(seq)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99))
    def rows_arrive(self, pick: int) -> None:
        seq = self.live[pick % len(self.live)]
        if seq.media is not None and seq.media.num_filled < len(seq.media_positions):
            seq.media.num_filled += 1

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99))
    def abort(self, pick: int) -> None:
        seq = self.live.pop(pick % len(self.live))
        self.scheduler.end(seq)
        self.scheduler.end(seq)

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_invariants()

    def teardown(self) -> None:
        """No livelock: with all rows there, everything ends within a bound of steps."""
        if not hasattr(self, "scheduler"):
            return
        for seq in self.live:
            if seq.media is not None:
                seq.media.num_filled = len(seq.media_positions)
        bound = 50 + 40 * sum(seq.max_len for seq in self.live)
        while self.live and bound:
            bound -= 1
            assert self._step() or not self.live, "nothing runs while sequences wait"
            self.scheduler.check_invariants()
        assert not self.live, "sequences did not finish"
        assert self.scheduler.pool.num_in_use == 0


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=120, stateful_step_count=40, deadline=None, derandomize=True)


def _scheduler(pages: int, **values) -> Scheduler:
    settings_ = {"page_size": PAGE, "max_num_seqs": 8, "max_step_tokens": 64, **values}
    return Scheduler(pool=PagePool(pages), strategy=Autoregressive(), **settings_)


def _seq(order: int, prompt: int, new: int, came_at: float = 0.0) -> Sequence:
    return Sequence(key=(order, 0), prompt=range(prompt), max_len=prompt + new, came_at=came_at)


def _run(scheduler: Scheduler) -> list[tuple[int, int]]:
    plan = scheduler.plan()
    for window in plan.windows:
        scheduler.commit(window, [1] if window.samples else [])
    return [(w.seq.key[0], w.length) for w in plan.windows]


def test_a_step_mixes_decodes_and_prefill_chunks() -> None:
    scheduler = _scheduler(100, max_step_tokens=16)
    scheduler.add(_seq(1, 4, 20))
    assert _run(scheduler) == [(1, 4)]
    scheduler.add(_seq(2, 40, 5))
    assert _run(scheduler) == [(1, 1), (2, 15)]
    assert _run(scheduler) == [(1, 1), (2, 15)]
    assert _run(scheduler) == [(1, 1), (2, 10)]
    assert _run(scheduler) == [(1, 1), (2, 1)]


def test_the_youngest_gives_way_and_comes_back() -> None:
    scheduler = _scheduler(5)
    old, young = _seq(1, 7, 12), _seq(2, 7, 12)
    scheduler.add(old)
    scheduler.add(young)
    while young.num_preemptions == 0:
        _run(scheduler)
    assert old.num_preemptions == 0 and young.status is Status.WAITING and young.kv_len == 0
    tokens = len(young.tokens)
    assert tokens > 7, "it had generated before it gave way"
    while len(old.tokens) < old.max_len:
        _run(scheduler)
    scheduler.end(old)
    assert _run(scheduler) == [(2, tokens)], "recomputed in one go, prompt and output together"


def test_who_came_first_is_admitted_first_and_gives_way_last() -> None:
    scheduler = _scheduler(5, max_num_seqs=2)
    scheduler.add(_seq(1, 4, 8, came_at=3.0))
    scheduler.add(_seq(2, 4, 8, came_at=2.0))
    scheduler.add(_seq(3, 4, 8, came_at=1.0))
    assert _run(scheduler) == [(3, 4), (2, 4)]
    while not any(seq.num_preemptions for seq in (*scheduler.running, *scheduler.waiting)):
        _run(scheduler)
    assert [seq.key[0] for seq in scheduler.running] == [3]
    assert [seq.key[0] for seq in scheduler.waiting] == [2, 1]


def test_nobody_overtakes_a_waiting_older_request() -> None:
    scheduler = _scheduler(6)
    scheduler.add(_seq(1, 12, 4))
    _run(scheduler)
    scheduler.add(_seq(2, 15, 4))
    scheduler.add(_seq(3, 2, 2))
    assert [key for key, _ in _run(scheduler)] == [1]


def test_a_sequence_that_waits_for_rows_gives_way_to_one_that_can_run() -> None:
    scheduler = _scheduler(4, max_num_seqs=1)
    rows = Rows()
    slow = Sequence(key=(1, 0), prompt=range(8), max_len=12, media_positions=(3,), media=rows)
    scheduler.add(slow)
    assert _run(scheduler) == [(1, 3)]
    scheduler.add(_seq(2, 5, 2))
    assert _run(scheduler) == [(2, 5)] and slow.status is Status.WAITING
    assert _run(scheduler) == [(2, 1)]
    scheduler.end(scheduler.running[0])
    assert _run(scheduler) == [(1, 3)], "with nobody else ready it may begin again"
    rows.num_filled = 1
    assert _run(scheduler) == [(1, 5)]


def test_a_sequence_of_this_step_gives_way_to_nobody() -> None:
    """What an older prefill leaves of a step may be less than rows are waited for otherwise, and is taken."""
    scheduler = _scheduler(45, page_size=32, max_step_tokens=1024, min_partial_chunk=64)
    filled = []
    for order, (prompt, first, last) in enumerate([(1000, 10, 990), (400, 50, 390)]):
        filled.append(Rows())
        positions = tuple(range(first, last))
        scheduler.add(
            Sequence(
                key=(order, 0),
                prompt=range(prompt),
                max_len=prompt + 10,
                media_positions=positions,
                media=filled[-1],
            )
        )
    assert not scheduler.plan().windows
    filled[0].num_filled = 980
    scheduler.add(_seq(2, 40, 10))
    plan = scheduler.plan()
    assert [(w.seq.key[0], w.length) for w in plan.windows] == [(0, 1000), (1, 24)]
    assert all(w.seq.status is Status.RUNNING for w in plan.windows) and not plan.preempted


@pytest.mark.parametrize("long", [100, 65, 1000])
@pytest.mark.parametrize("others", [64, 60, 33, 2])
def test_a_prompt_longer_than_a_step_is_overtaken_for_a_few_steps_only(long: int, others: int) -> None:
    """Others of a step each at most keep coming, each answered with one token."""
    scheduler = _scheduler(1000, max_step_tokens=64, min_partial_chunk=16)
    orders = itertools.count()
    patient: Sequence | None = None
    for step in range(60):
        while sum(seq is not patient for seq in scheduler.waiting) < 3:
            first = next(orders)
            scheduler.add(_seq(first, 32 if first == 0 else others, 1))
        if step == 3:
            patient = _seq(next(orders), long, 1)
            scheduler.add(patient)
        for window in scheduler.plan().windows:
            scheduler.commit(window, [1] if window.samples else [])
            if len(window.seq.tokens) == window.seq.max_len:
                scheduler.end(window.seq)
        if patient is not None and patient.status is not Status.WAITING:
            break
    assert step < 3 + 4 * OVERTAKING_STEPS, f"admitted only in step {step}"


def test_a_sequence_that_still_computes_gives_way_to_nobody() -> None:
    scheduler = _scheduler(4, max_num_seqs=1)
    scheduler.add(_seq(2, 5, 4))
    _run(scheduler)
    scheduler.add(_seq(1, 5, 2))
    assert [key for key, _ in _run(scheduler)] == [2]


def test_a_decode_takes_its_page_from_a_sequence_that_only_waits_for_rows() -> None:
    """Even from an older one: taking it from itself would leave nobody to run until the rows arrive."""
    scheduler = _scheduler(4)
    rows = Rows()
    slow = Sequence(key=(1, 0), prompt=range(7), max_len=12, media_positions=(2, 3), media=rows)
    scheduler.add(slow)
    scheduler.add(_seq(2, 6, 10))
    assert _run(scheduler) == [(2, 6), (1, 2)]
    assert [_run(scheduler) for _ in range(9)] == [[(2, 1)]] * 9, "it decodes to its end without a pause"
    assert slow.num_preemptions == 1 and scheduler.running[0].num_preemptions == 0
    scheduler.end(scheduler.running[0])
    rows.num_filled = 2
    assert _run(scheduler) == [(1, 7)]


def test_with_nobody_waiting_for_rows_the_youngest_gives_way() -> None:
    scheduler = _scheduler(5)
    rows = Rows()
    first = Sequence(key=(1, 0), prompt=range(7), max_len=12, media_positions=(2,), media=rows)
    scheduler.add(first)
    scheduler.add(_seq(2, 6, 10))
    rows.num_filled = 1
    young = scheduler.waiting[1]
    while not scheduler.plan().preempted:
        _run(scheduler)
    assert young.num_preemptions == 1 and first.num_preemptions == 0


def test_prompts_whose_logits_are_wanted_share_what_a_step_may_compute_of_them() -> None:
    scheduler = _scheduler(100, max_prompt_logits=10)
    for order, length in ((1, 13), (2, 12), (3, 30)):
        seq = _seq(order, length, 2)
        seq.wants_prompt_logits = order < 3
        scheduler.add(seq)
    assert _run(scheduler) == [(1, 10), (3, 30)]
    assert _run(scheduler) == [(3, 1), (1, 3), (2, 7)]
    assert _run(scheduler) == [(1, 1), (3, 1), (2, 5)]


def test_a_short_prompt_does_not_stand_behind_a_long_one() -> None:
    scheduler = _scheduler(4000, max_step_tokens=256)
    scheduler.add(_seq(1, 8000, 2))
    assert _run(scheduler) == [(1, 256)], "alone it takes the whole step"
    scheduler.add(_seq(2, 10, 2))
    assert _run(scheduler) == [(1, 246), (2, 10)], "and what the others leave"
    assert _run(scheduler) == [(2, 1), (1, 255)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    budget=st.integers(4, 300),
    longs=st.lists(st.integers(20, 900), min_size=1, max_size=3),
    short=st.integers(1, 40),
    head_start=st.integers(0, 3),
)
def test_how_long_a_prompt_waits_behind_longer_ones(budget: int, longs: list[int], short: int, head_start: int) -> None:
    """At most for those before it that fit into a step, each and itself at three quarters of a quarter of one; and no
    budget is ever left over."""
    scheduler = _scheduler(2000, max_step_tokens=budget)
    for order, length in enumerate(longs):
        scheduler.add(_seq(order, length, 1))
    for _ in range(head_start):
        _steps_of(scheduler)
    scheduler.add(_seq(99, short, 1))
    rate = budget // 4 - budget // 16
    num_steps, ended = 0, -1
    while scheduler.running or scheduler.waiting:
        num_steps += 1
        last = _steps_of(scheduler)
        ended = num_steps if 99 in last else ended
        if 0 in last:
            assert head_start + num_steps <= -(-longs[0] // (budget - budget // 4)), "the oldest has three quarters"
    if rate and short <= budget:
        before = [length for length in longs if length <= budget]
        assert ended <= sum(-(-length // rate) for length in (*before, short)) + len(longs)


@pytest.mark.parametrize(("num_prompts", "shared"), [(2, 800), (8, 800), (16, 400)])
def test_prompts_that_begin_alike_cost_little_more_than_one(num_prompts: int, shared: int) -> None:
    """Who comes behind a long prompt does not begin before that is there to be shared."""
    pool = PagePool(2000)
    scheduler = Scheduler(
        pool=pool,
        strategy=Autoregressive(),
        page_size=4,
        max_num_seqs=32,
        max_step_tokens=200,
        prefix_cache=PrefixCache(pool, 4, b"root"),
    )
    prompts = [[*range(shared), *(1000 + i for _ in range(5))] for i in range(num_prompts)]
    for i, prompt in enumerate(prompts):
        scheduler.add(Sequence(key=(i, 0), prompt=prompt, max_len=len(prompt) + 1))
    num_computed = 0
    while scheduler.running or scheduler.waiting:
        plan = scheduler.plan()
        num_computed += plan.num_tokens
        for window in plan.windows:
            scheduler.commit(window, [1] if window.samples else [])
            if window.samples:
                scheduler.end(window.seq)
    assert num_computed <= shared + num_prompts * (5 + 4) + 2 * 200, "the steps in which the first ended, and pages"


def _steps_of(scheduler: Scheduler) -> list[int]:
    """Run a step and end what got its token; returns who did."""
    missing = sum(seq.missing for seq in (*scheduler.running, *scheduler.waiting))
    plan, ended = scheduler.plan(), []
    assert plan.num_tokens == min(missing, scheduler.max_step_tokens), "budget is left over"
    for window in plan.windows:
        scheduler.commit(window, [1] if window.samples else [])
        if window.samples:
            ended.append(window.seq.key[0])
            scheduler.end(window.seq)
    scheduler.check_invariants()
    return ended
