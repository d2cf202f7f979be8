"""/v1/chat/completions: messages -> prompt and images; chunks -> chat completions."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.answer_splitter import THINK, AnswerSplitter
from cluster.chat import RESERVED_NAMES, ChatTemplate
from cluster.errors import BadRequest, ChatTemplateError, TooManyImages, UnsupportedParameter
from cluster.gateway.body import validate
from cluster.gateway.chat_message import ChatMessage
from cluster.gateway.context import GatewayContext
from cluster.gateway.events import ChunkWriter
from cluster.gateway.generation import Event
from cluster.gateway.logprobs import chat_logprobs, prompt_logprobs
from cluster.gateway.media_fetch import checked_url
from cluster.gateway.messages import template_messages
from cluster.gateway.sampling import chat_sampling, check_length, check_text
from cluster.gateway.schema import ChatRequest, Message
from cluster.gateway.serving import Job
from cluster.gateway.state import GatewayState, new_id
from cluster.gateway.usage import UsageCounter
from cluster.media import is_http_url, parse_image_url
from cluster.served import RequestStats, ServedRequest
from language_worker.api import TokenLogprob

END_TOKENS = 16  # of a prompt, among which its template opens the reasoning if it does


def prepare_chat(state: GatewayState, fields: dict[str, Any]) -> Job:
    """The job of a chat request; raises a ClientError that says what is wrong with it."""
    request = validate(ChatRequest, fields)
    state.check_model(request.model)
    context = state.context
    sampling = chat_sampling(request, context.tokenizer.vocab_size)
    token_ids, urls = render_prompt(
        context,
        request.messages,
        request.add_generation_prompt,
        request.chat_template_kwargs,
        tools=request.offered_tools,
        must_fit=True,
    )
    check_length(len(token_ids), sampling.max_tokens, context.max_model_len, "messages")
    cap, rules = context.config.max_image_bytes, context.config.media_rules
    remote = {i: url for i, url in enumerate(urls) if rules.hosts and is_http_url(url)}
    for i, url in remote.items():
        checked_url(rules, url, f"image {i}")
    media = tuple(
        b"" if i in remote else parse_image_url(url, max_bytes=cap, param=f"image {i}") for i, url in enumerate(urls)
    )
    response_id = new_id("chatcmpl")
    served = ServedRequest(
        request_id=response_id,
        prompt_token_ids=tuple(token_ids),
        media=media,
        sampling=sampling,
        timeout_s=context.config.request_timeout_s,
        is_streamed=bool(request.stream),
    )
    messages = [ChatMessage(_splitter(context, request, token_ids)) for _ in range(request.n or 1)]
    answer = ChatAnswer(state, request, response_id, messages)
    return Job(requests=(served,), stream=bool(request.stream), answer=answer, remote_media=remote)


def _splitter(context: GatewayContext, request: ChatRequest, prompt: Sequence[int]) -> AnswerSplitter | None:
    """What tells an answer's parts apart; None where all of it is content."""
    template = _template(context)
    finds_calls = request.offered_tools is not None
    if not template.has_reasoning and not finds_calls:
        return None
    end = context.tokenizer.decode(prompt[-END_TOKENS:], skip_special_tokens=False)
    return AnswerSplitter(
        splits_reasoning=template.has_reasoning,
        in_reasoning=template.has_reasoning and end.rstrip().endswith(THINK),
        finds_calls=finds_calls,
    )


def render_prompt(
    context: GatewayContext,
    messages: Sequence[Message],
    add_generation_prompt: bool | None,
    template_kwargs: Mapping[str, Any] | None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    must_fit: bool = False,
) -> tuple[list[int], list[str]]:
    """(prompt token ids with one placeholder per image, image URLs in prompt order).

    tools: what the model may call. must_fit: refuse a prompt that is plainly too long before it is tokenized.
    """
    template = _template(context)
    shaped = template_messages(messages)
    num_images = sum(
        part["type"] == "image_url" for m in shaped if isinstance(m["content"], list) for part in m["content"]
    )
    limit = context.config.max_images_per_request
    if num_images > limit:
        raise TooManyImages(f"the request has {num_images} images; at most {limit} are allowed", "messages")
    if num_images and context.image_token_id is None:
        raise BadRequest("this model takes no images; send text only", "messages")
    if tools and not template.takes_tools:
        raise UnsupportedParameter("this model's chat template tells it of no tools; leave out `tools`", "tools")
    _check_text_size(shaped, context.config.max_prompt_chars, tools)
    pieces, urls = template.render(
        shaped,
        add_generation_prompt=add_generation_prompt is not False,
        tools=tools,
        **_checked_kwargs(template_kwargs),
    )
    if must_fit:  # judged on the rendered text: a template may leave out what it was given
        check_text(context, "".join(text for text, _ in pieces), "messages")
    token_ids = context.tokenizer.encode_prompt(pieces)
    if not token_ids:
        raise BadRequest("the messages render to an empty prompt", "messages")
    num_placeholders = token_ids.count(context.image_token_id) if context.image_token_id is not None else 0
    if num_placeholders != len(urls):
        raise ChatTemplateError(
            f"the model's chat template placed {num_placeholders} of the request's {len(urls)} images", "messages"
        )
    return token_ids, urls


