"""The directory: which workers there are, which live, what each carries; and what a replaced worker's calls hear."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import Queue

import pytest

from cluster.directory import WorkerAddress, WorkerDirectory
from tests.cluster.fake_workers import PATIENT, WAIT_S, FakeWorker, Names
from transfer.endpoints.endpoint import open_endpoint
from transfer.errors import RemoteFailure
from transfer.service.service import Service


def _worker(name: str, address: str | None = None, kind: str = "language") -> WorkerAddress:
    return WorkerAddress(name=name, kind=kind, address=address or f"inproc://{name}")  # type: ignore[arg-type]


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service(open_endpoint(f"inproc://{Names.fresh('front')}"), PATIENT)
    service.start()
    yield service
    service.close()


@pytest.fixture
def directory(service: Service) -> WorkerDirectory:
    return WorkerDirectory(service)


def _alive(directory: WorkerDirectory) -> dict[str, bool]:
    return {view.name: view.is_alive for view in directory.views()}


def test_views_reflect_what_was_said(directory: WorkerDirectory) -> None:
    assert directory.views() == [] and directory.all() == [] and directory.get("a") is None
    a, b = _worker("a"), _worker("b", kind="embedding")
    directory.replace([a, b])
    assert directory.all() == [a, b] and directory.get("b") == b
    directory.add_running("a", 1)
    directory.add_running("a", 1)
    directory.add_running("b", 1)
    directory.add_running("b", -1)
    assert [(v.name, v.kind, v.num_running) for v in directory.views()] == [("a", "language", 2), ("b", "embedding", 0)]
    assert directory.connection(a) == directory.connection(a)


def test_verdicts_are_news_once_and_hold_for_one_incarnation(directory: WorkerDirectory) -> None:
    old = _worker("a", "inproc://old")
    directory.replace([old, _worker("b")])
    assert not directory.set_alive(old, True), "it was taken to be alive"
    assert directory.set_alive(old, False)
    assert not directory.set_alive(old, False)
    assert _alive(directory) == {"a": False, "b": True}
    directory.replace([old, _worker("b")])
    assert _alive(directory) == {"a": False, "b": True}, "the same incarnation stays dead"
    directory.replace([new := _worker("a", "inproc://new"), _worker("b")])
    assert _alive(directory) == {"a": True, "b": True}, "a new incarnation starts alive"
    assert not directory.set_alive(old, False), "a late verdict about the old one is ignored"
    assert directory.set_alive(new, False) and directory.set_alive(new, True)
    directory.replace([])
    directory.replace([new])
    assert _alive(directory) == {"a": True}
    assert not directory.set_alive(_worker("stranger"), False)


def test_calls_to_a_replaced_worker_end_and_other_calls_go_on(service: Service, directory: WorkerDirectory) -> None:
    with FakeWorker("language") as gone, FakeWorker("language") as stays:
        directory.replace([gone.entry, stays.entry])
        ends: dict[str, RemoteFailure | None] = {}
        over = {worker.name: threading.Event() for worker in (gone, stays)}

        def call(worker: FakeWorker) -> None:
            def on_end(body: object, failure: RemoteFailure | None) -> None:
                ends[worker.name] = failure
                over[worker.name].set()

            service.call(directory.connection(worker.entry), "generate", {}, on_end=on_end)

        call(gone)
        call(stays)
        kept = stays.take("generate")
        gone.take("generate")
        directory.replace([stays.entry])
        assert over[gone.name].wait(WAIT_S)
        failure = ends[gone.name]
        assert failure is not None and failure.code == "PeerLost" and "the worker was replaced" in failure.message
        assert not over[stays.name].is_set()
        kept.end({})
        assert over[stays.name].wait(WAIT_S)
        assert ends[stays.name] is None


def test_counting_from_many_threads_loses_nothing(directory: WorkerDirectory) -> None:
    directory.replace([_worker("a")])

    def work() -> None:
        for _ in range(500):
            directory.add_running("a", 1)
            directory.add_running("a", -1)
        directory.add_running("a", 1)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert directory.views()[0].num_running == 8


def test_a_withdrawn_worker_is_dead_at_once_whatever_its_last_ping_says(
    service: Service, directory: WorkerDirectory
) -> None:
    with FakeWorker("language") as ended, FakeWorker("language") as stays:
        directory.replace([ended.entry, stays.entry])
        failures: Queue[RemoteFailure | None] = Queue()
        for worker in (ended, stays):
            connection = directory.connection(worker.entry)
            service.call(connection, "generate", {}, on_end=lambda _, failure: failures.put(failure))
            worker.take("generate")
        for _ in range(2):  # the second time it is no news, and costs the new incarnation's callers nothing
            directory.replace([ended.entry, stays.entry], withdrawn={ended.name, "stranger"})
            directory.set_alive(ended.entry, True)  # an answer that was on its way
            assert _alive(directory) == {ended.name: False, stays.name: True}
        failure = failures.get(timeout=WAIT_S)
        assert failure is not None and failure.code == "PeerLost" and "process has ended" in failure.message
        assert failures.empty() and service.stats()["peers_lost"] == 1
        directory.replace([ended.entry, stays.entry])  # a false alarm
        assert _alive(directory) == {ended.name: True, stays.name: True}
        directory.replace([ended.entry, stays.entry], withdrawn={ended.name})
        directory.replace([_worker(ended.name, "inproc://reborn"), stays.entry])
        assert _alive(directory) == {ended.name: True, stays.name: True}


def test_a_worker_whose_engine_broke_stays_dead_until_another_process_takes_its_place(
    directory: WorkerDirectory,
) -> None:
    broken, stays = _worker("a", "inproc://old"), _worker("b")
    told: list[dict[str, bool]] = []
    directory.replace([broken, stays])
    directory.listen(lambda: told.append(_alive(directory)))
    directory.set_failed(broken)
    directory.set_failed(broken)
    assert told == [{"a": False, "b": True}], "told once"
    directory.set_alive(broken, True)
    directory.replace([broken, stays])
    assert _alive(directory) == {"a": False, "b": True} and not directory.is_alive(broken) and directory.is_alive(stays)
    reborn = _worker("a", "inproc://new")
    directory.replace([reborn, stays])
    directory.set_failed(broken)
    assert _alive(directory) == {"a": True, "b": True}
    directory.replace([broken, stays])
    assert directory.is_alive(broken), "what was forgotten is new"
    directory.set_failed(broken)
    directory.replace([broken, stays], withdrawn={"a"})
    assert not directory.is_alive(broken)
    directory.replace([broken, stays])
    assert directory.is_alive(broken), "its process was replaced by one at the same address"
