"""Requests that fail, are cancelled or run out of time: a typed error each, nothing left behind, others unharmed."""

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from language_worker import intake, roster
from language_worker.active import ActiveRequest
from language_worker.api import MAX_DEADLINE_MS, GenerateRequest
from language_worker.errors import (
    Cancelled,
    DeadlineExceeded,
    EngineStopped,
    InvalidRequest,
    MediaFailed,
    MediaMismatch,
    MediaTooLarge,
    PromptTooLong,
    QueueFull,
    StepFailed,
)
from language_worker.media import MediaRows
from language_worker.outputs import PromptCollector
from language_worker.sampling_params import SamplingParams
from language_worker.scheduler import Scheduler
from language_worker.stop import StopChecker
from tests.language_worker.helpers import GREEDY, ManualClock, Media, Results, drive, make_engine, prompt, request
from tests.tiny_tokenizer import TOKEN_IDS

PAD = TOKEN_IDS["<|image_pad|>"]
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


def _assert_empty(engine) -> None:
    stats = engine.stats()
    for name in ("num_requests_running", "num_requests_waiting", "kv_pages_referenced", "input_buffer_rows_reserved"):
        assert stats[name] == 0, name
    engine.scheduler.check_invariants()


@pytest.mark.parametrize(
    ("ids", "values", "error", "words"),
    [
        ((1, 5000), {}, InvalidRequest, "5000"),
        ((1, PAD), {}, MediaMismatch, "1 media placeholders and 0"),
        ((1, 2), {"num_media": 1}, MediaMismatch, "0 media placeholders and 1"),
        (prompt(512), {}, PromptTooLong, "512"),
        ((1,), {"sampling": SamplingParams(logit_bias={9999: 1.0})}, InvalidRequest, "logit_bias"),
        ((1,), {"sampling": SamplingParams(stop_token_ids=[9999])}, InvalidRequest, "stop_token_ids"),
    ],
)
def test_bad_requests_fail_precisely_and_alone(ids, values, error, words, tiny: Path) -> None:
    engine = make_engine(tiny)
    results = drive(engine, [request("bad", ids, **values), request("good", prompt(4))])
    assert type(results["bad"].error) is error
    assert words in str(results["bad"].error)
    assert results["good"].done is not None
    _assert_empty(engine)


def test_longest_prompt_that_fits_gets_its_one_token(tiny: Path) -> None:
    result = drive(make_engine(tiny), [request("a", prompt(511), SamplingParams(temperature=0))])["a"]
    assert len(result.tokens()) == 1 and result.last().finish_reason == "length"


def test_max_tokens_none_runs_to_the_maximum_length(tiny: Path) -> None:
    sampling = SamplingParams(temperature=0, ignore_eos=True)
    result = drive(make_engine(tiny, max_model_len=64), [request("a", prompt(10), sampling)])["a"]
    assert len(result.tokens()) == 54


@pytest.mark.parametrize(
    ("total", "items", "error"),
    [
        (4, [{"grid": [1, 4, 4], "rows": 4}] * 2, MediaMismatch),
        (5, [{"grid": [1, 4, 4], "rows": 4}], MediaMismatch),
        (5, [{"grid": [1, 4, 4], "rows": 5}], MediaMismatch),
        (4, [{"grid": [1, 4], "rows": 4}], MediaMismatch),
        (4, [{"rows": 4}], MediaMismatch),
        (4, ["nonsense"], MediaMismatch),
        (400, [{"grid": [1, 40, 40], "rows": 400}], MediaTooLarge),
    ],
)
def test_announcements_that_do_not_add_up(total, items, error, tiny: Path) -> None:
    engine = make_engine(tiny, rows=100)
    engine.submit(request("bad", (1, PAD, 2), num_media=1))
    engine.announce("bad", total, items)
    results = drive(engine, [request("good", prompt(4))])
    assert type(results["bad"].error) is error
    assert results["good"].done is not None
    _assert_empty(engine)


