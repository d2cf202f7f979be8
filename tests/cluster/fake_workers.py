"""Workers made of nothing but a service: a test takes each call they got and answers it as it likes."""

from __future__ import annotations

import itertools
import queue
import threading
from collections import defaultdict
from types import TracebackType
from typing import Any, ClassVar

from cluster.directory import WorkerAddress
from cluster.router import WorkerKind
from language_worker.api import TokenChunk
from transfer.config import TransferConfig
from transfer.endpoints.endpoint import open_endpoint
from transfer.service.calls import IncomingCall
from transfer.service.service import Service

WAIT_S = 120.0
PATIENT = TransferConfig(peer_timeout_s=600.0)  # nobody is lost because a machine is slow
METHODS = ("generate", "prefill", "embed", "reissue")


class Names:
    """Names that no other endpoint of this process has."""

    _numbers: ClassVar[itertools.count[int]] = itertools.count()

    @classmethod
    def fresh(cls, prefix: str) -> str:
        return f"{prefix}-{next(cls._numbers):04}"


class FakeWorker:
    """Takes the calls of any kind of worker on an in-memory endpoint; `take` hands those of a method over in order."""

    def __init__(self, kind: WorkerKind, name: str | None = None) -> None:
        self.name = name or Names.fresh(kind)
        address = f"inproc://{Names.fresh(self.name)}"
        self.service = Service(open_endpoint(address), PATIENT)
        self.entry = WorkerAddress(name=self.name, kind=kind, address=address)
        self._calls: dict[str, queue.SimpleQueue[IncomingCall]] = {method: queue.SimpleQueue() for method in METHODS}
        self._cancelled: dict[IncomingCall, threading.Event] = defaultdict(threading.Event)
        for method in METHODS:
            self.service.register(method, self._on_call)
        self.service.start()

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gone without a word to its callers: its calls are not answered any more."""
        self.service.close()

    def take(self, method: str) -> IncomingCall:
        """The next call of `method`, once it has come."""
        return self._calls[method].get(timeout=WAIT_S)

    def has_calls(self) -> bool:
        """Whether a call waits to be taken."""
        return any(not calls.empty() for calls in self._calls.values())

    def was_cancelled(self, call: IncomingCall, within_s: float = WAIT_S) -> bool:
        """Wait until the caller has cancelled this call."""
        return self._cancelled[call].wait(within_s)

    def _on_call(self, call: IncomingCall) -> None:
        call.on_cancel(self._cancelled[call].set)
        self._calls[call.method].put(call)


def send_tokens(call: IncomingCall, *token_ids: int, finish_reason: str | None = None, index: int = 0) -> None:
    """One part of an answer, as a language worker sends it."""
    chunk = TokenChunk(
        request_id=call.body["request_id"],
        index=index,
        token_ids=token_ids,
        text="".join(f"<{token}>" for token in token_ids),
        finish_reason=finish_reason,  # type: ignore[arg-type]
    )
    call.reply({**chunk.to_body(), "num_prompt_tokens": 11})


def end_generate(call: IncomingCall, num_generated_tokens: int = 1) -> None:
    """The end of an answer, as a language worker sends it."""
    body: dict[str, Any] = {
        "num_prompt_tokens": 11,
        "num_generated_tokens": num_generated_tokens,
        "ttft_ms": 1.0,
        "total_ms": 2.0,
        "num_preemptions": 0,
        "grant_rounds": 1,
    }
    call.end(body)
