"""/v1/completions: raw prompts -> text completions.

A prompt is the whole prompt and its author's own: special-token literals in a string are recognised, as they could be
sent as ids anyway. An image's placeholder is refused, since no image can come with it.
"""

from __future__ import annotations

import time
from typing import Any

from cluster.errors import BadRequest
from cluster.gateway.body import validate
from cluster.gateway.context import GatewayContext
from cluster.gateway.events import ChunkWriter
from cluster.gateway.generation import Event
from cluster.gateway.logprobs import completion_logprobs, prompt_logprobs
from cluster.gateway.sampling import check_length, check_text, check_token_ids, completion_sampling
from cluster.gateway.schema import CompletionRequest
from cluster.gateway.serving import Job
from cluster.gateway.state import GatewayState, new_id
from cluster.gateway.usage import UsageCounter
from cluster.served import RequestStats, ServedRequest
from language_worker.api import TokenChunk, TokenLogprob

MAX_PROMPTS = 128


def prepare_completion(state: GatewayState, fields: dict[str, Any]) -> Job:
    """The job of a completion request; raises a ClientError that says what is wrong with it."""
    request = validate(CompletionRequest, fields)
    state.check_model(request.model)
    context = state.context
    if len(request.prompts) > MAX_PROMPTS:
        raise BadRequest(f"the request has {len(request.prompts)} prompts; at most {MAX_PROMPTS} are allowed", "prompt")
    sampling = completion_sampling(request, context.tokenizer.vocab_size)
    prompts = [_token_ids(context, prompt) for prompt in request.prompts]
    for token_ids in prompts:
        check_length(len(token_ids), sampling.max_tokens, context.max_model_len, "prompt")
    response_id = new_id("cmpl")
    served = tuple(
        ServedRequest(
            request_id=f"{response_id}-{i}",
            prompt_token_ids=token_ids,
            media=(),
            sampling=sampling,
            timeout_s=context.config.request_timeout_s,
            is_streamed=bool(request.stream),
        )
        for i, token_ids in enumerate(prompts)
    )
    answer = CompletionAnswer(state, request, response_id, prompts)
    return Job(requests=served, stream=bool(request.stream), answer=answer)


