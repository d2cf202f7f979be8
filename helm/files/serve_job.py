"""Keeps one serve job running on a Ray cluster: submits it, prints its log, ends with its exit status.

What serves does not depend on this process. It may be ended and started again: a running job of the same version is
taken over; one of another version is stopped first, and drains: running requests end, new ones are refused. A head that
does not answer is waited for, since its cluster may outlive it. Needs Ray's job client, not torch.
  serve_job.py --address http://HEAD:8265 --name NAME --version V --working-dir DIR -- python -m cluster serve ...
"""

import argparse
import asyncio
import shlex
import signal
import sys
import threading
import time

from ray.job_submission import JobStatus, JobSubmissionClient

POLL_S = 1.0
REACH_S = 600.0
MAX_PAUSE_S = 60.0  # between two connections for the log
LAST_LOG_S = 10.0  # for what is left of it when the job has ended
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


def main(arguments=None):
    """0 when the job succeeded, or goes on after we were told to stop; 1 otherwise."""
    options = _options(arguments)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    client = _reach(options.address, stop)
    if client is None:
        return 0
    job = _running_job(client, options) or _submit(client, options)
    status = _follow(client, job, stop)
    if status is None:
        _say(f"told to stop; job {job} goes on: the next of its version takes it over, one of another version stops it")
        return 0
    _say(f"job {job}: {status}")
    return 0 if status == JobStatus.SUCCEEDED else 1


def _reach(address, stop):
    """A client; None when told to stop first. Raises OSError or RuntimeError when the head does not come up."""
    deadline_s = time.monotonic() + REACH_S
    while not stop.is_set():
        try:
            client = JobSubmissionClient(address)
            client.list_jobs()
            return client
        except (OSError, RuntimeError) as error:
            if time.monotonic() > deadline_s:
                raise
            _say(f"the head at {address} does not take jobs yet: {str(error).splitlines()[0][:200]}")
            stop.wait(5 * POLL_S)
    return None


def _running_job(client, options):
    """The job of this name and version, if there is one; those of this name and another version are stopped."""
    found = None
    for info in client.list_jobs():
        known = info.metadata or {}
        if known.get("tandem-serve") != options.name or info.status in ENDED or not info.submission_id:
            continue
        if known.get("tandem-version") == options.version and found is None:
            found = info.submission_id
            _say(f"job {found} of this version is there: taking it over")
        else:
            _say(f"job {info.submission_id} of another version is still there: stopping it")
            _end(client, info.submission_id, options.drain_s)
    return found


def _submit(client, options):
    job = client.submit_job(
        entrypoint=shlex.join(options.command),
        runtime_env={"working_dir": options.working_dir},
        metadata={"tandem-serve": options.name, "tandem-version": options.version},
        entrypoint_resources={options.resource: 1.0} if options.resource else None,
    )
    _say(f"job {job} submitted to {options.address}")
    return job


def _follow(client, job, stop):
    """How it ended, with its log printed; None when told to stop first. Raises OSError or RuntimeError when the head is
    gone for too long, or knows no such job.
    """
    log, deadline_s = _Log(client, job), None
    try:
        while not stop.is_set():
            try:
                status = client.get_job_status(job)
            except (OSError, RuntimeError) as error:
                if "does not exist" in str(error) or (deadline_s is not None and time.monotonic() > deadline_s):
                    raise
                if deadline_s is None:
                    deadline_s = time.monotonic() + REACH_S
                    _say(f"the head does not answer: {str(error).splitlines()[0][:200]}; the job may go on without it")
            else:
                deadline_s = None
                if status in ENDED:
                    log.end(LAST_LOG_S)
                    return status
            stop.wait(POLL_S)
        return None
    finally:
        log.end(0.0)


def _end(client, job, drain_s):
    """Stop the job and wait until it has ended (for drain_s at most, and a little for Ray itself)."""
    client.stop_job(job)
    deadline_s = time.monotonic() + drain_s + 15.0
    while client.get_job_status(job) not in ENDED and time.monotonic() < deadline_s:
        time.sleep(POLL_S)


class _Log:
    """The job's log on stdout, every character once. A thread follows it as it grows; each connection gets it from its
    beginning, so a broken one is made again more and more seldom.
    """

    def __init__(self, client, job):
        self._client, self._job = client, job
        self._num_printed = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="job-log", daemon=True)
        self._thread.start()

    def end(self, patience_s):
        """Connect no more; wait so long for what is on its way."""
        self._is_over.set()
        self._thread.join(patience_s)

    def _run(self):
        pause_s = POLL_S
        while True:
            is_last, is_whole = self._is_over.is_set(), True
            try:
                asyncio.run(self._tail())
            except Exception as error:  # of any kind: the status is what is followed
                is_whole = False
                _say(f"the log of job {self._job} broke off: {(str(error) or repr(error)).splitlines()[0][:200]}")
            if is_last or (is_whole and self._is_over.is_set()):
                return
            self._is_over.wait(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)

    async def _tail(self):
        num_seen = 0
        async for text in self._client.tail_job_logs(self._job):
            num_known = max(0, self._num_printed - num_seen)
            num_seen += len(text)
            self._num_printed = max(self._num_printed, num_seen)
            sys.stdout.write(text[num_known:])
            sys.stdout.flush()


def _say(text):
    print(f"serve-job: {text}", file=sys.stderr, flush=True)


def _options(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--version", required=True, help="changes with whatever the job is made of")
    parser.add_argument("--working-dir", required=True)
    parser.add_argument(
        "--resource", default="tandem-serve", help="the Ray resource of the node it runs on; empty: any"
    )
    parser.add_argument("--drain-s", type=float, default=60.0)
    parser.add_argument("command", nargs="+")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
