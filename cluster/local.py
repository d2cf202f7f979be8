"""LocalWorkers: both halves of one model in this process, joined by in-memory endpoints; one worker of each kind.

The same workers, protocol and handoff as in a cluster, without Ray and without ZeroMQ.
"""

from __future__ import annotations

import uuid
from contextlib import ExitStack

from cluster.config import ClusterConfig
from cluster.directory import WorkerAddress, WorkerDirectory
from cluster.handoff import Handoff
from cluster.model_info import ModelInfo
from embedding_worker.worker import EmbeddingWorker
from language_worker.worker import LanguageWorker
from transfer.endpoints.endpoint import Endpoint, open_endpoint
from transfer.service.service import Service


class LocalWorkers:
    """Starts on construction (typed errors of the model and the configuration); `close` ends every thread."""

    def __init__(self, config: ClusterConfig) -> None:
        name = uuid.uuid4().hex
        self.info = ModelInfo.load(config.model.path, config.model.config_overrides)
        with ExitStack() as stack:
            workers = []
            self.engines: dict[str, LanguageWorker] = {}
            for kind in config.workers.counts:
                if kind == "embedding":
                    continue
                endpoint = self._open(stack, f"{name}-{kind}", config)
                engine = LanguageWorker(config.model.path, config.language, config.transfer, endpoint, kind)
                stack.callback(engine.close)
                engine.start()
                self.engines[f"{kind}-0"] = engine
                workers.append(WorkerAddress(name=f"{kind}-0", kind=kind, address=engine.address))
            self.embedding: EmbeddingWorker | None = None
            if self.info.has_vision:
                embedding = self._open(stack, f"{name}-embedding", config)
                self.embedding = EmbeddingWorker(config.model.path, config.embedding, config.transfer, embedding)
                stack.callback(self.embedding.close)
                self.embedding.start()
                workers.append(WorkerAddress(name="embedding-0", kind="embedding", address=self.embedding.address))
            self._service = Service(self._open(stack, f"{name}-front", config), config.transfer)
            stack.callback(self._service.close)
            self._service.start()
            directory = WorkerDirectory(self._service)
            directory.replace(workers)
            self.handoff = Handoff(self._service, directory)
            self._stack = stack.pop_all()

    @staticmethod
    def _open(stack: ExitStack, name: str, config: ClusterConfig) -> Endpoint:
        """An in-memory endpoint that closes with `stack`, also when the worker behind it cannot be made."""
        endpoint = open_endpoint(f"inproc://{name}", config.transfer)
        stack.callback(endpoint.close)
        return endpoint

    def stats(self) -> dict[str, dict[str, object]]:
        """Gauges and counters of each worker."""
        stats = {name: engine.stats() for name, engine in self.engines.items()}
        if self.embedding is not None:
            stats["embedding-0"] = self.embedding.stats()
        return stats

    def close(self) -> None:
        """Fail what is running and stop everything; closing twice does nothing."""
        self._stack.close()
