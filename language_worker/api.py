"""What crosses the engine's border: a request in, chunks and ends out.

Plain frozen values with strict checks; `to_body`/`from_body` turn them into maps of ints, floats and strings for
the wire. Refuses to know tensors, pages and transport.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from language_worker.errors import EngineError, InvalidRequest
from language_worker.field_checks import MAX_INT, check_int, require_map, shown
from language_worker.sampling_params import SamplingParams

MAX_TOKENS_PER_PART = 1024
MAX_DEADLINE_MS = 10**12  # 31 years; threads cannot wait for more than 292

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateRequest:
    """One prompt for the engine.

    prompt_token_ids: with one placeholder id per media item, not expanded. num_media: items that an embedding
    stream will announce. return_logits: also return float32 logits of every prompt position.
    deadline_ms: remaining time at submission; None for no deadline. tokens_per_part: how many tokens of a sample may
    wait for one another before they leave, after its first ones.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    num_media: int = 0
    sampling: SamplingParams = field(default_factory=SamplingParams)
    return_logits: bool = False
    deadline_ms: int | None = None
    tokens_per_part: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.request_id, str) or not 1 <= len(self.request_id) <= 256:
            raise InvalidRequest(f"request_id is {self.request_id!r}; use a string of 1 to 256 characters")
        if not isinstance(self.prompt_token_ids, tuple) or not self.prompt_token_ids:
            raise InvalidRequest("prompt_token_ids must hold at least one token id")
        for token_id in self.prompt_token_ids:
            if type(token_id) is not int or not 0 <= token_id <= MAX_INT:
                raise InvalidRequest(f"prompt_token_ids holds {shown(token_id)}; use integers from 0 to {MAX_INT}")
        check_int("num_media", self.num_media, 0, MAX_INT)
        check_int("deadline_ms", self.deadline_ms, 0, MAX_DEADLINE_MS, optional=True)
        check_int("tokens_per_part", self.tokens_per_part, 1, MAX_TOKENS_PER_PART)
        if type(self.return_logits) is not bool:
            raise InvalidRequest(f"return_logits is {self.return_logits!r}; use true or false")

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> "GenerateRequest":
        """Build from the map of a "generate" or "prefill" call (its tickets and receiver are the worker's business);
        strict."""
        values = dict(require_map("generate", body))
        for name in ("ticket", "kv_ticket", "receiver"):
            values.pop(name, None)
        unknown = values.keys() - {f.name for f in fields(cls)}
        missing = {"request_id", "prompt_token_ids"} - values.keys()
        if unknown or missing:
            raise InvalidRequest(f"generate: unknown fields {sorted(map(str, unknown))}, missing {sorted(missing)}")
        ids = values["prompt_token_ids"]
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Sequence):
            raise InvalidRequest("prompt_token_ids must be a list of integers")
        values["prompt_token_ids"] = tuple(ids)
        values["sampling"] = SamplingParams.from_body(values.get("sampling") or {})
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """Log-probabilities (natural log, of the model's raw logits) at one position.

    rank: 1 for the most likely token. top: (token id, logprob) of the most likely tokens, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()

    def to_body(self) -> list[Any]:
        return [self.token_id, self.logprob, self.rank, [list(pair) for pair in self.top]]

    @classmethod
    def from_body(cls, body: Sequence[Any]) -> "TokenLogprob":
        token_id, logprob, rank, top = body
        return cls(token_id=token_id, logprob=logprob, rank=rank, top=tuple((i, value) for i, value in top))


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenChunk:
    """New output of one sample: `token_ids` in order, the text they released, and how it ended if it did.

    stop_reason: the stop string or stop token id that ended it. logprobs: one entry per token id when asked for.
    mask: one entry per token id, 1 if the model chose it and 0 if a tool wrote it; None: the model chose them all.
    preview: the open block after a step, None for a mask; such a chunk holds nothing else.
    prompt_logprobs: only on the first chunk of sample 0; entry 0 is None (nothing precedes the first token).
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    mask: tuple[int, ...] | None = None
    preview: tuple[int | None, ...] | None = None

    def to_body(self) -> dict[str, Any]:
        """Map of one wire part; optional fields appear only where they hold something."""
        body: dict[str, Any] = {
            "index": self.index,
            "token_ids": list(self.token_ids),
            "text": self.text,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
            "logprobs": None if self.logprobs is None else [entry.to_body() for entry in self.logprobs],
        }
        if self.num_cached_tokens:
            body["num_cached_tokens"] = self.num_cached_tokens
        if self.preview is not None:
            body["preview"] = list(self.preview)
        if self.prompt_logprobs is not None:
            body["prompt_logprobs"] = [None if e is None else e.to_body() for e in self.prompt_logprobs]
        if self.mask is not None:
            body["mask"] = list(self.mask)
        return body

    @classmethod
    def from_body(cls, request_id: str, body: Mapping[str, Any], num_prompt_tokens: int = 0) -> "TokenChunk":
        """Inverse of `to_body` for the receiving side."""
        logprobs, prompt = body.get("logprobs"), body.get("prompt_logprobs")
        return cls(
            request_id=request_id,
            index=body["index"],
            token_ids=tuple(body["token_ids"]),
            text=body["text"],
            finish_reason=body.get("finish_reason"),
            stop_reason=body.get("stop_reason"),
            logprobs=None if logprobs is None else tuple(map(TokenLogprob.from_body, logprobs)),
            num_prompt_tokens=body.get("num_prompt_tokens", num_prompt_tokens),
            num_cached_tokens=body.get("num_cached_tokens", 0),
            preview=None if body.get("preview") is None else tuple(body["preview"]),
            prompt_logprobs=None
            if prompt is None
            else tuple(None if entry is None else TokenLogprob.from_body(entry) for entry in prompt),
            mask=None if body.get("mask") is None else tuple(body["mask"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestDone:
    """Every sample of the request has ended. Times in milliseconds since submission."""

    request_id: str
    num_prompt_tokens: int
    num_generated_tokens: int
    ttft_ms: float
    total_ms: float
    num_preemptions: int = 0
    num_forwards: int = 0  # of canvases; 0 where tokens come one by one
    num_forwarded_tokens: int = 0  # query positions in them


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestFailed:
    """The request ended with a typed error; nothing of it remains in the engine."""

    request_id: str
    error: EngineError
