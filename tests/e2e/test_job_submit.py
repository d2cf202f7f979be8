"""`ray job submit --working-dir . -- python -m cluster demo` against a head started by hand."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from cluster.demo import questions
from tests.e2e.serving import eventually

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TIMEOUT_S = 150.0
MARKER = '\nprint(f"code at {__file__}", flush=True)\n'


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """As after activating the virtual environment, with one token for head and clients."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
    }


@pytest.fixture(scope="module")
def dashboard(environment: dict[str, str]) -> Iterator[str]:
    """A head's dashboard address. The head is a process group of its own, ended as one; its agent's port is not the
    usual one, which another Ray of this machine may have.
    """
    port, dashboard_port, agent_port = _free_ports(3)
    folder = tempfile.mkdtemp(prefix="ray-")  # short: Ray puts sockets below it
    command = [
        str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard_port}", f"--dashboard-agent-listen-port={agent_port}", "--num-cpus=2",
        "--object-store-memory=200000000", f"--temp-dir={folder}",
    ]  # fmt: skip
    with open(Path(folder) / "head.log", "w+") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{dashboard_port}"
            eventually(lambda: _is_up(address, environment, head), lambda: Path(log.name).read_text(), 60.0)
            yield address
        finally:
            _end(head)
            shutil.rmtree(folder, ignore_errors=True)


def _is_up(address: str, environment: dict[str, str], head: subprocess.Popen[bytes]) -> bool:
    assert head.poll() is None, f"the head ended with {head.returncode}"
    headers = {"authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
    try:
        return httpx.get(f"{address}/api/jobs/", headers=headers, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _end(head: subprocess.Popen[bytes]) -> None:
    head.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        head.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the tracked tree with what a real one has beside it, and whose code says where it runs."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    folder = tmp_path / "checkout"
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    for big in (".venv/lib/big.so", ".mypy_cache/big.json"):  # beyond Ray's cap, if it were uploaded
        (folder / big).parent.mkdir(parents=True)
        with open(folder / big, "wb") as file:
            file.truncate(600 * 1024 * 1024)
    with open(folder / "cluster" / "actors.py", "a") as file:
        file.write(MARKER)
    return folder


def test_the_demo_runs_as_a_job(dashboard: str, environment: dict[str, str], checkout: Path) -> None:
    submit = [str(BIN / "ray"), "job", "submit", "--address", dashboard, "--working-dir", "."]
    command = [*submit, "--", "python", "-m", "cluster", "demo"]

    def run() -> subprocess.CompletedProcess[str] | None:
        result = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        return None if "No available agent" in result.stderr else result  # the head answers before its agent is up

    result = eventually(run, "the head's job agent did not come up", 60.0)
    log = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    assert result.returncode == 0, log + result.stderr
    count = len(questions())
    assert f"{count} of {count} answers are right" in log
    for question in questions():
        assert re.search(rf"{question.image.name} {re.escape(question.text)} {question.answer} right", log), log
    assert "connecting to Ray at" in log, "the job must join the cluster it was submitted to"
    # the job and its actors run what was uploaded, not what happens to be installed
    places = re.findall(r"^(\(.*?pid=\d+\) )?code at (\S+)", log, re.MULTILINE)  # Ray prefixes what actors print
    assert {bool(prefix) for prefix, _ in places} == {False, True}, log
    assert all("/working_dir_files/_ray_pkg_" in path for _, path in places), places


def test_the_weights_are_not_ignored() -> None:
    """What Ray leaves behind is listed in .gitignore and .rayignore; the shipped model must be in neither."""
    result = subprocess.run(
        ["git", "check-ignore", "--no-index", "-v", "cluster/demo/model/model.safetensors"],
        cwd=ROOT,
        capture_output=True,
    )
    assert result.returncode == 1, result.stdout
    assert not any("model" in line or "safetensors" in line for line in (ROOT / ".rayignore").read_text().splitlines())
