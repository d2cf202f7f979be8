"""A request that crashes whoever runs it: it is given up before it has had every worker, and the others are answered.

With workers that do what a test says, as in `test_handoff`, and with engines that break at a poisoned prompt.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import Queue
from typing import Any

import httpx
import pytest

from cluster.config import GatewayConfig
from cluster.demo import MODEL_DIR
from cluster.directory import WorkerAddress, WorkerDirectory
from cluster.errors import CrashingRequest, RequestTimeout, http_error
from cluster.gateway_server import GatewayServer
from cluster.handoff import Handoff
from cluster.model_info import ModelInfo
from cluster.monitor import WorkerMonitor
from cluster.served import ServedRequest
from language_worker.config import EngineConfig
from language_worker.sampling_params import SamplingParams
from language_worker.worker import LanguageWorker
from tests.cluster.fake_workers import PATIENT, FakeWorker, Names, send_tokens
from tests.cluster.test_handoff import IMAGES, QUICK, WAIT_S, Loss, MakeRig, Outcome, Rig, _serve, lose, make_rig
from tests.tiny_text_models import make_text_model
from transfer.endpoints.endpoint import open_endpoint
from transfer.protocol.messages import Parts
from transfer.service.service import Service

__all__ = ["lose", "make_rig"]  # the fixtures


def _ping(rig: Rig, worker: FakeWorker) -> None:
    """Until the worker's answers to all pings that left before have come."""
    is_answered = threading.Event()
    connection = rig.directory.connection(worker.entry)
    rig.service.call(connection, "ping", {}, on_end=lambda body, failure: is_answered.set())
    assert is_answered.wait(WAIT_S)


def _crash(rig: Rig, worker: FakeWorker) -> None:
    """Its process is gone, and the monitor says so."""
    _ping(rig, worker)
    rig.directory.set_alive(worker.entry, False)
    rig.lose(worker)


def _only(rig: Rig, *alive: FakeWorker) -> None:
    """Requests go to these language workers."""
    for worker in rig.language:
        rig.directory.set_alive(worker.entry, worker in alive)


@pytest.mark.parametrize("how", ["its process dies", "its engine breaks"])
def test_a_request_that_ran_at_two_crashes_gets_no_third_worker(make_rig: MakeRig, how: str) -> None:
    rig = make_rig(num_language=4)
    outcome, _ = rig.submit()
    for worker in rig.language[:2]:
        call = worker.take("generate")
        if how == "its process dies":
            _crash(rig, worker)
        else:
            call.fail("EngineFailed", "no more")
    error = outcome.wait().error
    assert isinstance(error, CrashingRequest) and "language-0, language-1" in str(error)
    assert not any(worker.has_calls() for worker in rig.language)
    assert rig.attempts == ["first", "PeerLost" if how == "its process dies" else "EngineFailed"]
    answer = http_error(error)
    assert answer.status == 422 and "retry-after" not in answer.headers, "clients do not send it again by themselves"
    assert "language-0" not in str(answer.body)


def test_a_link_that_broke_is_no_crash(make_rig: MakeRig) -> None:
    """The first worker answers the monitor all the time."""
    rig = make_rig(num_language=3)
    outcome, _ = rig.submit()
    rig.language[0].take("generate")
    rig.lose(rig.language[0])
    rig.language[1].take("generate")
    _crash(rig, rig.language[1])
    _serve(rig.language[2].take("generate"), 5)
    assert outcome.wait().error is None and outcome.tokens == [5]


@pytest.mark.parametrize("num_language", [2, 3])
def test_a_link_that_broke_after_a_crash_is_none_either(
    make_rig: MakeRig, lose: Callable[[Loss], Loss], num_language: int
) -> None:
    """The second worker lives; a part of its answer was lost."""
    rig = make_rig(num_language=num_language, config=QUICK)
    outcome, _ = rig.submit()
    rig.language[0].take("generate")
    _crash(rig, rig.language[0])
    call = rig.language[1].take("generate")
    _ping(rig, rig.language[1])
    lose(Loss(Parts))
    send_tokens(call, 5)
    send_tokens(call, 6)
    _serve(rig.language[-1].take("generate"), 5, 6, 7)
    assert outcome.wait().error is None and outcome.tokens == [5, 6, 7]


