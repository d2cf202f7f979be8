"""The cluster under test: started here, or a deployment that runs already; and what can befall it.

Faults are dealt to processes of this machine by their number, which the cluster itself reports.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from cluster.config import ClusterConfig, build_config
from cluster.errors import ClusterError, ConfigError
from cluster.harness.plan import Fault, Topology, merged
from cluster.launch import RayCluster
from cluster.metrics import LEDGER
from cluster.ray_connection import connect, disconnect

HEAL_S = 120.0
POLL_S = 0.25
MUST_BE_ZERO = (*LEDGER, "num_requests_running", "num_requests_waiting")
_SAMPLE = re.compile(r'^tandem:(\w+)\{worker="([^"]+)"\} (\S+)$', re.MULTILINE)


class Target:
    """Where requests go. Use as a context manager."""

    def __init__(
        self, topology: Topology, *, is_upgraded: bool = False, api_key: str = "", on_status: Callable[[str], None]
    ) -> None:
        """is_upgraded: there must be room for a second cluster beside the first."""
        self._topology = topology
        self._on_status = on_status
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._cluster: RayCluster | None = None
        self._stopped: list[int] = []
        self._lock = threading.Lock()
        self._draining: list[threading.Thread] = []
        self.config: ClusterConfig | None = None
        if not topology.url:
            self.config = _config_of(topology.config, {})
            room = _with_room(self.config, 1 + is_upgraded)
            self._has_connected = connect(room, topology.ray_address or None, on_status)
            try:
                self._cluster = self._start(self.config)
            except BaseException:
                self._leave_ray()
                raise

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._stopped:
            _signal(pid, signal.SIGCONT)
        for thread in self._draining:
            thread.join()
        if self._cluster is not None:
            self._cluster.close()
            self._leave_ray()

    @property
    def url(self) -> str:
        """Where the next request goes."""
        with self._lock:
            return self._topology.url.rstrip("/") if self._cluster is None else self._cluster.url

    @property
    def headers(self) -> Mapping[str, str]:
        return self._headers

    def model_name(self) -> str:
        """The one model that is served."""
        try:
            answer = httpx.get(f"{self.url}/v1/models", headers=dict(self._headers), timeout=30)
        except httpx.HTTPError as error:
            raise ClusterError(f"{self.url} does not answer: {error}") from error
        if answer.status_code != 200:
            raise ClusterError(f"{self.url}/v1/models answered {answer.status_code}: {answer.text[:300]}")
        return str(answer.json()["data"][0]["id"])

    def deal(self, fault: Fault) -> str:
        """Let it go wrong; returns what was done. ConfigError where it cannot be."""
        if self._cluster is None:
            raise ConfigError("faults need a cluster that the harness started: a topology with a config and no url")
        if fault.kind == "upgrade":
            return self._upgrade(fault.config)
        health = self._cluster.workers.get(fault.worker)
        if health is None:
            raise ConfigError(
                f"there is no worker {fault.worker}; there are {', '.join(sorted(self._cluster.workers))}"
            )
        number = signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP
        if not self._cluster.is_here(fault.worker):
            raise ConfigError(f"{fault.worker} runs as process {health.pid} of another machine: it cannot be reached")
        if not _signal(health.pid, number):
            raise ConfigError(f"{fault.worker}, process {health.pid}, is gone already")
        if fault.kind == "stop":
            self._stopped.append(health.pid)
        return f"{signal.Signals(number).name} to {fault.worker}, process {health.pid}"

    def unhealed(self) -> str:
        """Waits until every worker answers and holds nothing; what is left when that does not come."""
        deadline_s, left = time.monotonic() + HEAL_S, "no answer"
        while time.monotonic() < deadline_s:
            left = self._leftovers()
            if not left:
                return ""
            time.sleep(POLL_S)
        return left

    def _leftovers(self) -> str:
        try:
            page = httpx.get(f"{self.url}/metrics", timeout=10).text
        except httpx.HTTPError as error:
            return f"/metrics: {error}"
        figures = {(worker, name): float(value) for name, worker, value in _SAMPLE.findall(page)}
        down = [worker for (worker, name), value in figures.items() if name == "worker_up" and not value]
        held = [f"{w} {name} {value:g}" for (w, name), value in figures.items() if name in MUST_BE_ZERO and value]
        if not any(name == "worker_up" for _, name in figures):
            return "no worker is known"
        return "; ".join([*(f"{worker} is down" for worker in down), *held])

    def _leave_ray(self) -> None:
        if self._has_connected:
            disconnect()

    def _start(self, config: ClusterConfig) -> RayCluster:
        return RayCluster(config, on_status=self._on_status)  # on the Ray that we are connected to

    def _upgrade(self, changes: Mapping[str, Any]) -> str:
        """A second cluster beside the first; clients go to it, then the first one drains in the background."""
        config = _config_of(self._topology.config, changes)
        before, after = self._cluster, self._start(config)
        assert before is not None
        with self._lock:
            self._cluster = after
        self.config = config
        thread = threading.Thread(target=before.close, name="harness-drain", daemon=True)
        thread.start()
        self._draining.append(thread)
        return f"{before.url} drains, {after.url} took over"


def _config_of(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> ClusterConfig:
    """The resolved configuration, on any free port unless it names one."""
    sections = merged(tree, changes)
    sections["gateway"] = {"port": 0} | (sections.get("gateway") or {})
    return build_config(sections).resolve()


def _with_room(config: ClusterConfig, num_clusters: int) -> ClusterConfig:
    """The same for so many clusters at a time, as far as Ray has to know."""
    workers = config.workers
    all_of_them: dict[str, Any] = {kind: num_clusters * count for kind, count in workers.counts.items()}
    return dataclasses.replace(config, workers=dataclasses.replace(workers, **all_of_them))


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
