"""What a step hands out, and the collector behind whole-prompt logits and prompt log-probabilities.

Outputs of one request come in this order: MediaAdmitted, PromptLogits, TokenChunk ..., then exactly one of RequestDone
and RequestFailed. MediaAdmitted comes once more, wherever it falls, each time that the media were sent anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from language_worker.api import RequestDone, RequestFailed, TokenChunk, TokenLogprob
from language_worker.sampler import token_logprobs


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaAdmitted:
    """The input buffer of the request's media is reserved: its rows may come. num_restarts: how often the media were
    forgotten before.
    """

    request_id: str
    num_rows: int
    num_restarts: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptLogits:
    """Logits of every prompt position, [num_prompt_tokens, vocab] float32 on the CPU."""

    request_id: str
    logits: torch.Tensor


Output = MediaAdmitted | PromptLogits | TokenChunk | RequestDone | RequestFailed


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """Outputs of one engine step; `did_run`: the model ran, pages moved or something came out (a request that fails on
    admission leaves its room to the next): another step may be due at once. Without it, none is before a wake."""

    outputs: tuple[Output, ...]
    did_run: bool


class PromptCollector:
    """Gathers per-position logits of one prompt across chunks; recomputed chunks are ignored."""

    __slots__ = ("_next", "_num_top", "_prompt", "logits", "logprobs")

    def __init__(self, prompt: Sequence[int], *, vocab_size: int, keep_logits: bool, num_top: int | None) -> None:
        self._prompt = prompt
        self._num_top = num_top
        self._next = 0
        self.logits = torch.empty((len(prompt), vocab_size), dtype=torch.float32) if keep_logits else None
        self.logprobs: list[TokenLogprob | None] | None = None if num_top is None else [None]

    def add(self, start: int, logits: torch.Tensor) -> bool:
        """Logits [n, vocab] of prompt positions start..start+n-1, start at or before the next one needed.

        True when this completed the prompt.
        """
        fresh = logits[self._next - start :]
        if not fresh.shape[0]:
            return False
        if self.logits is not None:
            self.logits[self._next : self._next + fresh.shape[0]].copy_(fresh)
        if self.logprobs is not None and self._num_top is not None:
            following = self._prompt[self._next + 1 : self._next + 1 + fresh.shape[0]]
            self.logprobs += token_logprobs(fresh, following, self._num_top)
        self._next += fresh.shape[0]
        return self._next == len(self._prompt)
