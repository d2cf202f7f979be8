"""RayCluster: starts the actors of one configuration on Ray, watches them, and ends them by their own handles.

Placement, process restart and node membership are Ray's. What Ray does not see is seen here: a process that is stopped
or hung, and that a restarted worker listens at a new address.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray

from cluster.actors import GatewayActor, GatewayHealth, WorkerActor, WorkerHealth
from cluster.config import ClusterConfig
from cluster.directory import WorkerAddress
from cluster.errors import ConfigError, NotReady
from cluster.model_info import ModelInfo
from cluster.ray_connection import connect, role_resource, wants_gpu
from cluster.router import WorkerKind
from cluster.runtime_folder import RuntimeFolder, is_running

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 1.0
CALL_TIMEOUT_S = 10.0
START_CALL_S = 60.0  # while nothing is served yet
CLOSE_S = 15.0  # beyond what the gateway's requests may take
JOIN_S = 30.0
GATEWAY = "gateway"
Status = Callable[[str], None]
Roster = tuple[list[WorkerAddress], set[str]]  # all workers; the names of those whose process has ended


class RayCluster:
    """A running cluster. Use as a context manager, or call `close`."""

    def __init__(
        self,
        config: ClusterConfig,
        *,
        ray_address: str | None = None,
        log_level: str = "WARNING",
        on_status: Status = logger.info,
    ) -> None:
        """Connect to Ray (None: start one in this machine), place the actors, load the model, begin to serve.

        config: resolved. Raises ConfigError for what cannot be started, NotReady when it takes longer than
        workers.start_timeout_s; nothing is left running then.
        """
        self._log_level = log_level
        self._owns_ray = not ray.is_initialized()
        self._actors: dict[str, Any] = {}
        self._known: dict[str, WorkerHealth] = {}
        self._pids: dict[str, int] = {}
        self._nodes: dict[str, str] = {}
        self._restarting: set[str] = set()  # died or was ended; its next incarnation has not answered yet
        self._told: Roster | None = None  # what the gateway serves with; None: it has to start serving
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="cluster-watch", daemon=True)
        self._folder = RuntimeFolder()
        try:
            _require_free_port(config.gateway.host, config.gateway.port)
            connect(config, ray_address, on_status)
            self.config = _with_transport(config)
            self._start(on_status)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where the gateway serves."""
        host = self.config.gateway.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.config.gateway.port}"

    @property
    def workers(self) -> dict[str, WorkerHealth]:
        """The workers by name, as they last reported."""
        return dict(self._known)

    def is_here(self, name: str) -> bool:
        """Whether a worker's process, or the gateway's, is one of this node: elsewhere its number means another one."""
        return bool(self._nodes.get(name) == ray.get_runtime_context().get_node_id())

    def close(self) -> None:
        """Drain the gateway, end every actor, leave Ray (and end it if it was started here). Safe to repeat."""
        self._stopping.set()
        if self._watcher.is_alive() and threading.current_thread() is not self._watcher:
            self._watcher.join(JOIN_S)
        names = [GATEWAY, *(name for name in self._actors if name != GATEWAY)]
        for name in names:
            actor = self._actors.pop(name, None)
            if actor is None:
                continue
            if name in self._pids:  # an actor that still starts, or is dead, needs no farewell
                with suppress(ray.exceptions.RayError):
                    drain_s = self.config.gateway.drain_s if name == GATEWAY else 0.0
                    ray.get(actor.close.remote(), timeout=CLOSE_S + drain_s)
            with suppress(ray.exceptions.RayError):
                ray.kill(actor)
        if self._owns_ray:
            ray.shutdown()  # also after a start that was cut short
        self._folder.close()

    # -- starting ---------------------------------------------------------------------------------------------------

    def _start(self, on_status: Status) -> None:
        config = self.config
        info = ModelInfo.load(config.model.path, config.model.config_overrides)
        for kind, count in config.workers.counts.items():
            if kind == "embedding" and not info.has_vision:
                continue
            for i in range(count):
                self._actors[f"{kind}-{i}"] = self._spawn_worker(f"{kind}-{i}", kind)
        self._actors[GATEWAY] = (
            ray.remote(GatewayActor)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=0, resources=_role(GATEWAY, config))
            .remote(config.model, config.transfer, self._folder.path, self._log_level)
        )
        on_status(f"loading {config.model.served_model_name} into {len(self._actors) - 1} workers")
        self._await_workers()
        self._allow_peers(START_CALL_S)
        addresses = self._addresses()
        served = self._actors[GATEWAY].serve.remote(config.gateway, addresses, self._max_model_len())
        try:
            port = ray.get(served, timeout=START_CALL_S)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # the gateway's own: the port is taken
        self.config = dataclasses.replace(config, gateway=dataclasses.replace(config.gateway, port=port))
        self._told = addresses, set()
        self._watcher.start()
        on_status(f"serving {config.model.served_model_name} at {self.url}")

    def _spawn_worker(self, name: str, kind: WorkerKind) -> Any:
        workers = self.config.workers
        part: Any = self.config.embedding if kind == "embedding" else self.config.language
        role = _role(kind, self.config)
        num_gpus = workers.num_gpus if workers.num_gpus >= 0 else float(wants_gpu(part.device))
        return (
            ray.remote(WorkerActor)
            .options(num_cpus=workers.num_cpus, num_gpus=num_gpus, max_restarts=-1, max_task_retries=0, resources=role)
            .remote(name, self.config.model.path, part, self.config.transfer, self._folder.path, self._log_level, kind)
        )

    def _await_workers(self) -> None:
        timeout_s = self.config.workers.start_timeout_s
        pending = {actor.health.remote(): name for name, actor in self._actors.items()}
        ready, late = ray.wait(list(pending), num_returns=len(pending), timeout=timeout_s)
        for ref in ready:
            name = pending[ref]
            try:
                health = ray.get(ref)
            except ray.exceptions.RayActorError as error:  # its process died
                raise ConfigError(f"{name} could not start: {_cause(error)}") from error
            if health.failure:
                raise ConfigError(f"{name} could not start: {health.failure}")
            self._pids[name], self._nodes[name] = health.pid, health.node_id
            if isinstance(health, WorkerHealth):
                self._known[name] = health
        if late:
            names = ", ".join(pending[ref] for ref in late)
            raise NotReady(
                f"{names} did not start within {timeout_s:g} s; the cluster has {ray.cluster_resources()} of which "
                f"{ray.available_resources()} are free; lower workers.num_cpus or num_gpus, or add nodes"
            )

    def _addresses(self) -> list[WorkerAddress]:
        return [health.address for health in self._known.values()]

    def _max_model_len(self) -> int:
        return min(h.max_model_len for h in self._known.values() if h.address.kind != "embedding")

    def _allow_peers(self, timeout_s: float = CALL_TIMEOUT_S) -> None:
        """Everyone may connect to everyone of this cluster (public keys only leave a process)."""
        gateway = ray.get(self._actors[GATEWAY].health.remote(), timeout=timeout_s)
        keys = [key for key in (gateway.public_key, *(a.public_key for a in self._addresses())) if key]
        if keys:
            skipped = (GATEWAY, *self._restarting)
            allowed = [a.allow.remote(keys) for name, a in self._actors.items() if name not in skipped]
            ray.get(allowed, timeout=timeout_s)

    # -- watching ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        asked: dict[str, tuple[Any, float]] = {}
        while (away_s := self._pause()) is not None:
            asked = {name: (ref, since_s + away_s) for name, (ref, since_s) in asked.items()}
            for name, actor in list(self._actors.items()):
                if self._has_ended(name):
                    self._restarting.add(name)
                if name not in asked:
                    asked[name] = actor.health.remote(), time.monotonic()
                ref, since_s = asked[name]
                try:
                    if ray.wait([ref], timeout=0)[0]:
                        del asked[name]
                        self._on_answer(name, ray.get(ref))
                    elif time.monotonic() - since_s > self._patience_s(name):
                        del asked[name]
                        self._on_silence(name)
                except ray.exceptions.RayError as error:  # it died with the question; Ray restarts it
                    logger.warning("%s does not answer: %s", name, type(error).__name__)
                    self._restarting.add(name)
            try:
                self._tell_gateway()
            except ray.exceptions.RayError as error:  # told again in the next round
                logger.warning("the gateway could not be told of its workers: %s", type(error).__name__)

    def _pause(self) -> float | None:
        """Until the next round; None: there is none. What it took longer, when this process was stopped, say, in
        seconds: nobody could answer then.
        """
        begun = time.monotonic()
        if self._stopping.wait(WATCH_INTERVAL_S):
            return None
        return max(0.0, time.monotonic() - begun - WATCH_INTERVAL_S)

    def _patience_s(self, name: str) -> float:
        """How long an answer may take. Ray holds a call until a restarted actor has loaded its model."""
        workers = self.config.workers
        return workers.start_timeout_s if name in self._restarting else workers.health_timeout_s

    def _has_ended(self, name: str) -> bool:
        """Whether the process that answered last is one of this node and no more."""
        pid = self._pids.get(name)
        return pid is not None and self.is_here(name) and not is_running(pid)

    def _on_answer(self, name: str, health: WorkerHealth | GatewayHealth) -> None:
        self._pids[name], self._nodes[name] = health.pid, health.node_id
        if self._has_ended(name):
            return  # its last words
        self._restarting.discard(name)
        if not health.is_healthy:
            logger.error("%s reports that it failed; restarting it (%s)", name, health.failure or "while it ran")
            self._end_process(name)
        elif isinstance(health, WorkerHealth):
            if health.address != self._known[name].address:
                logger.warning("%s is back as process %d at %s", name, health.pid, health.address.address)
            self._known[name] = health
        elif health.port is None:
            logger.warning("the gateway is back as process %d", health.pid)
            self._told = None

    def _on_silence(self, name: str) -> None:
        """Ray keeps a stopped process for ever; end it, and Ray restarts the actor."""
        logger.error("%s has not answered for %g s; restarting it", name, self.config.workers.health_timeout_s)
        self._end_process(name)

    def _end_process(self, name: str) -> None:
        self._restarting.add(name)
        ray.kill(self._actors[name], no_restart=False)

    def _tell_gateway(self) -> None:
        """Bring the gateway, and every worker's list of peers, up to date; what failed is tried again later."""
        addresses, ended = self._addresses(), self._restarting & self._known.keys()
        if (addresses, ended) == self._told or GATEWAY in self._restarting:
            return
        if self._told is None or addresses != self._told[0]:
            self._allow_peers()
        gateway = self._actors[GATEWAY]
        if self._told is None:
            serve = gateway.serve.remote(self.config.gateway, addresses, self._max_model_len())
            ray.get(serve, timeout=CALL_TIMEOUT_S)
        ray.get(gateway.set_workers.remote(addresses, ended), timeout=CALL_TIMEOUT_S)
        self._told = addresses, ended


