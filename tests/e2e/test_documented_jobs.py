"""The `ray job submit` lines of docs/operating.md, with this machine's head, model and files in place of theirs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import httpx
import pytest

from cluster.demo import MODEL_DIR, questions
from tests.e2e.ray_head import BIN, JOB_S, ROOT, RayHead, free_ports
from tests.e2e.serving import Serving, chat_body
from tests.profiles import IS_SOAK
from tests.waiting import eventually

pytestmark = pytest.mark.ray

KEY = "a-key-that-nobody-else-has"


def _documented(word: str, here: dict[str, str]) -> list[str]:
    """The words of the one line that has `word`, as they are typed here; every place of `here` must be in it."""
    page = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    (line,) = [line for line in re.findall(r"^\$ (ray job submit .*)$", page, re.MULTILINE) if word in line]
    for there, replacement in here.items():
        assert there in line, f"the page says no more {there}"
        line = line.replace(there, replacement)
    return [str(BIN / "ray"), *shlex.split(line)[1:]]


def _run(head: RayHead, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=JOB_S)


def test_a_benchmark_is_a_job_that_checks_every_answer(guarded_head: RayHead, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    here = {"http://HEAD:8265": guarded_head.dashboard, "/tmp/figures.json": str(figures)}
    done = _run(guarded_head, _documented("cluster harness", here))
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(figures.read_text())
    samples = [sample for step in result["steps"] for sample in step["samples"]]
    assert result["has_passed"] and len(samples) >= 40
    assert {s["text"] for s in samples} <= {q.answer for q in questions()}
    assert "connecting to Ray at" in done.stdout, "it must join the cluster that it was submitted to"


def test_serving_is_a_job_that_drains_when_it_is_stopped(guarded_head: RayHead, tmp_path: Path) -> None:
    if not IS_SOAK:
        pytest.skip("under `make soak`; tests/e2e/test_deploy.py submits the chart's serve job every day")
    (tmp_path / "keys").write_text(KEY + "\n")
    port = free_ports(1)[0]
    url = f"http://127.0.0.1:{port}"
    here = {
        "http://HEAD:8265": guarded_head.dashboard,
        "/models/Qwen2.5-VL-7B-Instruct": f"{MODEL_DIR} --served-model-name tandem-demo --port {port}",
        "--host 0.0.0.0": "--host 127.0.0.1",
        "/secrets/keys": str(tmp_path / "keys"),
    }
    command = _documented("cluster serve", here)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=guarded_head.environment, stdout=log, stderr=log)
    try:
        said = (tmp_path / "log").read_text
        eventually(lambda: "ready: http" in said() or process.poll() is not None, said, JOB_S)
        with Serving(url) as serving:
            serving.client.headers["authorization"] = f"Bearer {KEY}"
            question = questions()[0]
            assert serving.text(chat_body(question.text, question.image)) == question.answer
        (job,) = re.findall(r"ray job stop (\w+)", said())
        stopped = _run(guarded_head, _stop(guarded_head, job))
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        process.wait(JOB_S)
        assert "draining" in said() and "STOPPED" in said().upper()
        with pytest.raises(httpx.TransportError):
            httpx.get(url + "/health")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _stop(head: RayHead, job: str) -> list[str]:
    return [str(BIN / "ray"), "job", "stop", "--address", head.dashboard, job]
