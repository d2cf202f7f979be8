"""How one request's tokens are chosen, and when its turn is: what users set, checked field by field."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from language_worker.diffusion_params import DiffusionParams
from language_worker.errors import InvalidRequest
from language_worker.field_checks import MAX_INT, check_ids, check_int, check_number, require_map

MAX_SAMPLES = 128
MAX_PRIORITY = 100
PRIORITY_S = 10.0
MIN_REPETITION_PENALTY = 0.01  # logits are divided by it, and must stay finite
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1000
MAX_STOP_TOKEN_IDS = 256
MAX_LISTED_TOKEN_IDS = 32768  # allowed or banned


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen; raises InvalidRequest naming the field that is wrong.

    max_tokens: generated tokens at most (None: up to the model's length). n: independent samples. best_of: so many
    are generated and the n with the highest mean log-probability per token returned, best first (None: n).
    seed: sample i at output position p depends on (seed, i, p) only; None draws a seed per request.
    temperature 0 is greedy, ties going to the lowest id. top_k 0 or -1, top_p 1 and min_p 0 are off.
    Penalties: repetition (0.01 to 100, 1 is off) over prompt and output, presence and frequency over the output.
    logit_bias: token id -> added to its logit. allowed_token_ids: nothing else is chosen (None: everything may be);
    banned_token_ids: never chosen, whatever allows or favours them. stop: strings that end the text (never emitted).
    min_tokens: so many tokens come first: EOS and stop ids are not chosen among them, and a stop string that ends in
    their text ends nothing; one that ends behind it does, wherever it begins, and what of it is held back stays so.
    logprobs / prompt_logprobs: how many alternatives to report beside the token itself (None: no report).
    diffusion: for models that fill in masks (None: their defaults); max_tokens is then the canvas' length.
    priority: of requests that wait or compete for memory, those of a smaller one come first; one step counts as much as
    PRIORITY_S seconds of waiting, so that none waits for ever.
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
    priority: int = 0

    def __post_init__(self) -> None:
        check_int("max_tokens", self.max_tokens, 1, MAX_INT, optional=True)
        check_int("n", self.n, 1, MAX_SAMPLES)
        check_int("best_of", self.best_of, self.n, MAX_SAMPLES, optional=True)
        check_int("seed", self.seed, -(2**63), 2**64 - 1, optional=True)
        check_number("temperature", self.temperature, 0.0, 100.0)
        check_number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        check_int("top_k", self.top_k, -1, MAX_INT)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_number("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, 100.0)
        check_int("min_tokens", self.min_tokens, 0, MAX_INT if self.max_tokens is None else self.max_tokens)
        check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        check_int("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if type(self.ignore_eos) is not bool:
            raise InvalidRequest(f"ignore_eos is {self.ignore_eos!r}; use true or false")
        if self.diffusion is not None and not isinstance(self.diffusion, DiffusionParams):
            raise InvalidRequest(f"diffusion is {type(self.diffusion).__name__}; use DiffusionParams")
        self._check_collections()

    def _check_collections(self) -> None:
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"logit_bias must map at most {MAX_LOGIT_BIAS} token ids to numbers")
        for token_id, bias in self.logit_bias.items():
            check_int("logit_bias token id", token_id, 0, MAX_INT)
            check_number(f"logit_bias[{token_id}]", bias, -100.0, 100.0)
        stops = self.stop_strings
        if len(stops) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop has {len(stops)} strings; at most {MAX_STOP_STRINGS} are allowed")
        for text in stops:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_CHARS:
                raise InvalidRequest(f"stop holds {text!r}; use strings of 1 to {MAX_STOP_CHARS} characters")
        check_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        check_ids("banned_token_ids", self.banned_token_ids, MAX_LISTED_TOKEN_IDS)
        if self.allowed_token_ids is not None:
            check_ids("allowed_token_ids", self.allowed_token_ids, MAX_LISTED_TOKEN_IDS)
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
        values = dict(require_map("sampling", body))
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
