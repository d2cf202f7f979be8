"""Causal attention of one long window of queries, which lie at the end of their keys: what a prefill asks for.

The queries are answered in pieces, each over the keys that one of its queries sees and no others:

    keys     0 ......................... kv_len
    piece 0      [ window ][ queries ]
    piece 1                [ window ][ queries ]

So a sliding window costs its own width and not the whole text's, and a chunk of a long prompt does not multiply with
keys behind it only to hide them. What the pieces are is computed once for all layers.

Many queries that see everything are answered twice, over the keys before them, which all of them see, and over their
own: neither needs a mask, and torch's kernel takes larger tiles the more queries come together. The answers are added
up by the sums of their exponentials, as in "Online normalizer calculation for softmax" (Milakov and Gimelshein, 2018).
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F

WHOLE_PIECE = 512  # queries of a piece where keys are seen back to the first
MANY_QUERIES = 640  # from which on two answers without a mask are the quicker way
SHORTEST_PIECE = 128  # of a sliding one, which is as long as its window where that is more: it sees its own and as many


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Neighbouring queries and the keys that any of them sees. mask: additive, for the queries in reverse order; None
    where queries and keys are the same positions, but for the first `num_before` keys, and each sees all up to its own.
    """

    queries: slice
    keys: slice
    mask: torch.Tensor | None
    num_before: int = 0


def pieces_of(query_len: int, kv_len: int, window: int, dtype: torch.dtype, device: torch.device) -> tuple[Piece, ...]:
    """The last `query_len` of `kv_len` positions, each of which sees `window` keys, its own the last (0: all)."""
    is_sliding = 0 < window < kv_len
    if query_len == kv_len and not is_sliding:
        return (Piece(queries=slice(0, query_len), keys=slice(0, kv_len), mask=None),)
    length = min(WHOLE_PIECE, max(SHORTEST_PIECE, window)) if is_sliding else WHOLE_PIECE
    before = kv_len - query_len
    if not is_sliding and query_len >= MANY_QUERIES and device.type == "cpu":
        return (Piece(queries=slice(0, query_len), keys=slice(0, kv_len), mask=None, num_before=before),)
    pieces = []
    for start in range(0, query_len, length):
        stop = min(start + length, query_len)
        first = max(0, before + start - window + 1) if is_sliding else 0
        seen = before + stop - first
        mask = _sliding_mask(stop - start, seen, dtype, window).to(device)
        pieces.append(Piece(queries=slice(start, stop), keys=slice(first, before + stop), mask=mask))
    return tuple(pieces)


def long_window(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: tuple[Piece, ...], scale: float | None
) -> torch.Tensor:
    """q [T, H, D] over k and v [K, Hk, D] -> [T, H, D]: key heads as the batch, their query heads share keys and values
    through a zero stride."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    shape = (num_kv_heads, num_heads // num_kv_heads, k.shape[0], head_dim)
    k, v = (x.transpose(0, 1)[:, None].expand(shape) for x in (k, v))
    rows = q.view(num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    parts = [_answer(rows[:, :, p.queries], k[:, :, p.keys], v[:, :, p.keys], p, scale) for p in pieces]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return out.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)


def _answer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece: Piece, scale: float | None) -> torch.Tensor:
    if piece.num_before:
        return _answer_twice(q, k, v, piece.num_before, scale)
    if piece.mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return F.scaled_dot_product_attention(q.flip(2), k, v, attn_mask=piece.mask, scale=scale).flip(2)


def _answer_twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, before: int, scale: float | None) -> torch.Tensor:
    """Of the keys before the queries and of their own, each weighted with its part of the exponentials."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    early, early_sum = attention(q, k[:, :, :before], v[:, :, :before], 0.0, False, scale=scale)
    late, late_sum = attention(q, k[:, :, before:], v[:, :, before:], 0.0, True, scale=scale)
    return torch.lerp(late.float(), early.float(), torch.sigmoid(early_sum - late_sum)[..., None]).to(q.dtype)


def _sliding_mask(query_len: int, kv_len: int, dtype: torch.dtype, window: int) -> torch.Tensor:
    """Causal mask [query_len, kv_len] of a window at the end of its keys, for queries in reverse order.

    Reversed row r is query `query_len - 1 - r`, which sees `kv_len - r` keys, or the last `window` of these. Every row
    is then the row above moved one to the left: all are windows of one vector, so the mask costs query_len + kv_len
    elements, not their product.

        vector   0 0 0 0 0 . . .        (kv_len zeros, then -inf)
        row 0    0 0 0 0 0
        row 1      0 0 0 0 .
        row 2        0 0 0 . .
    """
    vector = torch.zeros(kv_len + query_len, dtype=dtype)
    vector[kv_len:] = -math.inf
    if window:
        vector[: max(0, kv_len - window)] = -math.inf
    return vector.as_strided((query_len, kv_len), (1, 1))
