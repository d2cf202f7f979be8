"""Bidirectional attention inside segments of one packed sequence.

Neighbouring segments of equal length form a *run*, which is one batched call without copies: windows of a vision
tower sorted by length cost a handful of calls. `Segments` holds the runs, so that all layers share them. Tokens at a
segment's end may be unseen: they attend like the others, and nobody attends to them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kernels.dispatch import attention_twin


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """Runs of equal neighbouring segments: (first token, number of segments, tokens per segment, seen of those)."""

    runs: tuple[tuple[int, int, int, int], ...]
    num_tokens: int

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], num_unseen: Sequence[int] | None = None) -> Segments:
        """Segments of these lengths, one after the other; num_unseen: tokens at the end of each that none attends to.

        Raises ValueError when a segment has no token that is seen.
        """
        hidden = [0] * len(lengths) if num_unseen is None else num_unseen
        pairs = [(length, length - num) for length, num in zip(lengths, hidden, strict=True)]
        if any(not 0 < seen <= length for length, seen in pairs):
            what = list(lengths) if num_unseen is None else f"{list(lengths)}, of which unseen {list(hidden)}"
            raise ValueError(f"segments must not be empty, got lengths {what}")
        runs, first = [], 0
        for (length, seen), group in itertools.groupby(pairs):
            count = sum(1 for _ in group)
            runs.append((first, count, length, seen))
            first += count * length
        return cls(runs=tuple(runs), num_tokens=first)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Sequence[int] | torch.Tensor) -> Segments:
        """Segments between neighbouring bounds, the first of which is 0: [num_segments + 1] rising integers."""
        bounds = cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else list(cu_seqlens)
        if not bounds or bounds[0] != 0:
            raise ValueError(f"cumulative lengths must begin with 0, got {bounds[:4]}")
        return cls.from_lengths([end - start for start, end in itertools.pairwise(bounds)])


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: Segments | Sequence[int] | torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention of every token over all tokens of its own segment that are seen.

    q, k, v: [N, H, D] (any strides, last dimension contiguous). cu_seqlens: `Segments`, or cumulative lengths.
    scale: default `1 / sqrt(D)`. Returns [N, H, D]. Raises ValueError when the segments do not cover all N tokens.
    """
    segments = cu_seqlens if isinstance(cu_seqlens, Segments) else Segments.from_cu_seqlens(cu_seqlens)
    if segments.num_tokens != q.shape[0]:
        raise ValueError(f"segments cover {segments.num_tokens} tokens, the queries are {q.shape[0]}")
    triton = attention_twin("varlen_attention", q)
    if triton is not None:
        return triton.varlen_attention(q, k, v, segments.runs, scale)  # type: ignore[no-any-return]
    parts = [_run_attention(q, k, v, run, scale) for run in segments.runs]
    if not parts:
        return torch.empty_like(q)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _run_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: tuple[int, int, int, int], scale: float | None
) -> torch.Tensor:
    first, count, length, seen = run
    batch_q, batch_k, batch_v = (
        x[first : first + count * length].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v)
    )
    out = F.scaled_dot_product_attention(batch_q, batch_k[:, :, :seen], batch_v[:, :, :seen], scale=scale)
    return out.transpose(1, 2).reshape(count * length, *q.shape[1:])