def _template(context: GatewayContext) -> ChatTemplate:
    if context.chat_template is None:
        raise ChatTemplateError("this model has no chat template; use /v1/completions", "messages")
    return context.chat_template


def _check_text_size(
    messages: Sequence[Mapping[str, Any]], limit: int, tools: Sequence[Mapping[str, Any]] | None
) -> None:
    num_chars = len(json.dumps(tools)) if tools else 0
    for message in messages:
        content = message["content"]
        parts = [part.get("text", "") for part in content] if isinstance(content, list) else [content or ""]
        num_chars += sum(map(len, parts)) + len(message.get("reasoning_content") or "")
    if num_chars > limit:
        raise BadRequest(f"the messages have {num_chars} characters; at most {limit} are allowed", "messages")


def _checked_kwargs(template_kwargs: Mapping[str, Any] | None) -> Mapping[str, Any]:
    for name in template_kwargs or {}:
        if name in RESERVED_NAMES:
            raise BadRequest(f"chat_template_kwargs may not set {name!r}", "chat_template_kwargs")
        if not name.isidentifier() or name.startswith("_"):
            raise BadRequest(
                f"chat_template_kwargs has the name {name[:80]!r}; use identifiers", "chat_template_kwargs"
            )
    return template_kwargs or {}


class ChatAnswer:
    """The chunks of one chat request in OpenAI's shape. Index i is sample i."""

    def __init__(
        self, state: GatewayState, request: ChatRequest, response_id: str, messages: Sequence[ChatMessage]
    ) -> None:
        self._tokenizer = state.context.tokenizer
        self._with_logprobs = bool(request.logprobs)
        self._include_usage = request.include_usage
        self._head = {
            "id": response_id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": request.model,
        }
        self._fingerprint = state.fingerprint
        self._writer = ChunkWriter(
            response_id=response_id,
            kind="chat.completion.chunk",
            created=int(time.time()),
            model=request.model,
            fingerprint=state.fingerprint,
            usage=self._include_usage,
        )
        self._roles: set[int] = set()
        self._usage = UsageCounter()
        self._continuous_usage = request.continuous_usage
        self._prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self._messages = messages
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(request.n or 1)]
        self._ends: list[tuple[str, str | int | None]] = [("length", None)] * (request.n or 1)

    def write(self, events: list[Event]) -> str:
        return "".join(part for event in events for part in self._write_one(event))

    def _write_one(self, event: Event) -> list[str]:
        chunk, writer, parts = event.chunk, self._writer, []
        self._usage.note(event)
        if self._continuous_usage:
            writer.set_usage(self._usage.now())
        if chunk.index not in self._roles:
            self._roles.add(chunk.index)
            parts.append(writer.role(chunk.index))
        message = self._messages[chunk.index]
        deltas = message.add(chunk.text, is_last=chunk.finish_reason is not None)
        logprobs = chat_logprobs(chunk.logprobs or (), self._tokenizer) if self._with_logprobs else None
        if logprobs is not None and chunk.logprobs and not deltas:
            deltas = [{"content": ""}]
        for delta in deltas:
            if delta.keys() == {"content"}:
                parts.append(writer.delta(chunk.index, delta["content"], logprobs))
            else:
                parts.append(writer.part(chunk.index, delta, logprobs))
            logprobs = None  # all of a chunk's come with its first delta
        if chunk.finish_reason is not None:
            reason = message.finish_reason(chunk.finish_reason)
            parts.append(writer.finish(chunk.index, reason, chunk.stop_reason))
        return parts

    def write_usage(self, stats: dict[int, RequestStats]) -> str:
        return self._writer.usage(self._usage.final(stats)) if self._include_usage else ""

    def add(self, events: list[Event]) -> None:
        for event in events:
            chunk = event.chunk
            self._usage.note(event)
            if chunk.prompt_logprobs is not None:
                self._prompt_logprobs = chunk.prompt_logprobs
            self._messages[chunk.index].add(chunk.text, is_last=chunk.finish_reason is not None)
            self._logprobs[chunk.index].extend(chunk.logprobs or ())
            if chunk.finish_reason is not None:
                self._ends[chunk.index] = chunk.finish_reason, chunk.stop_reason

    def body(self, stats: dict[int, RequestStats]) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": message.message(),
                "logprobs": chat_logprobs(self._logprobs[i], self._tokenizer) if self._with_logprobs else None,
                "finish_reason": message.finish_reason(self._ends[i][0]),
                "stop_reason": self._ends[i][1],
            }
            for i, message in enumerate(self._messages)
        ]
        body = {**self._head, "choices": choices, "usage": self._usage.final(stats)}
        if self._prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(self._prompt_logprobs, self._tokenizer)
        return {**body, "system_fingerprint": self._fingerprint}
