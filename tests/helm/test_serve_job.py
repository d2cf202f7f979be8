"""The serve job's supervisor against a job server in memory: it submits once, takes over, and outlives its head."""

from __future__ import annotations

import runpy
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.job_submission import JobStatus

from tests.helm.rendering import CHART, containers, rendered

COMMAND = ["python", "-m", "cluster", "serve", "--config", "tandem.yaml"]
LOST = ConnectionError("Connection refused")


@dataclass
class Job:
    """As the job server knows it."""

    submission_id: str
    metadata: dict[str, str]
    status: JobStatus = JobStatus.RUNNING


@dataclass
class Server:
    """Every job, and what the next questions for a status are answered with: a status, an error, or something to do."""

    jobs: dict[str, Job] = field(default_factory=dict)
    script: list[Any] = field(default_factory=list)
    refusals: int = 0
    log: list[str] = field(default_factory=list)  # in pieces; those of a connection that breaks end with an error
    breaks: list[int] = field(default_factory=list)  # after how many pieces the next connections for the log break
    sent: list[str] = field(default_factory=list)
    num_tails: int = 0
    is_sent: threading.Event = field(default_factory=threading.Event)

    def client(self, address: str) -> Server:
        if self.refusals:
            self.refusals -= 1
            raise LOST
        return self

    def add(self, name: str, version: str) -> Job:
        job = Job(f"job-{len(self.jobs)}", {"tandem-serve": name, "tandem-version": version})
        self.jobs[job.submission_id] = job
        return job

    def list_jobs(self) -> list[Job]:
        return list(self.jobs.values())

    def submit_job(self, *, entrypoint: str, metadata: dict[str, str], **_: Any) -> str:
        assert entrypoint == " ".join(COMMAND)
        return self.add(metadata["tandem-serve"], metadata["tandem-version"]).submission_id

    def stop_job(self, job: str) -> None:
        self.jobs[job].status = JobStatus.STOPPED

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.num_tails += 1
        count = self.breaks.pop(0) if self.breaks else None
        for piece in [f"log of {job}\n", *self.log][:count]:
            self.sent.append(piece)
            yield piece
        if count is not None:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        self.is_sent.set()

    def get_job_status(self, job: str) -> JobStatus:
        step = self.script.pop(0) if self.script else JobStatus.SUCCEEDED
        if isinstance(step, Exception):
            raise step
        if callable(step):
            step()
        elif self.jobs[job].status == JobStatus.RUNNING:
            self.jobs[job].status = step
        return self.jobs[job].status


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def supervise(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """The script's main; its pauses last no time, and a slow machine has time for the last of the log."""
    script = runpy.run_path(str(CHART / "files" / "serve_job.py"))
    settings = {"JobSubmissionClient": server.client, "POLL_S": 0.0, "LAST_LOG_S": 60.0}
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def main(version: str = "v1", **more: Any) -> int:
        main_globals = script["main"].__globals__
        for name, value in (settings | more).items():
            monkeypatch.setitem(main_globals, name, value)
        arguments = ["--address", "http://head:8265", "--name", "release", "--version", version, "--working-dir", "/w"]
        return int(script["main"]([*arguments, "--", *COMMAND]))

    yield main
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_job_is_submitted_and_followed_to_its_end(
    server: Server, supervise: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    server.refusals = 2
    assert supervise() == 0
    assert [job.metadata["tandem-version"] for job in server.jobs.values()] == ["v1"]
    said = capsys.readouterr()
    assert said.out == "log of job-0\n", "every line once"
    assert said.err.count("does not take jobs yet") == 2


def test_the_log_is_read_once_and_not_once_a_second(
    server: Server, supervise: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    server.log = [f"line {i}\n" * 9 for i in range(200)]
    server.script = [JobStatus.RUNNING] * 500
    assert supervise(POLL_S=1e-4) == 0
    log = "log of job-0\n" + "".join(server.log)
    assert capsys.readouterr().out == log and not server.script, "it was asked for its status all the time"
    assert len("".join(server.sent)) <= server.num_tails * len(log) and server.num_tails <= 40


def test_a_log_that_breaks_off_goes_on_where_it_was(
    server: Server, supervise: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    server.log = [f"line {i}\n" for i in range(20)]
    server.breaks = [0, 7, 3, 15]
    server.script = [lambda: server.is_sent.wait(60)]  # the job ends when its log has come
    assert supervise() == 0
    said = capsys.readouterr()
    assert said.out == "log of job-0\n" + "".join(server.log)
    assert not server.breaks and said.err.count("broke off") == 4


@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.STOPPED])
def test_a_job_that_fails_or_that_somebody_stops_is_a_failure(
    status: JobStatus, server: Server, supervise: Callable[..., int]
) -> None:
    server.script = [JobStatus.RUNNING, status]
    assert supervise() == 1


def test_a_running_job_of_the_same_version_is_taken_over(server: Server, supervise: Callable[..., int]) -> None:
    job = server.add("release", "v1")
    other = server.add("another-release", "v0")
    assert supervise() == 0
    assert len(server.jobs) == 2 and job.status == JobStatus.SUCCEEDED and other.status == JobStatus.RUNNING


def test_a_running_job_of_another_version_is_stopped_first(server: Server, supervise: Callable[..., int]) -> None:
    old, twin = server.add("release", "v1"), server.add("release", "v1")
    server.script = [JobStatus.STOPPED, JobStatus.STOPPED]
    assert supervise("v2") == 0
    assert old.status == twin.status == JobStatus.STOPPED
    assert [job.metadata["tandem-version"] for job in server.jobs.values()] == ["v1", "v1", "v2"]


def test_told_to_stop_it_leaves_the_job_running(server: Server, supervise: Callable[..., int]) -> None:
    server.script = [JobStatus.RUNNING, lambda: signal.raise_signal(signal.SIGTERM)]
    assert threading.current_thread() is threading.main_thread()
    assert supervise() == 0
    (job,) = server.jobs.values()
    assert job.status == JobStatus.RUNNING and not server.script


def test_a_head_that_comes_back_finds_the_job_followed(
    server: Server, supervise: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    server.script = [JobStatus.RUNNING, LOST, LOST, RuntimeError("Request failed with status code 500: GCS"), LOST]
    assert supervise() == 0
    assert len(server.jobs) == 1 and capsys.readouterr().err.count("the head does not answer") == 1


def test_a_head_that_knows_no_such_job_or_stays_away_is_a_failure(
    server: Server, supervise: Callable[..., int]
) -> None:
    server.script = [RuntimeError("Request failed with status code 404: Job job-0 does not exist.")]
    with pytest.raises(RuntimeError, match="does not exist"):
        supervise()
    server.script = [LOST] * 1000
    with pytest.raises(ConnectionError):
        supervise(REACH_S=0.0)


def test_the_version_changes_with_the_deployment_s_template() -> None:
    """Kubernetes labels a pod with the digest of its template, in which the configuration's digest is."""
    (job,) = [c for where, c, _ in containers(rendered("defaults")) if where.endswith("/serve-job")]
    assert "--version=$(TEMPLATE)" in job["command"]
    (source,) = [entry["valueFrom"] for entry in job["env"] if entry["name"] == "TEMPLATE"]
    assert source == {"fieldRef": {"fieldPath": "metadata.labels['pod-template-hash']"}}
