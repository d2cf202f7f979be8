"""The error table: complete over all packages, picklable, and silent about the inside."""

from __future__ import annotations

import importlib
import inspect
import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.errors import ERROR_TABLE, ClientError, ClusterError, WorkerLost, http_error, rule_for
from transfer.errors import RemoteFailure, StreamAborted

PACKAGES = ("transfer", "embedding_worker", "language_worker", "cluster")


def errors_of(package: str) -> list[type[Exception]]:
    """Every exception class that a package's errors.py defines."""
    module = importlib.import_module(f"{package}.errors")
    return [
        kind
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, Exception) and kind.__module__ == module.__name__
        if not kind.__name__.startswith("_")  # a shared base that nobody raises
    ]


def descendants(kind: type[Exception]) -> Iterator[type[Exception]]:
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


ALL = [kind for package in PACKAGES for kind in errors_of(package)]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_error_has_a_row_of_its_own(kind: type[Exception]) -> None:
    """By its own name, since that is all that arrives of an error at a worker."""
    assert kind.__name__ in ERROR_TABLE


def test_no_subclass_lives_outside_the_error_modules() -> None:
    ours = set(ALL)
    roots = [kind for kind in ALL if kind.__base__ in (Exception, ValueError)]
    strangers = {
        child
        for root in roots
        for child in descendants(root)
        if child not in ours and child.__module__.split(".")[0] in PACKAGES
    }
    assert {name for child in strangers if not (name := child.__name__).startswith("_")} <= ERROR_TABLE.keys()


@pytest.mark.parametrize("kind", errors_of("cluster"), ids=lambda kind: kind.__name__)
def test_cluster_errors_survive_pickling(kind: type[Exception]) -> None:
    error = kind("what happened", "field") if issubclass(kind, ClientError) else kind("what happened")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert copy.args == error.args
    assert getattr(copy, "param", None) == getattr(error, "param", None)


@pytest.mark.parametrize("code", [*ERROR_TABLE, "Unheard"])
def test_every_remote_code_is_a_well_formed_answer(code: str) -> None:
    answer = http_error(
        RemoteFailure(code, "at tcp://10.0.0.1:99 in ipc:///tmp/a/b.sock, 192.168.1.7:80, 0x7f00aa11bb")
    )
    text = json.dumps(answer.body)
    assert 400 <= answer.status < 600
    assert all(secret not in text for secret in ("10.0.0.1", "b.sock", "192.168", "0x7f"))
    assert answer.body["error"].keys() == {"message", "type", "param", "code"}
    assert ("retry-after" in answer.headers) == (answer.status == 503)


@pytest.mark.parametrize(
    "error", [KeyError("secret"), MemoryError("secret"), ClusterError("secret"), OSError(1, "secret")]
)
def test_our_own_faults_say_nothing(error: Exception) -> None:
    answer = http_error(error)
    assert answer.status == 500
    assert "secret" not in json.dumps(answer.body)


def test_an_aborted_stream_is_answered_by_what_aborted_it() -> None:
    assert rule_for(StreamAborted("BadImage", "image 0: truncated")).status == 400
    assert rule_for(StreamAborted("Unheard", "x")).code == "worker_lost"


def test_an_unlisted_subclass_is_answered_as_its_parent() -> None:
    class Special(WorkerLost):
        """As lost as any."""

    assert rule_for(Special("x")).code == "worker_lost"


def test_param_and_message_of_a_client_error_are_shown() -> None:
    body: Any = http_error(ClientError("the field is wrong", "temperature")).body
    assert body["error"]["message"] == "the field is wrong"
    assert body["error"]["param"] == "temperature"
    json.dumps(http_error(ClientError("half a \ud800 pair")).body).encode()
    assert len(http_error(ClientError("x" * 10**6)).body["error"]["message"]) <= 2000
