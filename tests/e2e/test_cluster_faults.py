"""Workers that die or hang under load: every answer is whole and right, and the cluster heals.

A worker is stopped (SIGSTOP) before it is killed where a test needs requests that it cannot have answered.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.actors import WorkerHealth
from cluster.launch import RayCluster
from tests.e2e.conftest import SILENCE_S
from tests.e2e.serving import Serving, Streamed, ask_demo_question, chat_body, long_body, png
from tests.e2e.test_topologies import check_topology
from tests.tiny_models import random_image
from tests.waiting import eventually

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

HEALED_S = 200.0
BEGUN_S = 120.0
NUM_TRIES = 5  # to deal a fault in the middle of what it is to hit
NUM_STREAMS = 12
NUM_TOKENS = 200


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(48) as pool:
        yield pool


@pytest.fixture(autouse=True)
def _healthy(wide_serving: Serving) -> Iterator[None]:
    """Every test starts and ends with four workers that answer and hold nothing."""
    _await_up(wide_serving)
    yield
    _await_up(wide_serving)
    wide_serving.await_empty_ledger()
    ask_demo_question(wide_serving)


def _await_up(serving: Serving) -> None:
    def are_up() -> bool:
        figures = serving.metrics()
        return len(figures) == 4 and all(values["worker_up"] for values in figures.values())

    eventually(are_up, "not all workers came back", HEALED_S)


def _is_running(pid: int) -> bool:
    """There is such a process, and it is more than a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def _kill(worker: WorkerHealth) -> None:
    assert _is_running(worker.pid)
    os.kill(worker.pid, signal.SIGKILL)
    eventually(lambda: not _is_running(worker.pid), f"process {worker.pid} did not die")


@contextmanager
def _stopped(worker: WorkerHealth) -> Iterator[None]:
    """SIGSTOP; goes on at the end if it is still there."""
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if _is_running(worker.pid):
            os.kill(worker.pid, signal.SIGCONT)


@contextmanager
def _impatient(cluster: RayCluster) -> Iterator[None]:
    """Who is silent for longer than a peer may be is replaced, meanwhile."""
    before = cluster.config
    workers = dataclasses.replace(before.workers, health_timeout_s=SILENCE_S)
    cluster.config = dataclasses.replace(before, workers=workers)
    try:
        yield
    finally:
        cluster.config = before


def _await_new_process(cluster: RayCluster, old: WorkerHealth) -> None:
    name = old.address.name
    eventually(lambda: cluster.workers[name].pid != old.pid, f"{name} was not replaced", HEALED_S)
    assert _is_running(cluster.workers[name].pid)


def _await_used(serving: Serving, name: str, pool: ThreadPoolExecutor, body: Callable[[int], Any], figure: str) -> None:
    """Requests are handed to the worker's new process, whose counters began at 0."""
    seeds = iter(range(1_000_000))

    def is_used() -> bool:
        for future in [pool.submit(serving.ask, body(next(seeds))) for _ in range(8)]:
            future.result()
        return serving.settled()[name].get(figure, 0) > 0

    eventually(is_used, f"{name} is back but not used", HEALED_S)


def _picture(seed: int) -> bytes:
    """A picture that no cache knows."""
    return png(random_image(120, 90, seed=100_000 + seed))


def _num_pending(futures: list[Future[Any]]) -> int:
    return sum(not future.done() for future in futures)


def _await_fewer_pending(futures: list[Future[Any]], limit: int) -> int:
    eventually(lambda: _num_pending(futures) <= limit, "the other worker answers its share")
    return _num_pending(futures)


def test_two_workers_of_each_kind_answer_as_one_process_does(wide_cluster: RayCluster) -> None:
    check_topology(wide_cluster, is_split=False)