def test_expanded_prompt_too_long(tiny: Path) -> None:
    engine = make_engine(tiny)
    engine.submit(request("a", (1, PAD, 2), num_media=1))
    engine.announce("a", 600, [{"grid": [1, 40, 60], "rows": 600}])
    results = drive(engine, [])
    assert type(results["a"].error) is PromptTooLong and "602" in str(results["a"].error)


def test_input_buffer_is_granted_whole_and_oldest_first(tiny: Path) -> None:
    """Three requests of 14 rows over a buffer of 20: one at a time, in order of submission."""
    engine = make_engine(tiny, rows=20)
    names = ["a", "b", "c"]
    media = {n: Media(grids=[(1, 4, 6), (1, 8, 4)], rows=torch.randn(14, 64)) for n in names}
    for n in names:
        engine.submit(request(n, (1, PAD, 2, PAD), num_media=2))
    for n in reversed(names):
        engine.announce(n, 14, media[n].items())
    order, results, idle = [], Results(), 0
    while idle < 2:
        report = engine.step()
        for n in results.take(report):
            order.append(n)
            engine.media_buffer(n).write(0, media[n].rows)
        assert engine.stats()["input_buffer_rows_reserved"] <= 20
        idle = 0 if report.did_run else idle + 1
    assert order == names
    assert all(results[n].done for n in names)
    _assert_empty(engine)


def test_a_request_that_fails_when_it_has_room_leaves_it_to_the_next(tiny: Path) -> None:
    """The logits of the first are too large to return, which shows when its rows are reserved. Nothing but the step
    that says so could wake the engine for the second."""
    engine = make_engine(tiny, rows=4, max_logits_bytes=4096)
    for name, values in (("bad", {"return_logits": True}), ("good", {})):
        engine.submit(request(name, (1, PAD, 2), num_media=1, **values))
        engine.announce(name, 4, [{"grid": [1, 4, 4], "rows": 4}])
    results, admitted = Results(), []
    while (report := engine.step()).did_run:
        admitted += results.take(report)
    assert type(results["bad"].error) is InvalidRequest and "good" in admitted


def test_a_broken_stream_fails_its_request_only(tiny: Path) -> None:
    engine = make_engine(tiny)
    engine.submit(request("bad", (1, 2, 3, PAD), num_media=1))
    engine.announce("bad", 4, [{"grid": [1, 4, 4], "rows": 4}])
    engine.submit(request("good", prompt(4)))
    assert engine.step().did_run
    engine.fail("bad", MediaFailed("the embedding stream of request bad broke: PeerLost"))
    results = drive(engine, [])
    assert type(results["bad"].error) is MediaFailed
    assert results["good"].done is not None
    _assert_empty(engine)


def test_rows_out_of_order_or_too_many_are_refused(tiny: Path) -> None:
    engine = make_engine(tiny)
    engine.submit(request("a", (1, PAD), num_media=1))
    engine.announce("a", 4, [{"grid": [1, 4, 4], "rows": 4}])
    engine.step()
    buffer = engine.media_buffer("a")
    for first, rows in [(1, torch.zeros(1, 64)), (0, torch.zeros(5, 64)), (0, torch.zeros(2, 63))]:
        with pytest.raises(MediaFailed):
            buffer.write(first, rows)
    assert buffer.num_filled == 0


def test_deadline(tiny: Path) -> None:
    clock = ManualClock()
    engine = make_engine(tiny, clock=clock)
    engine.submit(request("late", prompt(4), LONG, deadline_ms=500))
    engine.submit(request("media", (1, PAD), LONG, num_media=1, deadline_ms=500))
    engine.submit(request("free", prompt(4), LONG))
    results = Results()
    for _ in range(5):
        results.take(engine.step())
    clock.now += 0.499
    results.take(engine.step())
    assert results["late"].error is None
    clock.now += 0.002
    results.take(engine.step())
    assert type(results["late"].error) is DeadlineExceeded
    assert type(results["media"].error) is DeadlineExceeded
    assert results["free"].error is None
    assert len(results["late"].tokens()) >= 5


