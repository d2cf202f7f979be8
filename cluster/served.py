"""What the front (HTTP, scripts) and the handoff say to each other: a request, its outcome, where the outcome goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from language_worker.api import TokenChunk
from language_worker.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedRequest:
    """A request as the workers need it. prompt_token_ids: one placeholder id per media item. media: encoded images in
    prompt order. timeout_s: time from now until the answer must be complete. is_streamed: somebody reads each token as
    it comes; otherwise tokens may come several at a time.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    media: tuple[bytes, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    return_logits: bool = False
    timeout_s: float = 600.0
    is_streamed: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestStats:
    """What a finished request did. hops: figures of each hop (encode_ms, blocks, bytes, grant_rounds, ttft_ms, ...)."""

    num_prompt_tokens: int
    num_generated_tokens: int
    hops: dict[str, Any] = field(default_factory=dict)


class Sink(Protocol):
    """Where a request's outcome goes. Called on an I/O thread: must not block. `on_end` or `on_error` comes last."""

    def on_chunk(self, chunk: TokenChunk) -> None:
        """New tokens of one sample."""

    def on_end(self, stats: RequestStats) -> None:
        """All samples have ended."""

    def on_error(self, error: Exception) -> None:
        """The request failed; nothing of it runs any more."""


class RunningRequest(Protocol):
    """A submitted request."""

    def cancel(self) -> None:
        """Stop it; the sink hears RemoteFailure("Cancelled", ...) unless it has ended. From any thread, repeatedly."""
