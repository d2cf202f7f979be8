"""What the gateway is given: its configuration, the model's tokenizer and template, and the way to the workers.

Everything is injected, so that the same application serves a Ray cluster, one process, or a test's fake. The protocols
here are the slices of other parts that the gateway uses; it knows nothing else of them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.chat import ChatTemplate
from cluster.config import GatewayConfig
from cluster.metrics import GatewayMetrics
from cluster.served import RunningRequest, ServedRequest, Sink

WorkerStats = Mapping[str, Mapping[str, Any] | None]


class TokenizerLike(Protocol):
    """The slice of `language_worker.tokenizer.Tokenizer` that the gateway needs."""

    vocab_size: int  # every id of a prompt is below it

    def encode(self, text: str, allow_special: bool = ..., *, add_special_tokens: bool = ...) -> list[int]:
        """Token ids of a text."""

    def encode_prompt(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        """Token ids of a rendered prompt in (text, trusted) pieces."""

    def min_tokens(self, text: str) -> int:
        """At least so many ids come of a text."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ...) -> str:
        """Text of token ids."""

    def token_text(self, token_id: int) -> str:
        """One token shown by itself."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for."""


class HandoffLike(Protocol):
    """Takes a request to the workers; never blocks."""

    def submit(self, request: ServedRequest, sink: Sink) -> RunningRequest:
        """Start the request; its outcome arrives at `sink` from other threads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayContext:
    """Everything a gateway is made of.

    model_name: the one name this gateway serves. chat_template: None for models without one (chat is refused).
    image_token_id: the id that stands for one image in a prompt; None for models without vision. worker_stats: the
    stats of every known worker by name, None for one that did not answer. ready: (is it ready, why not).
    """

    config: GatewayConfig
    model_name: str
    tokenizer: TokenizerLike
    chat_template: ChatTemplate | None
    handoff: HandoffLike
    max_model_len: int
    worker_stats: Callable[[], Awaitable[WorkerStats]]
    ready: Callable[[], tuple[bool, str]]
    image_token_id: int | None = None
    metrics: GatewayMetrics = field(default_factory=GatewayMetrics)
