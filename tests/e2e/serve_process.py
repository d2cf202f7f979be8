"""`tandem serve` in a process of its own, as its users start it."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120.0
COMMAND = (sys.executable, "-m", "cluster")


class Served:
    """A `serve` process, its lines as they come, and where it listens."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "serve", *arguments],
            cwd=ROOT,
            env=None if environment is None else {**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.await_line(r"ready: (http://[^/]+)/")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.put(line)
        self.lines.put(None)

    def await_line(self, pattern: str) -> str:
        """What the pattern's group matches in the first line that has it."""
        seen = []
        while (line := self.lines.get(timeout=TIMEOUT_S)) is not None:
            seen.append(line)
            if match := re.search(pattern, line):
                return match.group(match.lastindex or 0)
        raise AssertionError(f"serve ended with {self.process.wait()} without {pattern!r}: {seen}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def serve(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Served]:
    """Serving until the block ends. environment: over this process's own."""
    served = Served(*arguments, environment=environment)
    try:
        yield served
    finally:
        served.close()
