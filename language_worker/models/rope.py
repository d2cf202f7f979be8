"""Rope: rotary frequencies and their scaling for long contexts, as config.json describes them.

    default   theta ** -(2i / head_dim)
    linear    all of them divided by factor
    dynamic   theta grown to the longest length that is served (NTK-aware), once it exceeds what was trained
    llama3    long wavelengths divided by factor, short ones kept, those between blended
    yarn      the same by how often a dimension turns within the trained length; cosines and sines scaled as well

"dynamic" is the one that depends on a length. It is fixed when the model is loaded, so that a position's key never
changes: equal to the reference for a prompt of just that length, and for any length if no more than the trained one is
served. Pure arithmetic; knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kernels.rotary import inverse_frequencies
from language_worker.errors import ModelNotSupported
from language_worker.models.config_values import read_size, read_theta
from transfer.checkpoint_json import is_kind, shown

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """trained_len: positions that the checkpoint was trained on before scaling. attention_factor: yarn's scale of
    cosines and sines. low, high: turns within the trained length below which a dimension is stretched, and above which
    it is kept (llama3, yarn)."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    trained_len: int = 0
    low: float = 1.0
    high: float = 4.0
    attention_factor: float = 1.0
    truncate: bool = True

    @classmethod
    def read(cls, text: Mapping[str, Any], default_theta: float) -> Rope:
        """From `rope_parameters`, or `rope_theta` and `rope_scaling`; ModelNotSupported names what is not served."""
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        theta = read_theta(rope, text, default_theta)
        if kind not in KINDS:
            raise ModelNotSupported(f"rotary scaling {kind!r} is not served; served are {', '.join(KINDS)}")
        if rope.get("partial_rotary_factor", text.get("partial_rotary_factor", 1.0)) != 1.0:
            raise ModelNotSupported("partial_rotary_factor is not 1; only heads that are rotated whole are served")
        if kind == "default":
            return cls(theta=theta)
        configured = read_size(text, "max_position_embeddings", 2048)
        stated = _first(rope, text, "original_max_position_embeddings")
        trained = int(stated or configured)
        factor = _factor(rope, kind, configured / trained if stated else None)
        base = {"theta": theta, "kind": kind, "factor": factor, "trained_len": trained}
        if kind == "llama3":
            low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
            if low is None or high is None or low >= high:
                given = f"low_freq_factor {low!r} and high_freq_factor {high!r}"
                raise ModelNotSupported(f"rotary scaling 'llama3' has {given}; two rising numbers are needed")
            return cls(**base, low=float(low), high=float(high))
        if kind != "yarn":
            return cls(**{**base, "trained_len": configured})
        return cls(
            **base,
            low=float(rope.get("beta_slow") or 1),
            high=float(rope.get("beta_fast") or 32),
            attention_factor=_attention_factor(rope, factor),
            truncate=bool(rope.get("truncate", True)),
        )

    def max_positions(self, configured: int) -> int:
        """The longest sequence that the checkpoint is meant for."""
        if self.kind in ("linear", "dynamic", "yarn"):
            return max(configured, int(self.trained_len * self.factor))
        return configured

    def deciding_len(self, max_len: int) -> int:
        """The length that decides the frequencies where sequences of `max_len` are served; 0 where none does."""
        if self.kind != "dynamic":
            return 0
        return max(max_len - 1, self.trained_len)  # the last token of the longest is never fed

    def frequencies(self, head_dim: int, max_len: int) -> torch.Tensor:
        """[head_dim / 2] float32; max_len: the longest sequence that is served."""
        if self.kind == "dynamic":
            longest = self.deciding_len(max_len)
            growth = self.factor * longest / self.trained_len - (self.factor - 1)
            return inverse_frequencies(head_dim, self.theta * growth ** (head_dim / (head_dim - 2)))
        plain = inverse_frequencies(head_dim, self.theta)
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "llama3":
            return self._llama3(plain)
        if self.kind == "yarn":
            return self._yarn(plain, head_dim)
        return plain

    def _llama3(self, plain: torch.Tensor) -> torch.Tensor:
        turns = self.trained_len * plain / (2 * math.pi)  # of a dimension within the trained length
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - kept) * plain / self.factor + kept * plain

    def _yarn(self, plain: torch.Tensor, head_dim: int) -> torch.Tensor:
        first, last = (self._dimension(turns, head_dim) for turns in (self.high, self.low))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        width = last - first or 0.001
        stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
        return plain / self.factor * stretched + plain * (1 - stretched)

    def _dimension(self, turns: float, head_dim: int) -> float:
        """Which dimension turns so often within the trained length."""
        return head_dim * math.log(self.trained_len / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


def _first(rope: Mapping[str, Any], text: Mapping[str, Any], name: str) -> Any:
    return rope.get(name) or text.get(name)


def _factor(rope: Mapping[str, Any], kind: str, growth: float | None) -> float:
    """How many times the trained length is served. Only YaRN's may be left out: then it is `growth`, from the trained
    length to the configured one, where both are said."""
    factor: Any = rope.get("factor")
    if factor is None and kind == "yarn":
        factor = growth
    if not is_kind(factor, "positive") or factor < 1:
        raise ModelNotSupported(f"rotary scaling {kind!r} has factor {shown(factor)}; a number of at least 1 is needed")
    return float(factor)


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    given = rope.get("attention_factor")
    if given is not None:
        return float(given)

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(float(mscale)) / scale(float(all_dim)) if mscale and all_dim else scale(1.0)