@pytest.mark.parametrize("deadline_ms", [MAX_DEADLINE_MS, 2**63 - 1])
def test_a_deadline_that_is_accepted_can_be_waited_for(deadline_ms: int, tiny: Path) -> None:
    """One that no thread can wait for would end the engine's, and everybody with it."""
    engine, lock = make_engine(tiny), threading.Lock()
    waits: list[float] = []
    engine._wake.wait = waits.append  # type: ignore[method-assign, assignment]
    try:
        engine.submit(request("a", (1, PAD), LONG, num_media=1, deadline_ms=deadline_ms))
    except InvalidRequest:
        assert deadline_ms > MAX_DEADLINE_MS
        return
    engine.step()
    engine.wait()
    assert waits[0] > 0 and lock.acquire(timeout=waits[0])


def test_queue_full(tiny: Path) -> None:
    engine = make_engine(tiny, max_waiting=3)
    results = drive(engine, [request(f"r{i}", prompt(4)) for i in range(5)])
    assert [type(results[f"r{i}"].error) for i in range(5)] == [type(None)] * 3 + [QueueFull] * 2


def test_a_request_id_cannot_run_twice(tiny: Path) -> None:
    engine = make_engine(tiny)
    engine.submit(request("a", prompt(4)))
    engine.submit(request("a", prompt(4)))
    report = engine.step()
    assert [type(o.error) for o in report.outputs if hasattr(o, "error")] == [InvalidRequest]


def test_close_fails_what_is_left(tiny: Path) -> None:
    engine = make_engine(tiny)
    engine.submit(request("a", prompt(4), LONG))
    engine.step()
    engine.submit(request("b", prompt(4), LONG))
    failed = {o.request_id: type(o.error) for o in engine.close()}
    assert failed == {"a": EngineStopped, "b": EngineStopped}
    _assert_empty(engine)


@pytest.mark.parametrize("seed", range(6))
def test_cancel_at_random_points_leaves_nothing(seed: int, tiny: Path) -> None:
    rng = random.Random(seed)
    engine = make_engine(tiny, page_size=4, kv_cache_tokens=4 * 40, max_model_len=4 * 30, max_prefill_chunk=5)
    names = [f"r{i}" for i in range(12)]
    for i, n in enumerate(names):
        sampling = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, n=1 + i % 2)
        engine.submit(request(n, (*prompt(1 + i * 3, i), PAD), sampling, num_media=1))
        if i % 4:
            engine.announce(n, 4, [{"grid": [1, 4, 4], "rows": 4}])
    results = Results()
    pending = list(names)
    while pending:
        for n in results.take(engine.step()):
            engine.media_buffer(n).write(0, torch.randn(4, 64))
        engine.scheduler.check_invariants()
        if rng.random() < 0.3:
            engine.cancel(pending.pop(rng.randrange(len(pending))))
    results.take(engine.step())
    assert all((results[n].done is None) != (results[n].error is None) for n in names)
    assert all(r.error is None or type(r.error) is Cancelled for r in results.values())
    _assert_empty(engine)


def test_a_step_that_raises_for_one_request_harms_no_other(tiny: Path) -> None:
    engine = make_engine(tiny)
    names = [f"r{i}" for i in range(4)]
    healthy = drive(make_engine(tiny), [request(n, prompt(5, i)) for i, n in enumerate(names)])
    forward, poison = engine.runner.model.forward, prompt(5, 2)[0]
    raised = 0

    def fail_on_poison(inputs, caches):
        nonlocal raised
        if poison in inputs.token_ids.tolist():
            raised += 1
            raise RuntimeError("bad kernel")
        return forward(inputs, caches)

    engine.runner.model.forward = fail_on_poison
    results = drive(engine, [request(n, prompt(5, i)) for i, n in enumerate(names)])
    assert raised >= 2, "the fault must have fired in the batch and alone"
    assert type(results["r2"].error) is StepFailed and "bad kernel" in str(results["r2"].error)
    for n in ("r0", "r1", "r3"):
        if poison not in (*healthy[n].tokens(), *prompt(5, int(n[1]))):
            assert results[n].tokens() == healthy[n].tokens()
    _assert_empty(engine)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(seed=3, max_tokens=12, ignore_eos=True, top_k=20)])
