"""Request fields -> `SamplingParams`, and the checks that need the model: token ids and the context's length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cluster.errors import BadRequest, ContextLengthExceeded
from cluster.gateway.context import GatewayContext
from cluster.gateway.schema import ChatRequest, CompletionRequest, Sampling
from language_worker.diffusion_params import DiffusionParams
from language_worker.errors import InvalidRequest
from language_worker.sampling_params import MAX_PRIORITY, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI's completions
_SAME_NAME = (
    "n", "best_of", "seed", "temperature", "top_p", "presence_penalty", "frequency_penalty", "stop",
    "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "allowed_token_ids",
    "banned_token_ids", "priority",
)  # fmt: skip
_FIELD = re.compile(r"\A[a-z_]+")


def chat_sampling(request: ChatRequest, vocab_size: int) -> SamplingParams:
    """Raises BadRequest naming the field that is out of range."""
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    names = {"max_tokens": "max_tokens" if request.max_tokens is not None else "max_completion_tokens"}
    return _build(
        request,
        vocab_size,
        {**names, "logprobs": "top_logprobs"},
        max_tokens=limit,
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
    )


def completion_sampling(request: CompletionRequest, vocab_size: int) -> SamplingParams:
    """Raises BadRequest naming the field that is out of range."""
    limit = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    of_echo = request.logprobs if request.echo else None
    prompt_logprobs = request.prompt_logprobs if of_echo is None else of_echo
    return _build(
        request,
        vocab_size,
        {} if of_echo is None else {"prompt_logprobs": "logprobs"},
        max_tokens=limit,
        logprobs=request.logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _build(request: Sampling, vocab_size: int, names: dict[str, str], **given: Any) -> SamplingParams:
    values = {name: value for name in _SAME_NAME if (value := getattr(request, name, None)) is not None}
    values["logit_bias"] = _logit_bias(request.logit_bias or {}, vocab_size)
    if values.get("priority", 0) < 0:
        raise BadRequest(
            f"priority is {request.priority}; use 0 to {MAX_PRIORITY}: a client may stand back, not push ahead",
            "priority",
        )
    for name in ("stop_token_ids", "allowed_token_ids", "banned_token_ids"):
        check_token_ids(getattr(request, name) or (), vocab_size, name)
    try:
        if request.diffusion is not None:
            values["diffusion"] = _diffusion(request.diffusion)
        return SamplingParams(**values, **given)
    except InvalidRequest as error:
        text = error.message
        match = _FIELD.match(text)
        field = match.group() if match else ""
        shown = names.get(field, field)
        raise BadRequest(shown + text[len(field) :], shown or None) from None


def _diffusion(fields: dict[str, Any]) -> DiffusionParams:
    params = DiffusionParams.from_body(fields)
    if params.show_steps:
        raise InvalidRequest("diffusion.show_steps is for scripts (LLM.stream); a stream sends finished blocks")
    return params


def _logit_bias(entries: dict[str, float], vocab_size: int) -> dict[int, float]:
    result: dict[int, float] = {}
    for key, bias in entries.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 12 and int(key) < vocab_size):
            raise BadRequest(
                f"logit_bias has the key {key[:40]!r}; use token ids from 0 to {vocab_size - 1}", "logit_bias"
            )
        result[int(key)] = bias
    return result


def check_length(num_prompt_tokens: int, max_tokens: int | None, max_model_len: int, param: str) -> None:
    """Raises ContextLengthExceeded if the prompt (media counted as one token each) and the answer do not fit."""
    if num_prompt_tokens + (max_tokens or 1) <= max_model_len:
        return
    asked = f" and {max_tokens} are requested as output" if max_tokens is not None else ""
    raise ContextLengthExceeded(
        f"this model's context is {max_model_len} tokens; the prompt has {num_prompt_tokens}{asked}; shorten it",
        param,
    )


def check_text(context: GatewayContext, text: str, param: str) -> None:
    """Raises ContextLengthExceeded for a text that cannot fit however it is tokenized: that alone can take seconds."""
    least = context.tokenizer.min_tokens(text)
    if least >= context.max_model_len:
        raise ContextLengthExceeded(
            f"this model's context is {context.max_model_len} tokens; the prompt's {len(text)} characters are at least "
            f"{least} tokens; shorten it",
            param,
        )


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raises BadRequest for an id that is not in the vocabulary."""
    wrong = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
    if wrong is not None:
        shown = wrong if abs(wrong) < 10**18 else "a huge number"
        raise BadRequest(f"{param} holds the token id {shown}; use ids from 0 to {vocab_size - 1}", param)
