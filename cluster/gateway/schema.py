"""Request schemas: what clients may send, with strict types.

A parameter is one of four things: supported; harmless (accepted, without effect on the answer, `HARMLESS`); known but
not supported here, although it would change the answer (`UNSUPPORTED`: a 400 that says so, unless it holds the value
that means "off"); or unknown (a 400). Ranges of sampling parameters are checked by `SamplingParams`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from cluster.errors import UnsupportedParameter

HARMLESS = frozenset(
    {
        "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "prediction",
    }
)  # fmt: skip
UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # parameter -> values that ask for nothing (null always does)
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "suffix": ("",),
    "best_of": (1,),
    "moderation": (),
}


class Strict(BaseModel):
    """No conversions, no unknown fields, no infinities."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ImageUrl(Strict):
    """`detail` is accepted as in OpenAI's API; the resolution is the one the model was published with."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class FunctionCall(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionTool(Strict):
    """A function that the model may call. `strict` is accepted; calls are not held to the parameters' schema."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionTool


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Strict):
    """One message of a conversation. Media are for users' (and tools') messages."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None  # extension, as the answers have it
    refusal: None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _check_role(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"content is required in a {self.role} message")
        if (self.tool_calls or self.reasoning_content) and self.role != "assistant":
            raise ValueError("tool_calls and reasoning_content belong to assistant messages")
        parts = self.content if isinstance(self.content, list) else []
        if self.role not in ("user", "tool") and any(isinstance(part, ImagePart) for part in parts):
            raise ValueError(f"images are not allowed in {self.role} messages; put them into a user message")
        return self


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # extension: the usage so far in every chunk
    include_obfuscation: bool | None = None  # never added here; it would change the padding only


class Sampling(Strict):
    """The sampling parameters that chat and completions share; null stands for the default."""

    model: str
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    # extensions
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    allowed_token_ids: list[int] | None = None
    banned_token_ids: list[int] | None = None
    priority: int | None = None
    prompt_logprobs: int | None = None
    diffusion: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _sort_out(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        for name in UNSUPPORTED.keys() & fields.keys() - cls.model_fields.keys():
            value = fields[name]
            if value is not None and not any(type(value) is type(off) and value == off for off in UNSUPPORTED[name]):
                raise UnsupportedParameter(f"parameter {name!r} is not supported by this server; remove it", name)
        ignored = HARMLESS | UNSUPPORTED.keys() - cls.model_fields.keys()
        return {name: value for name, value in fields.items() if name not in ignored}

    @model_validator(mode="after")
    def _check_stream_options(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs come with the whole answer; set stream to false")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    # extensions
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _check_tool_choice(self) -> ChatRequest:
        if self.tool_choice not in (None, "none", "auto"):
            raise UnsupportedParameter(
                "tool_choice may be 'auto' or 'none'; the model is not forced to call a tool", "tool_choice"
            )
        return self

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model is told of, as plain maps."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        both = self.max_tokens, self.max_completion_tokens
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        return self


def _check_prompt(value: Any) -> Any:
    """By hand: pydantic would try four lists in turn and report on all of them."""
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list) and all(type(item) is int for item in value):
        items = [value]
    for item in items:
        is_ids = isinstance(item, list) and bool(item) and all(type(token_id) is int for token_id in item)
        if not isinstance(item, str) and not is_ids:
            raise ValueError("use a string, a list of token ids, or a list of these; none of the lists empty")
    if not items:
        raise ValueError("the list of prompts is empty")
    return value


class CompletionRequest(Sampling):
    prompt: Annotated[str | list[int] | list[str | list[int]], PlainValidator(_check_prompt)]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None and self.prompt_logprobs is not None:
            raise ValueError("echo with logprobs shows the prompt's already; leave out prompt_logprobs")
        return self

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise ValueError("best_of above n cannot be streamed: the best are known at the end; set stream to false")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt."""
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if is_one else list(prompt)


class TokenizeRequest(Strict):
    """Either a prompt, or messages as in a chat request."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: list[int]
