"""A worker in a process of its own: opens and closes workers as JSON lines on standard input ask; answers each line.

    python -m tests.e2e.worker_process embedding|language|prefill|decode
    {"do": "open", "model": DIR, "address": "ipc://...", "curve": false, "transfer": {...}, "config": {...}}
    {"do": "allow", "public_keys": [...]}   {"do": "stats"}   {"do": "close"}

The parent's half is `WorkerProcess`. One worker is open at a time; end of input closes it and ends the process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from embedding_worker.config import EmbedConfig
from embedding_worker.worker import EmbeddingWorker
from language_worker.config import EngineConfig
from language_worker.worker import LanguageWorker
from transfer.config import TransferConfig
from transfer.endpoints.contract import Endpoint
from transfer.endpoints.endpoint import open_endpoint

ROOT = Path(__file__).parents[2]
WAIT_S = 120.0


class WorkerProcess:
    """Starts the process at once; `ask` waits for the answer to one line."""

    def __init__(self, kind: str) -> None:
        command = [sys.executable, "-m", "tests.e2e.worker_process", kind]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        """The answer of the worker process. AssertionError with its reason when it failed or is gone."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
        line = self.process.stdout.readline()
        assert line, f"the worker process ended with {self.process.poll()} on {do!r}"
        answer: dict[str, Any] = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer

    def close(self) -> None:
        """End its input, wait, and insist on a clean exit."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            code = self.process.wait(WAIT_S)
        finally:
            self.process.kill()
            self.process.stdout.close()
        assert code == 0, f"the worker process ended with {code}"


class _Host:
    """The open worker of this process."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._worker: EmbeddingWorker | LanguageWorker | None = None
        self._endpoint: Endpoint | None = None

    def open(self, model: str, address: str, curve: bool, transfer: dict[str, Any], config: dict[str, Any]) -> Any:
        shared = TransferConfig(**transfer)
        endpoint = self._endpoint = open_endpoint(address, shared, curve=curve)
        if self._kind == "embedding":
            self._worker = EmbeddingWorker(model, EmbedConfig(**config), shared, endpoint)
        else:
            self._worker = LanguageWorker(model, EngineConfig(**config), shared, endpoint, self._kind)  # type: ignore[arg-type]
        self._worker.start()
        return {"address": self._worker.address, "public_key": self._worker.public_key}

    def allow(self, public_keys: list[str]) -> Any:
        assert self._endpoint is not None
        self._endpoint.allow(public_keys)
        return {}

    def stats(self) -> Any:
        assert self._worker is not None
        return self._worker.stats()

    def close(self) -> Any:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        return {}


def main(kind: str) -> None:
    """Serve lines until the input ends."""
    host = _Host(kind)
    actions: dict[str, Callable[..., Any]] = {
        "open": host.open, "allow": host.allow, "stats": host.stats, "close": host.close,
    }  # fmt: skip
    for line in sys.stdin:
        values = json.loads(line)
        try:
            answer = actions[values.pop("do")](**values)
        except Exception as error:  # told to the parent, whose test fails with it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    host.close()


if __name__ == "__main__":
    main(sys.argv[1])
