"""What `LLM` returns. Plain values; gathers the chunks of one request into them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.errors import BadRequest
from cluster.served import RequestStats, ServedRequest
from language_worker.api import TokenChunk, TokenLogprob
from language_worker.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionOutput:
    """One sample. logprobs: one entry per token id, None unless asked for. mask: one entry per token id, 1 if the model
    chose it and 0 if a tool wrote it."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None
    mask: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """One prompt's answer. prompt_token_ids: as handed to the workers, with one placeholder id per image.

    num_prompt_tokens: after the images' placeholders were expanded. hops: figures of each hop of the request's path.
    """

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_prompt_tokens: int
    prompt_logprobs: list[TokenLogprob | None] | None = None
    hops: dict[str, Any] = field(default_factory=dict)


class OutputBuilder:
    """Gathers one request's chunks."""

    def __init__(self, request: ServedRequest) -> None:
        self._request = request
        self._samples = [_Sample() for _ in range(request.sampling.n)]
        self._prompt_logprobs: list[TokenLogprob | None] | None = None

    def add(self, chunk: TokenChunk) -> None:
        sample = self._samples[chunk.index]
        sample.texts.append(chunk.text)
        sample.token_ids.extend(chunk.token_ids)
        sample.mask.extend(chunk.mask or (1,) * len(chunk.token_ids))
        sample.logprobs.extend(chunk.logprobs or ())
        if chunk.finish_reason is not None:
            sample.finish_reason, sample.stop_reason = chunk.finish_reason, chunk.stop_reason
        if chunk.prompt_logprobs is not None:
            self._prompt_logprobs = list(chunk.prompt_logprobs)

    def build(self, stats: RequestStats) -> RequestOutput:
        """The whole answer, once the request has ended."""
        with_logprobs = self._request.sampling.logprobs is not None
        return RequestOutput(
            request_id=self._request.request_id,
            prompt_token_ids=list(self._request.prompt_token_ids),
            outputs=[sample.build(i, with_logprobs) for i, sample in enumerate(self._samples)],
            num_prompt_tokens=stats.num_prompt_tokens,
            prompt_logprobs=self._prompt_logprobs,
            hops={name: value for name, value in stats.hops.items() if name != "logits"},
        )


class _Sample:
    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.mask: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    def build(self, index: int, with_logprobs: bool) -> CompletionOutput:
        return CompletionOutput(
            index=index,
            text="".join(self.texts),
            token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=self.logprobs if with_logprobs else None,
            mask=self.mask,
        )


def per_prompt(params: Any, num_prompts: int) -> list[SamplingParams]:
    """`params` for each prompt: one for all, or one each, or None for the defaults. Raises ValueError when the counts
    differ, BadRequest for anything else."""
    if not isinstance(params, (list, tuple)):
        return [sampling_of(params)] * num_prompts
    if len(params) != num_prompts:
        raise ValueError(
            f"{len(params)} sampling parameters were given for {num_prompts} prompts; give one, or one each"
        )
    return [sampling_of(one) for one in params]


def sampling_of(params: Any) -> SamplingParams:
    """`params`, or the defaults for None. Raises BadRequest for anything else."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise BadRequest(f"`params` is {type(params).__name__}; use SamplingParams(max_tokens=...)", "params")
    return params
