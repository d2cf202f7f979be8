"""Slow, obvious float64 references for the kernels: plain Python loops and textbook formulas.

They share no code with the kernels and none of their tricks (no fused attention, no gathers, no tables).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias."""
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double() + bias.double()


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate * sigmoid(gate) * up."""
    width = gate_up.shape[-1] // 2
    gate, up = gate_up[..., :width].double(), gate_up[..., width:].double()
    return gate / (1 + (-gate).exp()) * up


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x * P(normal < x)."""
    wide = x.double()
    return wide * 0.5 * (1 + torch.special.erf(wide / math.sqrt(2)))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """The tanh formula of GELU."""
    wide = x.double()
    return 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))


def gelu_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x)."""
    return x.double() / (1 + torch.exp(-1.702 * x.double()))


def rotate_pairs(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Every pair (i, i + D/2) of x [T, H, D] as a complex number, turned by angles [T, D/2] float64."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), -1)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None, causal_end: bool = False
) -> torch.Tensor:
    """Attention of q [T, H, D] over k, v [L, Hk, D], head by head and query by query.

    causal_end: query i sits at position L - T + i and sees nothing later.
    """
    num_queries, num_heads, head_dim = q.shape
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    out = torch.empty(q.shape, dtype=torch.float64)
    for head in range(num_heads):
        kv_head = head * k.shape[1] // num_heads
        for i in range(num_queries):
            seen = k.shape[0] - num_queries + i + 1 if causal_end else k.shape[0]
            scores = k[:seen, kv_head].double() @ q[i, head].double() * scale
            weights = (scores - scores.max()).exp()
            out[i, head] = (weights / weights.sum()) @ v[:seen, kv_head].double()
    return out


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, sees: Callable[[int, int], bool], softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [T, H, D] over k, v [L, Hk, D], query i seeing key j when `sees(i, j)`; log-sum-exps [T, H].

    softcap: scores become softcap * tanh(score / softcap).
    """
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    for i in range(q.shape[0]):
        seen = [j for j in range(k.shape[0]) if sees(i, j)]
        for head in range(q.shape[1]):
            kv_head = head * k.shape[1] // q.shape[1]
            scores = k[seen, kv_head].double() @ q[i, head].double() / math.sqrt(q.shape[2])
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if seen:
                weights = (scores - scores.max()).exp()
                out[i, head] = (weights / weights.sum()) @ v[seen, kv_head].double()
                lse[i, head] = weights.sum().log() + scores.max()
    return out, lse


def segment_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], num_unseen: Sequence[int] = ()
) -> torch.Tensor:
    """Bidirectional attention inside consecutive segments of these lengths, of whose last tokens some are not seen."""
    parts, start = [], 0
    for i, length in enumerate(lengths):
        piece, seen = slice(start, start + length), slice(start, start + length - (num_unseen[i] if num_unseen else 0))
        parts.append(attention(q[piece], k[seen], v[seen]))
        start += length
    return torch.cat(parts)


def gather_pages(cache: torch.Tensor, pages: Sequence[int], kv_len: int) -> torch.Tensor:
    """The first kv_len rows of a sequence's pages, one row at a time: [kv_len, Hk, D]."""
    page_size = cache.shape[1]
    return torch.stack([cache[pages[i // page_size], i % page_size] for i in range(kv_len)])
