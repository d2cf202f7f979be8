"""Submits the serve job to a Ray cluster and stays with it: prints its log, ends with its exit status.

A job that another pod of this name left behind is stopped first, since two would wait for the same place. SIGTERM and
SIGINT stop the job, which drains: running requests end, new ones are refused. Needs Ray's job client, not torch.
  serve_job.py --address http://HEAD:8265 --name NAME --working-dir DIR -- python -m cluster serve --config tandem.yaml
"""

import argparse
import shlex
import signal
import sys
import threading
import time

from ray.job_submission import JobStatus, JobSubmissionClient

POLL_S = 1.0
REACH_S = 600.0
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


def main(arguments=None):
    """0 when the job succeeded or was stopped because we were told to stop; 1 otherwise."""
    options = _options(arguments)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    client = _reach(options.address, stop)
    if client is None:
        return 0
    _stop_others(client, options.name, options.drain_s)
    job = client.submit_job(
        entrypoint=shlex.join(options.command),
        runtime_env={"working_dir": options.working_dir},
        metadata={"tandem-serve": options.name},
        entrypoint_resources={options.resource: 1.0} if options.resource else None,
    )
    _say(f"job {job} submitted to {options.address}")
    printed, status = 0, client.get_job_status(job)
    while status not in ENDED:
        if stop.wait(POLL_S):
            _say("stopping the job: it drains")
            _end(client, job, options.drain_s)
        printed = _print_new(client, job, printed)
        status = client.get_job_status(job)
    _print_new(client, job, printed)
    _say(f"job {job}: {status}")
    return 0 if status == JobStatus.SUCCEEDED or (stop.is_set() and status == JobStatus.STOPPED) else 1


def _reach(address, stop):
    """A client; None when told to stop first. Raises ConnectionError when the head does not come up."""
    deadline_s = time.monotonic() + REACH_S
    while not stop.is_set():
        try:
            client = JobSubmissionClient(address)
            client.list_jobs()
            return client
        except (ConnectionError, RuntimeError) as error:
            if time.monotonic() > deadline_s:
                raise
            _say(f"the head at {address} does not take jobs yet: {str(error).splitlines()[0][:200]}")
            stop.wait(5 * POLL_S)
    return None


def _stop_others(client, name, drain_s):
    for info in client.list_jobs():
        if (info.metadata or {}).get("tandem-serve") == name and info.status not in ENDED and info.submission_id:
            _say(f"job {info.submission_id} is still there: stopping it")
            _end(client, info.submission_id, drain_s)


def _end(client, job, drain_s):
    """Stop the job and wait until it has ended (for drain_s at most, and a little for Ray itself)."""
    client.stop_job(job)
    deadline_s = time.monotonic() + drain_s + 15.0
    while client.get_job_status(job) not in ENDED and time.monotonic() < deadline_s:
        time.sleep(POLL_S)


def _print_new(client, job, printed):
    try:
        log = client.get_job_logs(job)
    except RuntimeError:  # its node is gone or not there yet; the status tells
        return printed
    sys.stdout.write(log[printed:])
    sys.stdout.flush()
    return max(printed, len(log))


def _say(text):
    print(f"serve-job: {text}", file=sys.stderr, flush=True)


def _options(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--working-dir", required=True)
    parser.add_argument(
        "--resource", default="tandem-serve", help="the Ray resource of the node it runs on; empty: any"
    )
    parser.add_argument("--drain-s", type=float, default=60.0)
    parser.add_argument("command", nargs="+")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
