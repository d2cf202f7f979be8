"""GatewayServer: the gateway with its way to the workers, served by uvicorn on a thread of its own.

Owns the HTTP socket, the service that calls the workers, and the monitor that notices silent ones. Runs in any process;
knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import threading
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

import uvicorn

from cluster.config import GatewayConfig
from cluster.directory import WorkerAddress, WorkerDirectory
from cluster.errors import ConfigError, WorkerLost
from cluster.gateway.app import create_app
from cluster.gateway.context import GatewayContext
from cluster.gateway.state import GatewayState
from cluster.handoff import Handoff
from cluster.metrics import GatewayMetrics, gather_stats
from cluster.model_info import ModelInfo
from cluster.monitor import WorkerMonitor
from cluster.router import is_split
from transfer.endpoints.addresses import is_loopback
from transfer.errors import RemoteFailure
from transfer.service.service import Service

logger = logging.getLogger(__name__)

BACKLOG = 2048
LAST_WORDS_S = 5.0  # for requests that did not end in time to say so


class GatewayServer:
    """Binds on construction (ConfigError when the port is taken); serves between `start` and `close`."""

    def __init__(
        self, config: GatewayConfig, model_name: str, info: ModelInfo, max_model_len: int, service: Service
    ) -> None:
        self._info = info
        self._service = service
        self._directory = WorkerDirectory(service)
        self._monitor = WorkerMonitor(service, self._directory)
        self._socket = _bind(config.host, config.port)
        if not config.api_keys and not is_loopback(config.host):
            logger.warning("%s:%d answers everyone who can reach it: set an API key", config.host, self.port)
        metrics = GatewayMetrics()
        context = GatewayContext(
            config=config,
            model_name=model_name,
            tokenizer=info.tokenizer,
            chat_template=info.chat_template,
            handoff=Handoff(service, self._directory, metrics.count_attempt),
            max_model_len=max_model_len,
            worker_stats=self._worker_stats,
            ready=self._ready,
            image_token_id=info.image_token_id,
            metrics=metrics,
        )
        app = create_app(context)
        self._state: GatewayState = app.state.gateway
        self._drain_s = config.drain_s
        limit_s = math.ceil(config.drain_s + LAST_WORDS_S)
        self._server = uvicorn.Server(
            uvicorn.Config(app, lifespan="on", log_config=None, access_log=False, timeout_graceful_shutdown=limit_s)
        )
        self._thread = threading.Thread(
            target=lambda: self._server.run(sockets=[self._socket]), name="gateway-http", daemon=True
        )

    @property
    def port(self) -> int:
        """The port that is really bound."""
        return int(self._socket.getsockname()[1])

    @property
    def is_serving(self) -> bool:
        return self._thread.is_alive()

    def start(self, workers: Iterable[WorkerAddress]) -> None:
        """Start the I/O, monitor and HTTP threads."""
        self._service.start()
        self.set_workers(workers)
        self._monitor.start()
        self._thread.start()

    def set_workers(self, workers: Iterable[WorkerAddress], withdrawn: Collection[str] = ()) -> None:
        """The workers are these from now on; of those in `withdrawn` the process has ended."""
        workers = list(workers)
        self._service.endpoint.allow([w.public_key for w in workers if w.public_key])
        self._directory.replace(workers, withdrawn)

    def close(self) -> None:
        """Take no new request, let running ones end (for `gateway.drain_s`, then with an error), stop every thread."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(self._drain_s)
            self._state.end_running(WorkerLost("the server stopped before this request had ended"))
            self._thread.join(2 * LAST_WORDS_S)
        self._monitor.close()
        self._service.close()
        self._socket.close()

    def _ready(self) -> tuple[bool, str]:
        views = self._directory.views()
        kinds = ["prefill", "decode"] if is_split(views) else ["language"]
        kinds += ["embedding"] * self._info.has_vision
        alive = {view.kind for view in views if view.is_alive}
        missing = [kind for kind in kinds if kind not in alive]
        return (not missing, f"no live {' and no live '.join(missing)} worker" if missing else "")

    async def _worker_stats(self) -> dict[str, Mapping[str, Any] | None]:
        workers = self._directory.all()
        return await gather_stats({worker.name: partial(self._stats_of, worker) for worker in workers})

    async def _stats_of(self, worker: WorkerAddress) -> Mapping[str, Any]:
        answer: Future[Mapping[str, Any]] = Future()

        def on_end(body: dict[str, Any] | None, failure: RemoteFailure | None) -> None:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(failure) if failure is not None else answer.set_result(body or {})

        call = self._service.call(self._directory.connection(worker), "stats", {}, on_end=on_end)
        try:
            return await asyncio.wrap_future(answer)
        finally:
            call.cancel()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol must be named: asyncio switches Nagle off only for sockets that say TCP, and with it on, every short
    # stream waits 40 ms for a delayed acknowledgement (measured: first token of the demo 55 ms instead of 15).
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)  # so that nobody is refused while uvicorn starts
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port, or 0 for any free one"
        ) from error
    return listener
