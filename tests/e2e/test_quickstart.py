"""The quickstart's lines, typed into a shell: a newcomer's way from a clone to an answer.

All of them, the clone and the installation included. Every day pip takes what is required from the packages of this
interpreter; under `make soak` from where a newcomer's pip takes it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.demo import MODEL_DIR
from tests.e2e.checkout import make_repository
from tests.e2e.ray_head import ROOT, free_ports
from tests.profiles import IS_SOAK

TIMEOUT_S = 1500.0 if IS_SOAK else 600.0  # with what a bare machine downloads, or without
MAX_COMMANDS = 10
pytestmark = [pytest.mark.ray, pytest.mark.timeout(TIMEOUT_S + 60.0)]
ENDS_ALL = "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"
WHOSE_CODE = """.venv/bin/python -P -c 'import cluster; print("code of", cluster.__path__[0])'"""


def _lines() -> list[str]:
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for line in block.splitlines() if line]


@pytest.fixture
def temporary() -> Iterator[str]:
    """A folder of its own, so that `tandem stop` ends what is served here and no more; short, for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="qs-", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.fixture
def lent_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A shell command that shows the new environment this interpreter's packages, after its own; pip then installs what
    it is told to, finds there what that requires, and asks no index. What builds must be new: it goes first.
    """
    packages = Path(sysconfig.get_path("purelib"))
    builders = tmp_path / "builders"
    builders.mkdir()
    for path in packages.iterdir():
        if path.name.startswith(("setuptools", "_distutils_hack")):
            (builders / path.name).symlink_to(path)
    monkeypatch.setenv("PYTHONPATH", str(builders))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # which is pip's way to say that there is none
    return f"for folder in .venv/lib/python*/site-packages; do echo {packages} > $folder/lent.pth; done"


def test_the_quickstart_ends_with_an_answer(tmp_path: Path, temporary: str, request: pytest.FixtureRequest) -> None:
    lines = _lines()
    assert len(lines) <= MAX_COMMANDS
    if not IS_SOAK:
        (install,) = [i for i, line in enumerate(lines) if "pip install" in line]
        lines.insert(install, request.getfixturevalue("lent_packages"))
    make_repository(tmp_path / "origin")
    shutil.copytree(MODEL_DIR, tmp_path / "own-model")
    port = free_ports(1)[0]
    here = {
        "REPOSITORY": str(tmp_path / "origin"),
        "/models/Qwen2.5-VL-7B-Instruct": str(tmp_path / "own-model"),
        "--port 8000": f"--port {port} --device cpu",
        "127.0.0.1:8000": f"127.0.0.1:{port}",
        "doctor --model": f"doctor --port {port} --model",
    }
    script = "\n".join([ENDS_ALL, *lines, WHOSE_CODE, "wait"])
    for word, replacement in here.items():
        assert word in script
        script = script.replace(word, replacement)
    done = _typed(["bash", "-eu", "-c", script], tmp_path, temporary)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready to serve" in done.stdout
    answer, _ = json.JSONDecoder().raw_decode(done.stdout, done.stdout.index('{"id"'))
    assert answer["model"] == "mine" and answer["choices"][0]["finish_reason"] in ("stop", "length")
    assert "was told to drain and stop" in done.stderr
    assert not list(Path(temporary).glob("tandem-*")), "something was left behind"
    assert f"code of {tmp_path / 'tandem' / 'cluster'}" in done.stdout, "another installation answered"


def test_the_first_command_of_the_readme(tmp_path: Path, temporary: str) -> None:
    if not IS_SOAK:
        pytest.skip("under `make soak`: it downloads what a bare machine lacks")
    assert "$ make demo " in (ROOT / "README.md").read_text(encoding="utf-8")
    make_repository(tmp_path / "clone")
    done = _typed(["make", "demo"], tmp_path / "clone", temporary)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"(\d+) of \1 answers are right", done.stdout)


def _typed(command: list[str], folder: Path, temporary: str) -> subprocess.CompletedProcess[str]:
    """In a shell that has this interpreter's own python3 and nothing of Ray's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_TOKEN": secrets.token_hex(32), "TMPDIR": temporary}
    environment["PATH"] = f"{Path(sys._base_executable).parent}{os.pathsep}{environment['PATH']}"  # type: ignore[attr-defined]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
