"""What crosses the engine's border: sampling parameters and a request in, chunks and ends out.

Plain frozen values with strict checks; `to_body`/`from_body` turn them into maps of ints, floats and strings for
the wire. Refuses to know tensors, pages and transport.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from language_worker.diffusion_params import DiffusionParams
from language_worker.errors import EngineError, InvalidRequest

MAX_SAMPLES = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1000
MAX_STOP_TOKEN_IDS = 256
MAX_LISTED_TOKEN_IDS = 32768  # allowed or banned
MAX_TOKENS_PER_PART = 1024
MAX_INT = 2**31 - 1  # of counts and token ids: what every tensor, and every field of the wire, can hold

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen; raises InvalidRequest naming the field that is wrong.

    max_tokens: generated tokens at most (None: up to the model's length). n: independent samples. best_of: so many
    are generated and the n with the highest mean log-probability per token returned, best first (None: n).
    seed: sample i at output position p depends on (seed, i, p) only; None draws a seed per request.
    temperature 0 is greedy, ties going to the lowest id. top_k 0 or -1, top_p 1 and min_p 0 are off.
    Penalties: repetition over prompt and output, presence and frequency over the output.
    logit_bias: token id -> added to its logit. allowed_token_ids: nothing else is chosen (None: everything may be);
    banned_token_ids: never chosen, whatever allows or favours them. stop: strings that end the text (never emitted).
    min_tokens: EOS, stop ids and stop strings do not end the output before that many tokens; the ids are not chosen.
    logprobs / prompt_logprobs: how many alternatives to report beside the token itself (None: no report).
    diffusion: for models that fill in masks (None: their defaults); max_tokens is then the canvas' length.
    """

    max_tokens: int | None = None
    n: int = 1
    best_of: int | None = None
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    banned_token_ids: Sequence[int] = ()
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    diffusion: DiffusionParams | None = None

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1, MAX_INT, optional=True)
        _check_int("n", self.n, 1, MAX_SAMPLES)
        _check_int("best_of", self.best_of, self.n, MAX_SAMPLES, optional=True)
        _check_int("seed", self.seed, -(2**63), 2**64 - 1, optional=True)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_int("top_k", self.top_k, -1, MAX_INT)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check_int("min_tokens", self.min_tokens, 0, MAX_INT if self.max_tokens is None else self.max_tokens)
        _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        if type(self.ignore_eos) is not bool:
            raise InvalidRequest(f"ignore_eos is {self.ignore_eos!r}; use true or false")
        if self.diffusion is not None and not isinstance(self.diffusion, DiffusionParams):
            raise InvalidRequest(f"diffusion is {type(self.diffusion).__name__}; use DiffusionParams")
        self._check_collections()

    def _check_collections(self) -> None:
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"logit_bias must map at most {MAX_LOGIT_BIAS} token ids to numbers")
        for token_id, bias in self.logit_bias.items():
            _check_int("logit_bias token id", token_id, 0, MAX_INT)
            _check_number(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        stops = self.stop_strings
        if len(stops) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop has {len(stops)} strings; at most {MAX_STOP_STRINGS} are allowed")
        for text in stops:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
                raise InvalidRequest(f"stop holds {text!r}; use strings of 1 to {MAX_STOP_CHARS} characters")
        _check_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        _check_ids("banned_token_ids", self.banned_token_ids, MAX_LISTED_TOKEN_IDS)
        if self.allowed_token_ids is not None:
            _check_ids("allowed_token_ids", self.allowed_token_ids, MAX_LISTED_TOKEN_IDS)
            if not set(self.allowed_token_ids) - set(self.banned_token_ids):
                raise InvalidRequest("allowed_token_ids holds nothing that is not banned; allow at least one token id")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whichever way it was given."""
        if isinstance(self.stop, str):
            return (self.stop,)
        if not isinstance(self.stop, Sequence):
            raise InvalidRequest(f"stop is {self.stop!r}; use a string or a list of strings")
        return tuple(self.stop)

    @property
    def num_samples(self) -> int:
        """Samples that are generated; `n` of them are returned."""
        return self.best_of or self.n

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def to_body(self) -> dict[str, Any]:
        """Plain map with string keys only (logit_bias as [id, bias] pairs)."""
        body: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        body["logit_bias"] = [[token_id, float(bias)] for token_id, bias in self.logit_bias.items()]
        body["stop"] = list(self.stop_strings)
        for name in ("stop_token_ids", "banned_token_ids"):
            body[name] = list(body[name])
        body["diffusion"] = None if self.diffusion is None else self.diffusion.to_body()
        body["allowed_token_ids"] = None if self.allowed_token_ids is None else list(self.allowed_token_ids)
        return body

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> "SamplingParams":
        """Strict inverse of `to_body`: unknown keys and wrong types raise InvalidRequest; missing keys default."""
        values = dict(_require_map("sampling", body))
        unknown = values.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise InvalidRequest(f"sampling has unknown fields: {', '.join(sorted(map(str, unknown)))}")
        if "logit_bias" in values and not isinstance(values["logit_bias"], Mapping):
            try:
                values["logit_bias"] = dict(values["logit_bias"])
            except (TypeError, ValueError):
                raise InvalidRequest("logit_bias must be a list of [token id, bias] pairs") from None
        if values.get("diffusion") is not None:
            values["diffusion"] = DiffusionParams.from_body(values["diffusion"])
        return cls(**values)


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
                raise InvalidRequest(f"prompt_token_ids holds {_shown(token_id)}; use integers from 0 to {MAX_INT}")
        _check_int("num_media", self.num_media, 0, MAX_INT)
        _check_int("deadline_ms", self.deadline_ms, 0, 2**63 - 1, optional=True)
        _check_int("tokens_per_part", self.tokens_per_part, 1, MAX_TOKENS_PER_PART)
        if type(self.return_logits) is not bool:
            raise InvalidRequest(f"return_logits is {self.return_logits!r}; use true or false")

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> "GenerateRequest":
        """Build from the map of a "generate" or "prefill" call (its tickets and receiver are the worker's business);
        strict."""
        values = dict(_require_map("generate", body))
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


def _require_map(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} must be a map, not {type(value).__name__}")
    return value


def _shown(value: object) -> str:
    """For a message; Python refuses to print integers of many thousand digits."""
    return "a huge number" if type(value) is int and abs(value) >= 10**30 else repr(value)


def _check_int(name: str, value: object, low: int, high: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if type(value) is not int or not low <= value <= high:
        raise InvalidRequest(f"{name} is {_shown(value)}; use an integer in {low}..{high}")


def _check_ids(name: str, value: object, most: int) -> None:
    if not isinstance(value, (list, tuple)):
        raise InvalidRequest(f"{name} is {value!r}; use a list of token ids")
    if len(value) > most:
        raise InvalidRequest(f"{name} has {len(value)} entries; at most {most} are allowed")
    for token_id in value:
        _check_int(f"{name} entry", token_id, 0, MAX_INT)


def _check_number(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    ok = type(value) in (int, float) and low <= value <= high  # type: ignore[operator]
    if not ok or (low_open and value == low):
        raise InvalidRequest(
            f"{name} is {_shown(value)}; use a number {'above' if low_open else 'from'} {low:g} to {high:g}"
        )
