"""Legs: the calls of one attempt: which worker each goes to, and what it says.

    language worker:             embed ──embeddings──> generate
    prefill and decode workers:  embed ──embeddings──> prefill ──KV──> generate

The tickets of both streams are issued with the attempt and given to both their ends at the same moment.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cluster.directory import WorkerAddress
from cluster.served import ServedRequest
from language_worker.sampling_params import SamplingParams
from transfer.protocol.ticket import Ticket

TOKENS_PER_PART = 16  # of an answer that is read when it is whole


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """The workers of one attempt. language: who answers. prefill: who computes the prompt, None where that one does.
    embedding: None for a request without media."""

    language: str
    prefill: str | None = None
    embedding: str | None = None

    @property
    def legs(self) -> dict[str, str]:
        """Worker by leg; of equal failures that of the first is told."""
        workers = {"generate": self.language, "prefill": self.prefill, "embed": self.embedding}
        return {leg: worker for leg, worker in workers.items() if worker}

    @property
    def rows_leg(self) -> str:
        """Which leg takes the embeddings."""
        return "prefill" if self.prefill else "generate"


class Bodies:
    """What the calls of one attempt say. name: the attempt's."""

    def __init__(self, request: ServedRequest, name: str, media_key: str, timeout_ms: int) -> None:
        self._request = request
        self._name = name
        self._media_key = media_key
        self._timeout_ms = timeout_ms
        self._ticket = Ticket.issue(name).to_body() if request.media else None
        self._kv_ticket = Ticket.issue(name).to_body()

    def of(self, leg: str, route: Route, workers: dict[str, WorkerAddress]) -> dict[str, Any]:
        """The first call of a leg."""
        if leg == "embed":
            return self.embed(self._ticket, workers[route.rows_leg], self._timeout_ms)
        if leg == "prefill":
            return self._prefill(workers["generate"])
        if route.prefill is None:
            return self._generate(self._request.sampling, self._ticket, self._request.return_logits)
        sampling = replace(self._request.sampling, prompt_logprobs=None)  # who computes the prompt tells them
        return {**self._generate(sampling, None, False), "kv_ticket": self._kv_ticket}

    def embed(self, ticket: dict[str, Any] | None, receiver: WorkerAddress, deadline_ms: int) -> dict[str, Any]:
        return {
            "ticket": ticket,
            "receiver": _reached_at(receiver),
            "num_items": len(self._request.media),
            "deadline_ms": deadline_ms,
            "media_key": self._media_key,
        }

    def _prefill(self, decode: WorkerAddress) -> dict[str, Any]:
        asked = self._request.sampling
        sampling = SamplingParams(
            max_tokens=asked.max_tokens,  # a prompt before masks is computed with them
            temperature=0.0,
            ignore_eos=True,
            prompt_logprobs=asked.prompt_logprobs,
            diffusion=asked.diffusion,
        )
        body = self._generate(sampling, self._ticket, self._request.return_logits)
        return {**body, "kv_ticket": self._kv_ticket, "receiver": _reached_at(decode)}

    def _generate(self, sampling: SamplingParams, ticket: dict[str, Any] | None, return_logits: bool) -> dict[str, Any]:
        return {
            "request_id": self._name,
            "prompt_token_ids": list(self._request.prompt_token_ids),
            "num_media": len(self._request.media),
            "sampling": sampling.to_body(),
            "ticket": ticket,
            "return_logits": return_logits,
            "deadline_ms": self._timeout_ms,
            "tokens_per_part": 1 if self._request.is_streamed else TOKENS_PER_PART,
        }


def _reached_at(worker: WorkerAddress) -> dict[str, Any]:
    return {"address": worker.address, "public_key": worker.public_key}
