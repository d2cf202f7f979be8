"""The script of the probes and of `helm test`, against a server that is not ready at first."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.helm.rendering import CHART, containers, of_kind, rendered

KEY = "a-key-that-nobody-else-has"


class Gateway(BaseHTTPRequestHandler):
    """Loads for as many questions as `refusals` says; then answers."""

    refusals = 0

    def do_GET(self) -> None:
        if self.path == "/ready" and Gateway.refusals > 0:
            Gateway.refusals -= 1
            self._send(503, {"error": {"message": "no live language worker"}})
        else:
            self._send(200, {"data": [{"id": "a-model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        is_known = self.headers["authorization"] == f"Bearer {KEY}" and body["model"] == "a-model"
        self._send(200 if is_known else 401, {"usage": {"completion_tokens": 1}})

    def _send(self, status: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("chart_probe", CHART / "files" / "probe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    return module


def test_the_canary_of_helm_test_waits_for_the_model(url: str, probe: Any, tmp_path: Any) -> None:
    """`helm install` returns long before the model is loaded, and `helm test` follows it in the README."""
    (tmp_path / "api-keys").write_text(KEY + "\n")
    (pod,) = of_kind(rendered("defaults"), "Pod")
    (command,) = [c["command"] for where, c, _ in containers([pod])]
    words = [word.replace("/etc/tandem/secrets", str(tmp_path)) for word in command[2:]]
    words[words.index("--url") + 1] = url
    wait_s = float(words[words.index("--wait-s") + 1])
    assert 240 <= wait_s < pod["spec"]["activeDeadlineSeconds"] <= 300, "helm gives a test five minutes"
    Gateway.refusals = 5
    assert probe.main(words) == 0 and Gateway.refusals == 0


def test_a_probe_asks_once_unless_it_is_told_to_wait(url: str, probe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Gateway.refusals = 5
    assert probe.main(["canary", "--url", url]) == 1 and Gateway.refusals == 4
    assert "/ready answered 503" in capsys.readouterr().err
    assert probe.main(["canary", "--url", url, "--wait-s", "0.015"]) == 1 and Gateway.refusals >= 1
    Gateway.refusals = 0
    assert probe.main(["canary", "--url", url]) == 1, "it has no key"
    assert "answered 401" in capsys.readouterr().err