def test_a_worker_that_was_dead_before_the_request_came_did_not_crash_of_it(make_rig: MakeRig) -> None:
    """A node dies with two workers, and the silence of the first is found first."""
    rig = make_rig(num_language=3)
    left = threading.Event()
    rig.handoff = Handoff(rig.service, rig.directory, lambda reason: left.set() if reason == "PeerLost" else None)
    outcome, _ = rig.submit()
    rig.language[0].take("generate")
    rig.language[1].close()
    _crash(rig, rig.language[0])
    assert left.wait(WAIT_S)
    rig.directory.set_alive(rig.language[1].entry, False)
    rig.lose(rig.language[1])
    _serve(rig.language[2].take("generate"), 5)
    assert outcome.wait().error is None and outcome.tokens == [5]


def test_of_a_lost_peer_s_calls_the_monitor_s_ping_may_end_last(make_rig: MakeRig) -> None:
    """The silence ends them in the order in which they left."""
    rig = make_rig(num_language=3)
    outcome, _ = rig.submit()
    for worker in rig.language[:2]:
        worker.take("generate")
        _ping(rig, worker)
        rig.service.call(
            rig.directory.connection(worker.entry),
            "reissue",  # which no fake worker answers by itself
            {},
            on_end=lambda body, failure, entry=worker.entry: rig.directory.set_alive(entry, False),
        )
        worker.take("reissue")
        rig.lose(worker)
    assert isinstance(outcome.wait().error, CrashingRequest)
    assert not rig.language[2].has_calls()


def test_an_image_that_crashes_embedding_workers_is_given_up(make_rig: MakeRig) -> None:
    rig = make_rig(num_language=1, num_embedding=4)
    outcome, _ = rig.submit(IMAGES)
    generate = rig.language[0].take("generate")
    first, _ = rig.embed_call()
    _crash(rig, first)
    rig.language[0].take("reissue").end({"ticket": generate.body["ticket"]})
    second, _ = rig.embed_call()
    _crash(rig, second)
    assert rig.language[0].was_cancelled(generate)
    generate.fail("Cancelled", "as it was told")
    assert isinstance(outcome.wait().error, CrashingRequest)
    assert not any(worker.has_calls() for worker in rig.language + rig.embedding)


class Twice:
    """Two requests that ran together at two crashes, and a third that ran at the second; one worker is left alive."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        first, second, left = rig.language
        _only(rig, first)
        self.one, self.one_running = rig.submit()
        self.two, self.two_running = rig.submit()
        for _ in range(2):
            first.take("generate")
        _only(rig, first, second)
        _crash(rig, first)
        for _ in range(2):
            second.take("generate")
        self.young, _ = rig.submit()
        second.take("generate")
        _only(rig, second, left)
        _crash(rig, second)
        _serve(left.take("generate"), 8)
        assert self.young.wait().tokens == [8], "it is computed anew at once"
        assert not left.has_calls(), "neither of the two may take the last worker down"

    def revive(self, name: str) -> FakeWorker:
        """A worker comes back as another process."""
        reborn = FakeWorker("language", name)
        others = [worker for worker in self.rig.directory.all() if worker.name != name]
        self.rig.language.append(reborn)
        self.rig.directory.replace([reborn.entry, *others])
        return reborn


def test_of_two_that_ran_at_both_crashes_one_is_tried_at_a_time(make_rig: MakeRig) -> None:
    rig = make_rig(num_language=3)
    twice = Twice(rig)
    reborn = twice.revive("language-0")
    call = reborn.take("generate")
    assert not rig.language[2].has_calls(), "the other one waits"
    _serve(call, 5)
    assert twice.one.wait().tokens == [5]
    reborn.take("generate")
    _crash(rig, reborn)
    assert isinstance(twice.two.wait().error, CrashingRequest)
    assert not rig.language[2].has_calls()


def test_when_the_first_to_be_tried_is_named_the_other_waits_no_more(make_rig: MakeRig) -> None:
    rig = make_rig(num_language=3)
    twice = Twice(rig)
    reborn = twice.revive("language-0")
    reborn.take("generate")
    _crash(rig, reborn)
    assert isinstance(twice.one.wait().error, CrashingRequest)
    _serve(rig.language[2].take("generate"), 6)
    assert twice.two.wait().tokens == [6]


def test_a_broken_engine_whose_process_answers_pings_is_no_live_worker(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is the last live worker risked for it, nor do requests go to it."""
    rig = make_rig(num_language=3)
    first, second, left = rig.language
    _only(rig, first)
    for _ in range(2):
        rig.submit()
    for broken, other in ((first, second), (second, left)):
        calls = [broken.take("generate") for _ in range(2)]
        rig.directory.set_alive(other.entry, True)
        for call in calls:
            call.fail("EngineFailed", "no more")
    _ping(rig, second)
    assert rig.handoff._suspects.num_waiting == 2
    answered: Queue[str] = Queue()
    set_alive = rig.directory.set_alive

    def note(worker: WorkerAddress, is_alive: bool) -> bool:
        news = set_alive(worker, is_alive)
        answered.put(worker.name)
        return news

    monkeypatch.setattr(rig.directory, "set_alive", note)
    monitor = WorkerMonitor(rig.service, rig.directory, interval_s=0.01)
    monitor.start()
    try:
        waited_for = {first.name, second.name}
        while waited_for:
            waited_for.discard(answered.get(timeout=WAIT_S))
        for _ in range(2):  # for what was let go on, and for its call
            _ping(rig, left)
        assert rig.handoff._suspects.num_waiting == 2 and not left.has_calls()
        young, _ = rig.submit()
        _serve(left.take("generate"), 5)
        assert young.wait().tokens == [5]
        assert not any(worker.has_calls() for worker in rig.language)
    finally:
        monitor.close()


