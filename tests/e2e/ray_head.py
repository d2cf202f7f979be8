"""A Ray head of its own, guarded by a token, as `ray start --head` makes it; ended by its own handle."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S = 180.0
PORTS = range(21_000, 30_000)  # above those that Ray's workers and the chart's take, below those the system hands out
JOB_S = 200.0


def free_ports(count: int) -> list[int]:
    """Random ones of those that nobody gets without asking for them: bound later, they are still free."""
    ports: list[int] = []
    while len(ports) < count:
        port = PORTS.start + secrets.randbelow(len(PORTS))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            ports += [port] * (port not in ports)
    return ports


@dataclass(frozen=True)
class RayHead:
    """environment: as after activating the virtual environment, with the head's token."""

    dashboard: str
    agent_port: int
    environment: dict[str, str]

    def submit(
        self, *command: str, cwd: Path = ROOT, options: tuple[str, ...] = ("--working-dir", ".")
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit` until the job has ended."""
        full = [str(BIN / "ray"), "job", "submit", "--address", self.dashboard, *options, "--", *command]

        def run() -> subprocess.CompletedProcess[str] | None:
            done = subprocess.run(full, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=JOB_S)
            return None if "No available agent" in done.stderr else done  # the head answers before its agent is up

        return eventually(run, "the head's job agent did not come up", START_S)


@contextmanager
def ray_head() -> Iterator[RayHead]:
    """A process group of its own, ended as one; its agent's port is not the usual one, which another Ray may have.

    Its node offers room for every role of Tandem.
    """
    folder = tempfile.mkdtemp(prefix="ray-")  # short: Ray puts sockets below it
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "PYTHONPATH": str(ROOT),  # for jobs that upload no code
        "TMPDIR": folder,  # so that `tandem stop` finds what is served from here, and not what this process serves
    }
    port, dashboard_port, agent_port = free_ports(3)
    roles = {f"tandem-{role}": 4 for role in ("embedding", "language", "gateway", "serve")}
    command = [
        str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={agent_port}", "--num-cpus=4",
        "--object-store-memory=200000000", f"--temp-dir={folder}", f"--resources={json.dumps(roles)}",
    ]  # fmt: skip
    with open(Path(folder) / "head.log", "w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            head = RayHead(f"http://127.0.0.1:{dashboard_port}", agent_port, environment)
            eventually(lambda: _is_up(head, process), lambda: Path(log.name).read_text(), START_S)
            yield head
        finally:
            _end(process)
            shutil.rmtree(folder, ignore_errors=True)


def _is_up(head: RayHead, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, f"the head ended with {process.returncode}"
    headers = {"authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    try:
        return httpx.get(f"{head.dashboard}/api/jobs/", headers=headers, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
