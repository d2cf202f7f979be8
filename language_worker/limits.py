"""The bounds of one engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLimits:
    """Bounds of one engine, all resolved: tokens of a sequence, waiting requests, media rows, returned logits, rows of
    KV between two engines."""

    max_model_len: int
    max_waiting: int
    input_buffer_tokens: int
    max_logits_bytes: int
    kv_buffer_tokens: int = 0