def test_one_that_cannot_go_on_leaves_the_others_that_are_let_go_with_it(make_rig: MakeRig) -> None:
    """Of three suspects the first is named by its trial, and the other two wait no more."""
    rig = make_rig(num_language=4)
    _only(rig, rig.language[0])
    outcomes = [rig.submit()[0] for _ in range(3)]
    for worker, other in zip(rig.language[:2], rig.language[1:3], strict=True):
        calls = [worker.take("generate") for _ in outcomes]
        rig.directory.set_alive(other.entry, True)
        for call in calls:
            call.fail("EngineFailed", "no more")
    broken = iter([RuntimeError("nobody expected this")])
    trial = rig.language[2]

    def break_once(worker: WorkerAddress) -> None:
        for error in broken:
            raise error

    rig.directory.set_alive(rig.language[3].entry, True)
    call = trial.take("generate")
    rig.directory.before_connection = break_once
    call.fail("EngineFailed", "no more")
    errors = [outcome.wait().error for outcome in outcomes[:2]]
    assert isinstance(errors[0], CrashingRequest) and isinstance(errors[1], RuntimeError)
    _serve(rig.language[3].take("generate"), 5)
    assert outcomes[2].wait().tokens == [5]


def test_who_waits_can_be_cancelled(make_rig: MakeRig) -> None:
    twice = Twice(make_rig(num_language=3))
    twice.one_running.cancel()
    assert twice.one.failure().code == "Cancelled"
    twice.one_running.cancel()
    twice.two_running.cancel()
    assert twice.two.failure().code == "Cancelled"


