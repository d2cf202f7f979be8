"""`tandem chaos` as its users start it: a process before an HTTP server, told to stop by a signal."""

from __future__ import annotations

import http.server
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0
COMMAND = (sys.executable, "-m", "cluster", "chaos")
BODY = b"0123456789" * 10_000


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers every GET with BODY."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.handle_error = lambda *_: None  # type: ignore[method-assign]  # links break here, on purpose
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@contextmanager
def chaos(upstream: str, *flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(URL of the relay, its process)."""
    process = subprocess.Popen(
        [*COMMAND, "--listen", "127.0.0.1:0", "--upstream", upstream, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        match = re.match(r"relaying tcp://(127\.0\.0\.1:\d+) to ", line)
        assert match, line
        yield f"http://{match[1]}/", process
    finally:
        process.kill()
        process.communicate()


def _stop(process: subprocess.Popen[str], number: signal.Signals) -> str:
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    return out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_relays_http_and_prints_what_it_did_when_told_to_stop(
    server: str, tmp_path: Path, number: signal.Signals
) -> None:
    report = tmp_path / "report.json"
    with chaos(server, "--delay", "5", "--corrupt", "0", "--json", str(report)) as (url, process):
        assert httpx.get(url, timeout=TIMEOUT_S).content == BODY
        out = _stop(process, number)
    assert len(out.splitlines()) == 1 and "links 1," in out and "never fired" not in out
    record = json.loads(report.read_text())
    assert record["counts"]["bytes_down"] > len(BODY) and record["counts"]["delay"] > 1
    assert record["faults"]["delay_ms"] == 5 and record["seed"] == 0 and record["never_fired"] == []


def test_a_cut_answer_is_a_broken_answer_and_the_next_one_is_whole(server: str) -> None:
    with chaos(server, "--cut-after", "20K", "--direction", "down", "--throttle", "100M") as (url, process):
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(url, timeout=TIMEOUT_S)
        assert httpx.get(url, timeout=TIMEOUT_S).content == BODY
        out = _stop(process, signal.SIGTERM)
    assert "cut 1," in out and "cut after 1" in out


def test_it_says_what_never_fired(server: str) -> None:
    with chaos(server, "--drop", "1", "--segment", "1M", "--seed", "3", "--cut-every", "1G") as (_, process):
        out = _stop(process, signal.SIGTERM)
    assert out.strip().endswith("asked for but never fired: drop, cut_every")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--listen", "nowhere", "--upstream", "127.0.0.1:1"], "nowhere"),
        (["--listen", "127.0.0.1:0", "--upstream", "127.0.0.1:1", "--drop", "2"], "probability"),
        (["--listen", "127.0.0.1:0", "--upstream", "127.0.0.1:1", "--json", "/nowhere/x"], "--json"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_code_2(arguments: list[str], words: str) -> None:
    result = subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert result.returncode == 2 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("tandem: ") and words in line
