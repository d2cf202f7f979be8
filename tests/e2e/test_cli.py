"""The command line as its users start it: `python -m cluster ...` in processes of its own."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from safetensors.torch import load_file, save_file

from cluster.demo import MODEL_DIR, MODEL_NAME, questions
from tests.e2e.ray_head import free_ports
from tests.e2e.serve_process import COMMAND, TIMEOUT_S, serve
from tests.e2e.serving import Serving, ask_demo_question, long_body
from tests.profiles import IS_SOAK
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]


SIGNALS = [  # each signal and each step every day
    (number, step)
    for number in (signal.SIGTERM, signal.SIGINT)
    for step in ("starting Ray", "loading")
    if IS_SOAK or (number == signal.SIGTERM) == (step == "loading")
]


def _run(*arguments: str, cwd: Path = ROOT, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, input=text, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def test_doctor_finds_the_demo_model_ready() -> None:
    result = _run("doctor", "--port", str(free_ports(1)[0]))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ready to serve" in result.stdout
    assert f"torch {__import__('torch').__version__}" in result.stdout


def test_doctor_says_what_is_wrong_with_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = _run("doctor", "--port", str(free_ports(1)[0]), "--model", str(tmp_path))
    assert result.returncode == 1
    bad = [line for line in result.stdout.splitlines() if line.strip().startswith("bad")]
    assert len(bad) == 2 and "weights" in bad[0] and "tokenizer" in bad[1], result.stdout
    assert "something must be repaired first" in result.stdout


def test_doctor_reports_a_taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = _run("doctor", "--port", str(taken.getsockname()[1]))
    assert result.returncode == 1
    assert re.search(r"bad\s+cannot listen on 127\.0\.0\.1:", result.stdout), result.stdout


@pytest.mark.parametrize("index", [0, -2])
def test_generate_answers_about_an_image(index: int) -> None:
    question = questions()[index]
    arguments = ("generate", "--model", str(MODEL_DIR), "--dtype", "float32", "--image", str(question.image))
    result = _run(*arguments, "--prompt", "-", text=question.text)
    assert result.returncode == 0, result.stderr
    assert result.stdout == question.answer + "\n"


def test_generate_on_a_broken_image_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"no picture")
    result = _run("generate", "--model", str(MODEL_DIR), "--image", str(tmp_path / "no.png"), "--prompt", "?")
    _assert_one_line(result, "image")


# -- serve ------------------------------------------------------------------------------------------------------------


def _assert_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 2 and one line that tells what is wrong; before it only what serve says of its progress."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    *before, last = result.stderr.strip().splitlines()
    assert last.startswith("tandem: ") and all(word in last for word in words), result.stderr
    assert all(_is_progress(line) for line in before), result.stderr
    assert "Traceback" not in result.stderr and "\x1b" not in result.stderr


def _is_progress(line: str) -> bool:
    return line.startswith(("starting Ray", "connecting to Ray", "loading "))


def test_serve_refuses_an_unknown_setting(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"model: {{path: {MODEL_DIR}}}\nlanguage: {{page_sise: 3}}\n")
    _assert_one_line(_run("serve", "--config", str(tmp_path / "c.yaml")), "language.page_sise", "page_size")


def test_serve_refuses_a_missing_folder(tmp_path: Path) -> None:
    _assert_one_line(_run("serve", "--model", str(tmp_path / "nowhere")), "nowhere")


@pytest.mark.ray
def test_serve_refuses_a_taken_port(ray_token: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        _assert_one_line(_run("serve", "--model", str(MODEL_DIR), "--port", port), f"127.0.0.1:{port}", "--port")


@pytest.mark.ray
def test_serve_tells_what_kept_a_worker_from_starting(ray_token: None, tmp_path: Path) -> None:
    shutil.copytree(MODEL_DIR, tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    result = _run("serve", "--model", str(tmp_path / "cut"), "--port", "0")
    _assert_one_line(result, "language-0 could not start", "missing: model.layers.1.mlp.up_proj.weight")


def test_serve_tells_at_once_that_no_ray_listens() -> None:
    with socket.socket() as silent:  # bound, so that nobody else listens there, and not listening
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        _assert_one_line(_run("serve", "--model", str(MODEL_DIR), "--ray-address", address), address, "refused")


@pytest.mark.ray
@pytest.mark.parametrize(("number", "step"), SIGNALS)
def test_a_signal_while_serve_starts_takes_everything_down(ray_token: None, number: int, step: str) -> None:
    for _ in range(5):  # it may be ready before the signal comes
        if _was_in_time(number, step):
            return
    raise AssertionError(f"it was always ready before signal {number} came")


def _was_in_time(number: int, step: str) -> bool:
    """Send it at that step; whether it came before serve was ready."""
    mark = secrets.token_hex(16)  # every process of this cluster has it in its environment
    command = [*COMMAND, "serve", "--model", str(MODEL_DIR), "--port", "0"]
    environment = {**os.environ, "TANDEM_TEST_MARK": mark}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(step):
                break
        process.send_signal(number)
        rest = process.stderr.read().splitlines()
        code = process.wait(TIMEOUT_S)
    assert "Traceback" not in "".join(rest)
    eventually(lambda: not _processes_with(mark), lambda: f"still running: {_processes_with(mark)}", TIMEOUT_S)
    if any(line.startswith("ready:") for line in rest):
        assert code == 0
        return False
    assert code == (0 if number == signal.SIGTERM else 130)
    assert rest[-1] == "stopped before it was ready"
    return True


def _processes_with(mark: str) -> list[str]:
    """Command lines of the processes whose environment holds `mark`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile, or another user's
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " ")[:100])
    return found


@pytest.mark.ray
def test_serve_answers_and_drains_at_sigterm(ray_token: None, tmp_path: Path) -> None:
    patient = "workers: {num_cpus: 0.25, health_timeout_s: 120.0}\ntransfer: {peer_timeout_s: 90.0}\n"
    (tmp_path / "c.yaml").write_text(patient + "gateway: {port: 1}\n")
    (tmp_path / "keys").write_text("secret\n")
    arguments = ("--config", str(tmp_path / "c.yaml"), "--model", str(MODEL_DIR), "--served-model-name", MODEL_NAME)
    with (
        serve(*arguments, "--port", "0", "--api-key-file", str(tmp_path / "keys")) as served,
        Serving(served.url) as serving,
    ):
        assert httpx.get(served.url + "/v1/models", timeout=TIMEOUT_S).status_code == 401
        serving.client.headers["authorization"] = "Bearer secret"
        ask_demo_question(serving)
        with serving.events(long_body("Tell me more.", 1000)) as events:
            first = [next(events) for _ in range(5)]
            assert all('"finish_reason":null' in event for event in first)
            os.kill(served.process.pid, signal.SIGTERM)
            served.await_line("draining")
            rest = list(events)
        assert rest[-1] == "[DONE]"
        assert any('"finish_reason":"length"' in event for event in rest), rest[-3:]
        assert not any('"error"' in event for event in rest)
        assert served.process.wait(TIMEOUT_S) == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(served.url + "/health", timeout=TIMEOUT_S)
