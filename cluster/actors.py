"""The Ray actors: a worker or the gateway in a process of its own, and nothing else.

Methods carry lifecycle and configuration; media, embeddings and tokens travel over the endpoints. Every incarnation of
a restarted actor loads its model anew and binds a new endpoint, which it reports through `health`.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import ray

from cluster.config import GatewayConfig, ModelConfig
from cluster.directory import WorkerAddress
from cluster.errors import ClusterError
from cluster.gateway_server import GatewayServer
from cluster.logs import configure_logging
from cluster.model_info import ModelInfo
from cluster.router import WorkerKind
from embedding_worker.config import EmbedConfig
from embedding_worker.errors import EmbedError
from embedding_worker.worker import EmbeddingWorker
from language_worker.config import EngineConfig
from language_worker.errors import EngineError
from language_worker.worker import LanguageWorker
from transfer.config import TransferConfig
from transfer.endpoints.allocator import tune_allocator
from transfer.endpoints.contract import Endpoint
from transfer.endpoints.endpoint import open_endpoint
from transfer.errors import TransferError
from transfer.service.service import Service

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerHealth:
    """What a worker says of itself. pid and node_id tell which process this is. failure: why it could not start, and ""
    when it did.
    """

    address: WorkerAddress
    is_healthy: bool
    max_model_len: int
    pid: int
    node_id: str
    failure: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayHealth:
    """port: where it serves, None before it does. is_healthy: false when it has served and does no more, or never will
    (failure says why).
    """

    port: int | None
    is_healthy: bool
    public_key: str | None
    pid: int
    node_id: str
    failure: str = ""


class WorkerActor:
    """One embedding, language, prefill or decode worker. One that cannot start says so through `health`: an exception
    in a constructor would reach the operator as Ray's traceback, and end the actor for good.
    """

    def __init__(
        self,
        name: str,
        model_path: str,
        config: EmbedConfig | EngineConfig,
        transfer: TransferConfig,
        socket_dir: str,
        log_level: str,
        kind: WorkerKind,
    ) -> None:
        configure_logging(log_level)
        tune_allocator()
        self._name = name
        self._kind = kind
        self._failure = ""
        try:
            self._endpoint = _open(name, transfer, socket_dir)
            self._worker = _build(kind, model_path, config, transfer, self._endpoint)
            self._worker.start()
        except Exception as error:
            self._failure = _told(error)

    def health(self) -> WorkerHealth:
        """Answered by the actor's own thread: shows that the process runs and where it listens."""
        if self._failure:
            nowhere = WorkerAddress(name=self._name, kind=self._kind, address="")
            return WorkerHealth(
                address=nowhere,
                is_healthy=False,
                max_model_len=0,
                pid=os.getpid(),
                node_id=_node_id(),
                failure=self._failure,
            )
        endpoint = self._endpoint
        return WorkerHealth(
            address=WorkerAddress(
                name=self._name, kind=self._kind, address=endpoint.address, public_key=endpoint.public_key
            ),
            is_healthy=self._worker.is_healthy,
            max_model_len=getattr(self._worker, "max_model_len", 0),
            pid=os.getpid(),
            node_id=_node_id(),
        )

    def allow(self, public_keys: Sequence[str]) -> None:
        """Let these peers connect (where CURVE is on)."""
        if not self._failure:
            self._endpoint.allow(public_keys)

    def close(self) -> None:
        if not self._failure:
            self._worker.close()


class GatewayActor:
    """The HTTP gateway."""

    def __init__(self, model: ModelConfig, transfer: TransferConfig, socket_dir: str, log_level: str) -> None:
        configure_logging(log_level)
        self._model_name = model.served_model_name
        self._transfer = transfer
        self._server: GatewayServer | None = None
        self._failure = ""
        try:
            self._info = ModelInfo.load(model.path, model.config_overrides)
            self._endpoint = _open("gateway", transfer, socket_dir)
        except Exception as error:
            self._failure = _told(error)

    def serve(self, config: GatewayConfig, workers: Sequence[WorkerAddress], max_model_len: int) -> int:
        """Start serving; returns the port. `config` holds the port of an earlier incarnation, if there was one."""
        if self._server is None:
            service = Service(self._endpoint, self._transfer)
            server = GatewayServer(config, self._model_name, self._info, max_model_len, service)
            server.start(workers)
            self._server = server
        return self._server.port

    def set_workers(self, workers: Sequence[WorkerAddress], withdrawn: Collection[str] = ()) -> None:
        if self._server is not None:
            self._server.set_workers(workers, withdrawn)

    def health(self) -> GatewayHealth:
        server = self._server
        return GatewayHealth(
            port=None if server is None else server.port,
            is_healthy=not self._failure and (server is None or server.is_serving),
            public_key=None if self._failure else self._endpoint.public_key,
            pid=os.getpid(),
            node_id=_node_id(),
            failure=self._failure,
        )

    def close(self) -> None:
        """Drain and stop."""
        if self._server is not None:
            self._server.close()


def _told(error: Exception) -> str:
    """What kept an actor from starting, for its health; with the traceback in the log where details are asked for."""
    logger.debug("could not start", exc_info=error)
    known = isinstance(error, (ClusterError, EmbedError, EngineError, TransferError))
    return str(error) if known else f"{type(error).__name__}: {error}"


def _build(
    kind: WorkerKind, model_path: str, config: EmbedConfig | EngineConfig, transfer: TransferConfig, endpoint: Endpoint
) -> EmbeddingWorker | LanguageWorker:
    if isinstance(config, EmbedConfig):
        return EmbeddingWorker(model_path, config, transfer, endpoint)
    assert kind != "embedding"
    return LanguageWorker(model_path, config, transfer, endpoint, kind)


def _open(name: str, transfer: TransferConfig, socket_dir: str) -> Endpoint:
    """A fresh endpoint of this incarnation: a socket file on one host, else a port of `transfer.host`."""
    if transfer.transport == "ipc":
        return open_endpoint(f"ipc://{socket_dir}/{name}-{uuid.uuid4().hex[:8]}.sock", transfer)
    host = ray.util.get_node_ip_address() if transfer.host == "auto" else transfer.host
    return open_endpoint(f"tcp://{host}:0", transfer, curve=True)


def _node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())
