"""The quickstart's lines, typed into a shell: a newcomer's way from a checkout to an answer."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.demo import MODEL_DIR
from tests.e2e.ray_head import ROOT, free_ports

pytestmark = pytest.mark.ray

TIMEOUT_S = 200.0
MAX_COMMANDS = 10


def _lines() -> list[str]:
    text = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for line in block.splitlines() if line]


@pytest.fixture
def temporary() -> Iterator[str]:
    """A folder of its own, so that `tandem stop` ends what is served here and no more; short, for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="qs-", ignore_cleanup_errors=True) as folder:
        yield folder


def test_the_quickstart_ends_with_an_answer(tmp_path: Path, temporary: str) -> None:
    lines = _lines()
    assert len(lines) <= MAX_COMMANDS
    start = next(i for i, line in enumerate(lines) if "doctor" in line)
    assert all(
        re.match(r"git clone|python3 -m venv|\.venv/bin/pip install|export MODEL", line) for line in lines[:start]
    )
    model, port = tmp_path / "own-model", free_ports(1)[0]
    shutil.copytree(MODEL_DIR, model)
    tandem = f"{sys.executable} -m cluster"
    script = "\n".join([f"export MODEL={model}", *lines[start:], "wait"])
    script = script.replace(".venv/bin/tandem", tandem).replace("--port 8000", f"--port {port} --device cpu")
    script = script.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace("tandem doctor", f"{tandem} doctor")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_TOKEN": secrets.token_hex(32), "TMPDIR": temporary}
    done = subprocess.run(
        ["bash", "-eu", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ready to serve" in done.stdout
    (answer,) = [json.loads(line[line.index('{"id"') :]) for line in done.stdout.splitlines() if '{"id"' in line]
    assert answer["model"] == "mine" and answer["choices"][0]["finish_reason"] in ("stop", "length")
    assert "was told to drain and stop" in done.stderr
    assert not list(Path(temporary).glob("tandem-*")), "something was left behind"