def test_a_language_worker_is_killed_under_load(
    wide_cluster: RayCluster, wide_serving: Serving, pool: ThreadPoolExecutor
) -> None:
    bodies = [
        long_body(f"Tell me more. {i}", NUM_TOKENS, *([_picture(i)] if i % 2 else [])) for i in range(NUM_STREAMS)
    ]
    for i in range(0, NUM_STREAMS, 3):
        bodies[i] |= {"temperature": 1.0, "seed": i}
    short = [chat_body(f"How many digits are there? {i}", max_tokens=4, ignore_eos=True) for i in range(8)]
    expected = list(pool.map(wide_serving.text, bodies))
    expected_short = list(pool.map(wide_serving.text, short))
    assert len(set(expected)) > NUM_STREAMS // 2

    for _ in range(NUM_TRIES):  # its streams may be over, or everything handed to the other worker, before it is dead
        victim = wide_cluster.workers["language-0"]
        outcomes, short_answers, num_unanswered = _kill_while_it_streams(victim, wide_serving, pool, bodies, short)
        assert short_answers == expected_short  # no token had left: tried again elsewhere
        for streamed, text in zip(outcomes, expected, strict=True):
            _check_whole(streamed, text)
        num_taken_over = sum(streamed.usage["hops"].get("attempts", 1) > 1 for streamed in outcomes if streamed.usage)
        _await_new_process(wide_cluster, victim)
        _await_up(wide_serving)
        if num_unanswered and num_taken_over:
            break
    assert num_unanswered > 0, "no request was left waiting for the worker when it died"
    assert 0 < num_taken_over < NUM_STREAMS, "the worker that died served some of the streams, not all"
    page = wide_serving.client.get("/metrics").text
    (num_anew,) = re.findall(r'^tandem:request_attempts_total\{reason="PeerLost"\} (\S+)$', page, re.MULTILINE)
    assert float(num_anew) >= num_taken_over
    plain = lambda seed: chat_body(f"What number is this? {seed}", max_tokens=4)  # noqa: E731
    _await_used(wide_serving, "language-0", pool, plain, "worker_request_success_total")