def test_who_waits_does_so_within_its_deadline(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(num_language=3)
    timers = []

    class Timer(threading.Timer):
        def __init__(self, interval_s: float, function: Any) -> None:
            super().__init__(interval_s, function)
            timers.append((interval_s, function))

    monkeypatch.setattr(threading, "Timer", Timer)
    twice = Twice(rig)
    assert len(timers) == 2 and all(300 < interval_s <= 600 for interval_s, _ in timers)
    for _, pass_deadline in timers:
        pass_deadline()
    assert isinstance(twice.one.wait().error, RequestTimeout) and isinstance(twice.two.wait().error, RequestTimeout)


def test_a_deadline_that_passed_before_the_wait_began_ends_it(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Timer(threading.Timer):
        """Whose time is over as soon as it starts."""

        def start(self) -> None:
            self.function()

    monkeypatch.setattr(threading, "Timer", Timer)
    rig = make_rig(num_language=3)
    twice = Twice(rig)
    for outcome in (twice.one, twice.two):
        assert isinstance(outcome.wait().error, RequestTimeout)
    assert rig.handoff._suspects.num_waiting == 0


def test_the_gateway_answers_it_with_an_error_that_is_final_and_counts_the_attempts() -> None:
    service = Service(open_endpoint(f"inproc://{Names.fresh('gateway')}"), PATIENT)
    config = GatewayConfig(host="127.0.0.1", port=0)
    server = GatewayServer(config, "model", ModelInfo.load(str(MODEL_DIR)), 512, service)
    with ExitStack() as stack:
        workers = [stack.enter_context(FakeWorker("language", f"language-{i}")) for i in range(3)]
        stack.callback(server.close)
        server.start([worker.entry for worker in workers])
        url = f"http://127.0.0.1:{server.port}"
        body = {"model": "model", "prompt": "hi", "max_tokens": 2}
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=2 * WAIT_S)
            for worker in workers[:2]:
                worker.take("generate").fail("EngineFailed", "no more")
            answer = asked.result()
        page = httpx.get(f"{url}/metrics", timeout=WAIT_S).text
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "crashing_request"
    assert not workers[2].has_calls()
    counted = dict(re.findall(r'^tandem:request_attempts_total\{reason="(\w+)"\} (\S+)$', page, re.MULTILINE))
    assert {reason: float(count) for reason, count in counted.items() if float(count)} == {
        "first": 1,
        "EngineFailed": 1,
    }


# -- engines that break -----------------------------------------------------------------------------------------------

POISON = 77
PROMPTS = ((5, 6, 7), (8, 9, 10, 11), (5, 9))


class Engines:
    """Language workers of one tiny model; planning a step with the poisoned token breaks them."""

    def __init__(self, stack: ExitStack, folder: Path, count: int) -> None:
        self.broken: list[str] = []
        self.may_break = threading.Event()
        addresses = [self._start(stack, folder, f"language-{i}") for i in range(count)]
        self.service = Service(open_endpoint(f"inproc://{Names.fresh('front')}"), PATIENT)
        stack.callback(self.service.close)
        self.service.start()
        directory = WorkerDirectory(self.service)
        directory.replace(addresses)
        self.handoff = Handoff(self.service, directory)

    def _start(self, stack: ExitStack, folder: Path, name: str) -> WorkerAddress:
        endpoint = open_endpoint(f"inproc://{Names.fresh(name)}")
        config = EngineConfig(dtype="float32", kv_cache_tokens=2048, max_model_len=256)
        worker = LanguageWorker(folder, config, PATIENT, endpoint)
        stack.callback(worker.close)
        plan = worker._engine.scheduler.plan

        def plan_or_break() -> Any:
            step = plan()
            if any(POISON in active.prompt for active in worker._engine._roster._requests.values()):
                assert self.may_break.wait(WAIT_S)
                self.broken.append(name)
                raise MemoryError("poisoned")
            return step

        worker._engine.scheduler.plan = plan_or_break  # type: ignore[method-assign]
        worker.start()
        return WorkerAddress(name=name, kind="language", address=worker.address)

    def submit(self, prompt: tuple[int, ...]) -> Outcome:
        outcome = Outcome()
        sampling = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, seed=3)
        request = ServedRequest(request_id=Names.fresh("request"), prompt_token_ids=prompt, sampling=sampling)
        self.handoff.submit(request, outcome)
        return outcome


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Engines]:
    folder = make_text_model(tmp_path, "qwen3")
    with ExitStack() as stack:
        yield Engines(stack, folder, 5)


def test_a_prompt_that_breaks_engines_is_given_up_and_the_others_are_answered_in_full(engines: Engines) -> None:
    expected = [engines.submit(prompt).wait().tokens for prompt in PROMPTS]
    poisoned = engines.submit((1, POISON))
    others = [engines.submit(prompt) for prompt in PROMPTS * 4]
    engines.may_break.set()
    assert isinstance(poisoned.wait().error, CrashingRequest)
    for outcome, tokens in zip(others, expected * 4, strict=True):
        assert outcome.wait().error is None, outcome.error
        assert outcome.tokens == tokens and len(tokens) == 40
    assert len(engines.broken) == len(set(engines.broken)) and len(engines.broken) in (2, 3), engines.broken