def _role(kind: str, config: ClusterConfig) -> dict[str, float] | None:
    """The Ray resource that keeps an actor to the nodes of its role."""
    return {role_resource(kind): 1.0} if config.workers.placement == "roles" else None


def _with_transport(config: ClusterConfig) -> ClusterConfig:
    """ "auto" becomes ipc where the whole cluster is this one host, else tcp. ConfigError for what cannot work here."""
    if config.transfer.transport not in ("auto", "ipc", "tcp"):
        raise ConfigError(f"transfer.transport {config.transfer.transport!r} joins no processes; use auto, ipc or tcp")
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    if num_nodes > 1 and config.transfer.host != "auto":
        raise ConfigError(f"transfer.host {config.transfer.host} cannot be the address of {num_nodes} nodes: use auto")
    if config.transfer.transport != "auto":
        return config
    transport = "ipc" if num_nodes == 1 else "tcp"
    return dataclasses.replace(config, transfer=dataclasses.replace(config.transfer, transport=transport))


def _cause(error: BaseException) -> str:
    """The error that ended an actor's constructor, all its lines, without the remote traceback before it."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if re.match(r"[A-Za-z_][\w.]*: ", line)]
    return "\n".join(lines[starts[-1] :]) if starts else (lines[-1].strip() if lines else type(error).__name__)


def _require_free_port(host: str, port: int) -> None:
    """Raises ConfigError when the port is taken here; whether this is the gateway's host is not known yet."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigError(f"{host}:{port} is in use; choose another --port, or 0 for any free one") from error