def test_logits_that_are_not_finite_fail_their_request_alone(
    wrong: float, sampling: SamplingParams, tiny: Path
) -> None:
    """In the middle of its answer; no token is made up."""
    engine = make_engine(tiny)
    forward, poisoned = engine.runner.model.forward, []

    def poison(inputs, caches):
        logits = forward(inputs, caches)
        row = next((i for i, lens in enumerate(inputs.attention.kv_lens) if lens == 23), None)
        if row is not None and logits.shape[0] == len(inputs.attention.kv_lens):
            poisoned.append(row)
            logits[row] = wrong
        return logits

    engine.runner.model.forward = poison
    asked = [request("good", prompt(5), sampling), request("bad", prompt(20, 1), sampling)]
    results = drive(engine, asked)
    assert len(poisoned) == 2, "in the batch and alone"
    assert type(results["bad"].error) is StepFailed and "not finite" in str(results["bad"].error)
    healthy = drive(make_engine(tiny), asked)
    assert results["bad"].tokens() == healthy["bad"].tokens()[:3]
    assert results["good"].tokens() == healthy["good"].tokens()
    _assert_empty(engine)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (ActiveRequest, "report"),
        (ActiveRequest, "take_prompt_logprobs"),
        (StopChecker, "push"),
        (PromptCollector, "add"),
        (Scheduler, "commit"),
        (Scheduler, "fork"),
    ],
)
def test_what_fails_while_results_are_handed_out_fails_its_request_alone(
    kind: type, name: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both of its samples end; the others of the step, before and behind it, go on."""
    engine, broken = make_engine(tiny), []
    original = getattr(kind, name)

    def break_once(self: Any, *args: Any) -> Any:
        broken.append(name)
        if len(broken) == 2:
            raise RuntimeError("a bug behind the step")
        return original(self, *args)

    sampling = SamplingParams(temperature=0, max_tokens=6, n=2, prompt_logprobs=1, ignore_eos=True)
    asked = [request(f"r{i}", prompt(4, i), sampling) for i in range(3)]
    healthy = drive(make_engine(tiny), asked)
    monkeypatch.setattr(kind, name, break_once)
    results = drive(engine, asked)
    failed = [name for name, result in results.items() if result.error is not None]
    assert len(failed) == 1 and len(broken) > 2
    assert type(results[failed[0]].error) is StepFailed and "a bug behind the step" in str(results[failed[0]].error)
    for name in set(healthy) - set(failed):
        assert results[name].done is not None
        assert [results[name].tokens(i) for i in range(2)] == [healthy[name].tokens(i) for i in range(2)]
    _assert_empty(engine)


def test_a_request_whose_rows_find_no_memory_fails_alone(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: object, **__: object) -> MediaRows:
        monkeypatch.setattr(roster, "MediaRows", MediaRows)
        raise torch.OutOfMemoryError("no memory for the rows")

    monkeypatch.setattr(roster, "MediaRows", allocate)
    engine = make_engine(tiny)
    media = {n: Media(grids=[(1, 4, 4)], rows=torch.randn(4, 64)) for n in ("first", "second")}
    asked = [request(n, (1, PAD, 2), num_media=1) for n in media]
    results = drive(engine, [*asked, request("text", prompt(4))], media)
    assert type(results["first"].error) is StepFailed and "no memory for the rows" in str(results["first"].error)
    assert results["second"].done is not None and results["text"].done is not None
    _assert_empty(engine)


def test_an_intake_that_raises_anything_fails_its_request_only(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = intake.check_request

    def check_or_break(wanted: GenerateRequest, *rest: Any, **named: Any) -> None:
        if wanted.request_id == "bad":
            raise RuntimeError("a bug in a check")
        check(wanted, *rest, **named)

    monkeypatch.setattr(intake, "check_request", check_or_break)
    engine = make_engine(tiny)
    results = drive(engine, [request("bad", prompt(4)), request("good", prompt(4))])
    assert type(results["bad"].error) is StepFailed and "a bug in a check" in str(results["bad"].error)
    assert results["good"].done is not None
    _assert_empty(engine)