def _token_ids(context: GatewayContext, prompt: str | list[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        limit = context.config.max_prompt_chars
        if len(prompt) > limit:
            raise BadRequest(f"the prompt has {len(prompt)} characters; at most {limit} are allowed", "prompt")
        check_text(context, prompt, "prompt")
        token_ids = context.tokenizer.encode(prompt, True, add_special_tokens=True)
    else:
        check_token_ids(prompt, context.tokenizer.vocab_size, "prompt")
        token_ids = prompt
    if not token_ids:
        raise BadRequest("the prompt is empty; send at least one token", "prompt")
    if context.image_token_id is not None and context.image_token_id in token_ids:
        raise BadRequest("the prompt holds an image's placeholder; send images to /v1/chat/completions", "prompt")
    return tuple(token_ids)


class CompletionAnswer:
    """The chunks of one completion request in OpenAI's shape. Index = prompt * n + sample."""

    def __init__(
        self, state: GatewayState, request: CompletionRequest, response_id: str, prompts: list[tuple[int, ...]]
    ) -> None:
        self._tokenizer = state.context.tokenizer
        self._prompts = prompts
        self._n = request.n or 1
        self._with_logprobs = request.logprobs is not None
        self._echo = bool(request.echo)
        self._with_prompt_logprobs = request.prompt_logprobs is not None
        self._include_usage = request.include_usage
        created = int(time.time())
        self._head = {"id": response_id, "object": "text_completion", "created": created, "model": request.model}
        self._fingerprint = state.fingerprint
        self._writer = ChunkWriter(
            response_id=response_id,
            kind="text_completion",
            created=created,
            model=request.model,
            fingerprint=state.fingerprint,
            usage=self._include_usage,
        )
        self._given = request.prompts
        self._prompt_logprobs: dict[int, tuple[TokenLogprob | None, ...]] = {}
        self._usage = UsageCounter()
        self._continuous_usage = request.continuous_usage
        self._chunks: list[list[TokenChunk]] = [[] for _ in range(len(prompts) * self._n)]
        self._offsets: dict[int, int] = {}
        self._held: dict[int, list[Event]] = {}

    def write(self, events: list[Event]) -> str:
        return "".join(map(self._write_one, self._in_order(events)))

    def _in_order(self, events: list[Event]) -> list[Event]:
        """The events, but where the prompt is echoed with log-probabilities: these come with sample 0 and its
        siblings wait for them."""
        ready: list[Event] = []
        for event in events:
            self._note(event)
            if self._echo and self._with_logprobs and event.prompt not in self._prompt_logprobs:
                self._held.setdefault(event.prompt, []).append(event)
            else:
                ready += [*self._held.pop(event.prompt, ()), event]
        return ready

    def _note(self, event: Event) -> None:
        if event.chunk.prompt_logprobs is not None:
            self._prompt_logprobs[event.prompt] = event.chunk.prompt_logprobs

    def _write_one(self, event: Event) -> str:
        chunk, index = event.chunk, event.prompt * self._n + event.chunk.index
        self._usage.note(event)
        is_first = index not in self._offsets
        text, logprobs = self._shown(event.prompt, index, [chunk], with_prompt=is_first and self._echo)
        if not text and chunk.finish_reason is None and not logprobs:
            return ""
        if self._continuous_usage:
            self._writer.set_usage(self._usage.now())
        return self._writer.text(index, text, logprobs, chunk.finish_reason, chunk.stop_reason)

    def _shown(
        self, prompt: int, index: int, chunks: list[TokenChunk], *, with_prompt: bool
    ) -> tuple[str, dict[str, Any] | None]:
        """(text, log-probabilities) of chunks that follow what was shown of this choice before."""
        text = "".join(chunk.text for chunk in chunks)
        entries: list[tuple[int, TokenLogprob | None]] = []
        if with_prompt:
            text = self._prompt_text(prompt) + text
            known = self._prompt_logprobs.get(prompt, ())
            ids = self._prompts[prompt]
            entries += [(token_id, known[i] if i < len(known) else None) for i, token_id in enumerate(ids)]
        entries += [(entry.token_id, entry) for chunk in chunks for entry in chunk.logprobs or ()]
        offset = self._offsets.setdefault(index, 0)
        if not self._with_logprobs:
            return text, None
        logprobs, self._offsets[index] = completion_logprobs(entries, self._tokenizer, offset)
        return text, logprobs if entries else None

    def _prompt_text(self, prompt: int) -> str:
        given = self._given[prompt]
        return given if isinstance(given, str) else self._tokenizer.decode(given, skip_special_tokens=False)

    def write_usage(self, stats: dict[int, RequestStats]) -> str:
        late = [event for events in self._held.values() for event in events]  # whose prompt's never came
        usage = self._writer.usage(self._usage.final(stats)) if self._include_usage else ""
        return "".join(map(self._write_one, late)) + usage

    def add(self, events: list[Event]) -> None:
        for event in events:
            self._note(event)
            self._usage.note(event)
            self._chunks[event.prompt * self._n + event.chunk.index].append(event.chunk)

    def body(self, stats: dict[int, RequestStats]) -> dict[str, Any]:
        choices = []
        for index, chunks in enumerate(self._chunks):
            text, logprobs = self._shown(index // self._n, index, chunks, with_prompt=self._echo)
            end = next((chunk for chunk in chunks if chunk.finish_reason is not None), chunks[-1])
            known = self._prompt_logprobs.get(index // self._n, ()) if self._with_prompt_logprobs else ()
            extra = {"prompt_logprobs": prompt_logprobs(known, self._tokenizer)} if known else {}
            choices.append(
                {
                    "index": index,
                    "text": text,
                    "logprobs": logprobs,
                    "finish_reason": end.finish_reason,
                    "stop_reason": end.stop_reason,
                    **extra,
                }
            )
        usage = self._usage.final(stats)
        return {**self._head, "choices": choices, "usage": usage, "system_fingerprint": self._fingerprint}