def _kill_while_it_streams(
    victim: WorkerHealth,
    serving: Serving,
    pool: ThreadPoolExecutor,
    bodies: list[dict[str, Any]],
    short: list[dict[str, Any]],
) -> tuple[list[Streamed], list[str], int]:
    """The streams of longer answers to `bodies`, begun before; the answers to `short`, asked when it was stopped; and
    how many of these had not come when it died.
    """
    begun = [threading.Event() for _ in bodies]
    long_bodies = [{**body, "max_tokens": 1500} for body in bodies]
    streams = [pool.submit(serving.stream, b, e.set) for b, e in zip(long_bodies, begun, strict=True)]
    for event in begun:
        assert event.wait(BEGUN_S), "a stream did not begin"
    with _stopped(victim):
        waiting = [pool.submit(serving.text, body) for body in short]
        num_unanswered = _await_fewer_pending(waiting, len(short) // 2)
        _kill(victim)
    answers = [future.result() for future in waiting]
    return [future.result() for future in streams], answers, num_unanswered


def _check_whole(streamed: Streamed, text: str) -> None:
    """The whole answer and [DONE], whoever died: no token is wrong, missing or there twice."""
    assert streamed.error is None and streamed.is_done, streamed.error
    assert streamed.finish_reasons == {0: "length"}
    assert streamed.usage is not None and streamed.usage["completion_tokens"] == 1500
    assert streamed.text.startswith(text)


def test_an_embedding_worker_is_killed_under_load(
    wide_cluster: RayCluster, wide_serving: Serving, pool: ThreadPoolExecutor
) -> None:
    for i in range(NUM_TRIES):  # everything may be handed to the other worker before it is dead
        bodies = [chat_body("What number is this?", _picture(1000 + 16 * i + j)) for j in range(16)]
        victim = wide_cluster.workers["embedding-0"]
        with _stopped(victim):
            waiting = [pool.submit(wide_serving.text, body) for body in bodies]
            num_unanswered = _await_fewer_pending(waiting, len(bodies) - 1)
            _kill(victim)
        answers = [future.result() for future in waiting]
        _await_new_process(wide_cluster, victim)
        _await_up(wide_serving)
        assert answers == list(pool.map(wide_serving.text, bodies))
        if num_unanswered:
            break
    assert num_unanswered > 0, "no request was left waiting for the worker when it died"
    pictured = lambda seed: chat_body("What number is this?", _picture(50_000 + seed), max_tokens=4)  # noqa: E731
    _await_used(wide_serving, "embedding-0", pool, pictured, "embed_items_encoded")


def test_a_stopped_embedding_worker_is_replaced_and_hinders_nobody(
    wide_cluster: RayCluster, wide_serving: Serving, pool: ThreadPoolExecutor
) -> None:
    texts = [chat_body(f"How many digits are there? {i}", max_tokens=4, ignore_eos=True) for i in range(8)]
    pictures = [chat_body("What number is this?", _picture(2000 + i)) for i in range(16)]
    expected = list(pool.map(wide_serving.text, texts))
    victim = wide_cluster.workers["embedding-0"]
    with _stopped(victim):
        pictured = [pool.submit(wide_serving.text, body) for body in pictures]
        assert list(pool.map(wide_serving.text, texts)) == expected
        answers = [future.result() for future in pictured]  # at the other worker, at once or after SILENCE_S
        assert wide_cluster.workers["embedding-0"].pid == victim.pid and _is_running(victim.pid)
        with _impatient(wide_cluster):
            _await_new_process(wide_cluster, victim)
    eventually(lambda: not _is_running(victim.pid), "the stopped process was not ended")
    _await_up(wide_serving)
    assert answers == list(pool.map(wide_serving.text, pictures))


class Tally:
    """Sums of the language workers' counters since it was made."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._before = self._read()

    def _read(self) -> Counter[str]:
        totals: Counter[str] = Counter()
        for name, figures in self._serving.settled(kinds=("language",)).items():
            if name.startswith("language"):
                totals.update({key: int(value) for key, value in figures.items() if key.endswith("_total")})
        return totals

    def now(self) -> Counter[str]:
        after = self._read()
        after.subtract(self._before)
        return after


def _stop_midway(
    cluster: RayCluster, serving: Serving, pool: ThreadPoolExecutor, bodies: Iterator[dict[str, Any]], num_blocks: int
) -> tuple[dict[str, Any], Future[dict[str, Any]], Tally, WorkerHealth]:
    """Stop the embedding worker of a request of whose `num_blocks` blocks some, but not all, have arrived."""
    for body in bodies:
        tally = Tally(serving)
        answer = pool.submit(serving.ask, body)
        while not answer.done() and not tally.now()["transfer_blocks_received_total"]:
            pass
        busy = [n for n, figures in serving.metrics().items() if figures.get("embed_requests_open")]
        if len(busy) == 1 and not answer.done():
            worker = cluster.workers[busy[0]]
            os.kill(worker.pid, signal.SIGSTOP)
            totals = tally.now()
            if totals["transfer_blocks_received_total"] < num_blocks and not totals["embed_takeovers_total"]:
                return body, answer, tally, worker
            os.kill(worker.pid, signal.SIGCONT)
        answer.result()
    raise AssertionError("no request could be caught midway")


def test_another_embedding_worker_goes_on_where_a_killed_one_stopped(
    wide_cluster: RayCluster, wide_serving: Serving, pool: ThreadPoolExecutor
) -> None:
    bodies = (
        chat_body("What is this?", *[png(random_image(448, 336, seed=9000 + 100 * i + j)) for j in range(10)])
        for i in range(20)
    )
    num_blocks = -(-10 * (448 // 28) * (336 // 28) // 4)  # of 4 rows
    body, answer, tally, victim = _stop_midway(wide_cluster, wide_serving, pool, bodies, num_blocks)
    _kill(victim)
    completed = answer.result()
    usage, totals = completed["usage"], tally.now()
    assert totals["embed_takeovers_total"] == 1
    assert totals["worker_request_success_total"] == 1 and totals["request_failure_total"] == 0
    assert totals["computed_tokens_total"] == usage["prompt_tokens"] + usage["completion_tokens"] - 1
    assert totals["transfer_blocks_received_total"] == num_blocks, "no row was sent again"
    assert totals["transfer_streams_restarted_total"] == 0
    _await_new_process(wide_cluster, victim)
    _await_up(wide_serving)
    assert completed["choices"][0]["message"] == wide_serving.ask(body)["choices"][0]["message"]
