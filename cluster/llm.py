"""LLM: a model in a script. Both halves composed in one process; prompts in, answers out.

with LLM(model="path/to/checkpoint") as llm:
    print(llm.generate("Hello", SamplingParams(max_tokens=8))[0].outputs[0].text)
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from cluster.config import ClusterConfig, build_config, flat_overrides
from cluster.local import LocalWorkers
from cluster.outputs import OutputBuilder, RequestOutput, per_prompt, sampling_of
from cluster.progress import progress_bar
from cluster.prompts import batch_of, is_conversation, is_single_prompt, request_from_messages, request_from_prompt
from cluster.remote_errors import known_failure
from cluster.served import RequestStats, ServedRequest
from language_worker.api import TokenChunk
from language_worker.sampling_params import SamplingParams
from language_worker.tokenizer import Tokenizer

MAX_SUBMITTED = 512  # of a long list of prompts; the rest follows as answers come in

Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]
_Event = tuple[int, TokenChunk | RequestStats | Exception]


class LLM:
    """One checkpoint, loaded on construction.

    model: a Hugging Face folder. overrides: any setting by its name (dtype="float32", block_size=16, ...); one that
    both halves have is given to both; a section's name with a map sets that section (language={"num_threads": 1}).
    Raises ConfigError, ModelNotSupported or CheckpointError. Not safe to share between threads while it generates.
    """

    def __init__(self, model: str, **overrides: Any) -> None:
        tree = flat_overrides({"model": {"path": str(model)}}, overrides)
        self._load(build_config(tree).resolve())

    @classmethod
    def from_config(cls, config: ClusterConfig) -> LLM:
        """The same from a resolved configuration; what it says of workers and gateway does not matter here."""
        llm = cls.__new__(cls)
        llm._load(config)
        return llm

    def _load(self, config: ClusterConfig) -> None:
        self.config = config
        self._workers = LocalWorkers(config)
        # Also when it is collected or the script ends without closing it: no thread inside torch may outlive Python.
        self._finalizer = weakref.finalize(self, self._workers.close)
        self._info = self._workers.info

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers and free the model; closing twice does nothing."""
        self._finalizer()

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's."""
        return self._info.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_progress: bool = False,
    ) -> list[RequestOutput]:
        """Answers in the prompts' order. The first request that fails ends the call with its error: what a worker
        refuses is of that worker's error class (language_worker.errors, embedding_worker.errors).
        """
        batch: list[Prompt] = batch_of(prompts, is_single_prompt(prompts), "prompts")
        sampling = per_prompt(params, len(batch))
        requests = [request_from_prompt(self._info, p, s) for p, s in zip(batch, sampling, strict=True)]
        return self._run(requests, use_progress)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_progress: bool = False,
    ) -> list[RequestOutput]:
        """Answers to one conversation (a list of OpenAI messages) or to a list of them, in order."""
        batch: list[Messages] = batch_of(messages, is_conversation(messages), "messages")
        sampling = per_prompt(params, len(batch))
        requests = [request_from_messages(self._info, m, s) for m, s in zip(batch, sampling, strict=True)]
        return self._run(requests, use_progress)

    def stream(self, prompt: Prompt | Messages, params: SamplingParams | None = None) -> Iterator[TokenChunk]:
        """The chunks of one answer as they come. Leaving the loop early cancels the request."""
        request = self._request(prompt, sampling_of(params))
        with self._flight([request]) as flight:
            for _, event in flight.events():
                if isinstance(event, TokenChunk):
                    yield event

    def logits(self, prompt: Prompt | Messages) -> torch.Tensor:
        """float32 logits [number of prompt positions (images expanded), vocabulary] of one prompt."""
        request = self._request(prompt, SamplingParams(max_tokens=1, temperature=0.0), return_logits=True)
        with self._flight([request]) as flight:
            for _, event in flight.events():
                if isinstance(event, RequestStats):
                    return _joined_logits(event.hops["logits"])
        raise AssertionError("a request ended without an outcome")

    def stats(self) -> dict[str, dict[str, object]]:
        """Gauges and counters of each worker, the ledger among them."""
        return self._workers.stats()

    def _request(self, prompt: Any, sampling: SamplingParams, *, return_logits: bool = False) -> ServedRequest:
        build: Callable[..., ServedRequest] = request_from_messages if is_conversation(prompt) else request_from_prompt
        return build(self._info, prompt, sampling, return_logits=return_logits)

    def _flight(self, requests: Sequence[ServedRequest]) -> _Flight:
        """No more at a time than the workers let wait, so that a long list is not refused for its length."""
        config = self.config
        most = min(MAX_SUBMITTED, config.language.max_waiting, config.embedding.max_waiting_requests)
        return _Flight(self._workers, requests, most)

    def _run(self, requests: Sequence[ServedRequest], use_progress: bool) -> list[RequestOutput]:
        requests = [replace(request, is_streamed=False) for request in requests]
        builders = [OutputBuilder(request) for request in requests]
        outputs: list[RequestOutput | None] = [None] * len(requests)
        with self._flight(requests) as flight, progress_bar(len(requests), use_progress) as advance:
            for i, event in flight.events():
                if isinstance(event, TokenChunk):
                    builders[i].add(event)
                else:
                    outputs[i] = builders[i].build(event)
                    advance()
        return [output for output in outputs if output is not None]


class _Flight:
    """A list of requests under way: `most` at a time. Leaving it cancels what still runs."""

    def __init__(self, workers: LocalWorkers, requests: Sequence[ServedRequest], most: int) -> None:
        self._workers = workers
        self._most = most
        self._requests = requests
        self._queue: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._running: dict[int, Any] = {}
        self._next = 0

    def __enter__(self) -> _Flight:
        return self

    def __exit__(self, *_: object) -> None:
        for running in self._running.values():
            running.cancel()
        while self._running:  # every sink has then heard its end; the workers free what was cancelled within a step
            i, event = self._queue.get()
            if not isinstance(event, TokenChunk):
                del self._running[i]

    def events(self) -> Iterator[tuple[int, TokenChunk | RequestStats]]:
        """(request's index, chunk or end), until all have ended. Raises the first error."""
        self._submit()
        while self._running:
            i, event = self._queue.get()
            if not isinstance(event, TokenChunk):
                del self._running[i]
                self._submit()
            if isinstance(event, Exception):
                raise known_failure(event)
            yield i, event

    def _submit(self) -> None:
        while self._next < len(self._requests) and len(self._running) < self._most:
            i, self._next = self._next, self._next + 1
            self._running[i] = self._workers.handoff.submit(self._requests[i], _QueueSink(self._queue, i))


class _QueueSink:
    """Sink of one request."""

    __slots__ = ("_index", "_queue")

    def __init__(self, events: queue.SimpleQueue[_Event], index: int) -> None:
        self._queue = events
        self._index = index

    def on_chunk(self, chunk: TokenChunk) -> None:
        self._queue.put((self._index, chunk))

    def on_end(self, stats: RequestStats) -> None:
        self._queue.put((self._index, stats))

    def on_error(self, error: Exception) -> None:
        self._queue.put((self._index, error))


def _joined_logits(parts: Sequence[tuple[Mapping[str, Any], memoryview]]) -> torch.Tensor:
    rows = [torch.frombuffer(bytearray(frame), dtype=torch.float32).view(body["logits_shape"]) for body, frame in parts]
    return torch.cat(rows)
