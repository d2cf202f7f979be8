"""DiffusionParams: how a model that fills in masks goes about one request.

A request's answer is a canvas of `max_tokens` masks, filled block by block. Plain frozen values with strict checks;
what depends on the canvas' length is resolved in `canvas.py`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from language_worker.errors import InvalidRequest

Schedule = Literal["static", "threshold", "factor", "entropy", "hierarchical"]
Remasking = Literal["low_confidence", "random"]
KVPolicy = Literal["none", "prefix", "dual"]
CanvasKind = Literal["full", "block"]

MAX_STEPS = 1 << 20
DEFAULT_GENERATION_LENGTH = 128  # where a request does not say max_tokens
_CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": get_args(Schedule),
    "remasking": get_args(Remasking),
    "kv_policy": get_args(KVPolicy),
    "canvas": get_args(CanvasKind),
}
_NUMBERS: dict[str, tuple[float, float]] = {
    "threshold": (0.0, 1.0),
    "low_threshold": (0.0, 1.0),
    "factor": (0.0, 1e6),
    "entropy_bound": (0.0, 1e6),
    "cfg_scale": (0.0, 100.0),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionParams:
    """Raises InvalidRequest naming the field that is wrong.

    block_length: positions filled before the next ones are begun; None: 32, or the whole canvas where that is shorter.
    schedule: how many of a block's masks a step replaces, at least one:
        static         as many each step as `steps` (of the whole canvas; None: one token a step) leave, early steps
                       taking the remainder: 10 masks in 4 steps are 3, 3, 2, 2
        threshold      every token whose confidence reaches `threshold`
        factor         the n most confident, the largest n whose i-th has confidence 1 - factor / (i + 1) for all i
        entropy        the most certain ones, as long as their entropies (nats) add up to at most `entropy_bound`
        hierarchical   as threshold, and the most confident of every run of masks if it reaches `low_threshold`
    remasking: which masks go first: the most confident, or (static only) any, by chance.
    cfg_scale: classifier-free guidance against the canvas without the prompt; 0 is off, else every forward is twice.
    kv_policy: what a step computes anew. none: everything. prefix: the block and what follows; dual: the block alone.
        Both compute everything at a block's first step and every `refresh_interval` steps from there (0: not again).
    vicinity: under dual, so many positions on either side of the block are computed with it.
    canvas: `full`, all masks of the answer are seen from the start; `block`, those of later blocks are not.
    suppress_eos: no end of text is chosen. defer_eos: it is chosen last, when its position's turn comes.
    show_steps: stream the block as it stands after every step.
    """

    schedule: Schedule = "threshold"
    steps: int | None = None
    block_length: int | None = None
    threshold: float = 0.9
    low_threshold: float = 0.5
    factor: float = 1.0
    entropy_bound: float = 0.1
    remasking: Remasking = "low_confidence"
    cfg_scale: float = 0.0
    kv_policy: KVPolicy = "dual"
    refresh_interval: int = 0
    vicinity: int = 0
    canvas: CanvasKind = "full"
    suppress_eos: bool = False
    defer_eos: bool = False
    show_steps: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _wrong(name, getattr(self, name), f"one of {', '.join(choices)}")
        for name, (low, high) in _NUMBERS.items():
            value = getattr(self, name)
            if type(value) not in (int, float) or not low <= value <= high:
                raise _wrong(name, value, f"a number from {low:g} to {high:g}")
        for name, low in (("steps", 1), ("block_length", 1), ("refresh_interval", 0), ("vicinity", 0)):
            value = getattr(self, name)
            is_default = value is None and name in ("steps", "block_length")
            if not is_default and (type(value) is not int or not low <= value <= MAX_STEPS):
                raise _wrong(name, value, f"an integer from {low} to {MAX_STEPS}")
        for name in ("suppress_eos", "defer_eos", "show_steps"):
            if type(getattr(self, name)) is not bool:
                raise _wrong(name, getattr(self, name), "true or false")
        self._check_pairs()

    def _check_pairs(self) -> None:
        """What has no meaning together is refused rather than ignored."""
        if self.schedule != "static" and self.steps is not None:
            raise InvalidRequest(f"diffusion.steps belongs to schedule 'static', not {self.schedule!r}; leave it out")
        if self.schedule != "static" and self.remasking == "random":
            raise InvalidRequest(f"diffusion.remasking 'random' needs schedule 'static', not {self.schedule!r}")
        if self.kv_policy == "none" and self.refresh_interval:
            raise InvalidRequest("diffusion.refresh_interval belongs to kv_policy 'prefix' or 'dual'; leave it out")
        if self.kv_policy != "dual" and self.vicinity:
            raise InvalidRequest("diffusion.vicinity belongs to kv_policy 'dual'; leave it out")

    @property
    def num_copies(self) -> int:
        """Versions of a canvas that are computed side by side: guidance needs one without the prompt."""
        return 2 if self.cfg_scale else 1

    def to_body(self) -> dict[str, Any]:
        """Plain map for the wire."""
        return asdict(self)

    @classmethod
    def from_body(cls, body: object) -> "DiffusionParams":
        """From a plain map; unknown keys and wrong types raise InvalidRequest, missing keys default."""
        if not isinstance(body, Mapping):
            raise InvalidRequest(f"diffusion must be a map, not {type(body).__name__}")
        unknown = body.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise InvalidRequest(f"diffusion has unknown fields: {', '.join(sorted(map(str, unknown)))}")
        return cls(**body)


def _wrong(name: str, value: object, wanted: str) -> InvalidRequest:
    return InvalidRequest(f"diffusion.{name} is {value!r:.80}; use {wanted}")
