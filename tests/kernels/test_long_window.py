"""A long window in pieces against dense float64 attention, and what the pieces leave out."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.long_window import MANY_QUERIES, SHORTEST_PIECE, WHOLE_PIECE, long_window, pieces_of
from tests.tolerances import assert_matches

CPU = torch.device("cpu")
LENGTHS = [(17, 17), (40, 90), (SHORTEST_PIECE + 1, SHORTEST_PIECE + 1), (300, 1000), (WHOLE_PIECE + 90, 700)]
LENGTHS += [(MANY_QUERIES, MANY_QUERIES + 1), (MANY_QUERIES + 9, 2 * MANY_QUERIES), (MANY_QUERIES - 1, MANY_QUERIES)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 1, 33, 129, 200, 5000])
@pytest.mark.parametrize(("query_len", "kv_len"), LENGTHS)
def test_pieces_together_are_the_dense_answer(query_len: int, kv_len: int, window: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(query_len + window)
    q, k, v = (
        torch.randn(n, heads, 20, generator=generator).to(dtype) for n, heads in ((query_len, 6), *[(kv_len, 2)] * 2)
    )
    distance = torch.arange(kv_len - query_len, kv_len)[:, None] - torch.arange(kv_len)
    seen = (distance >= 0) & (distance < (window or kv_len))
    wide_k, wide_v = (x.double().repeat_interleave(3, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), wide_k) / math.sqrt(20)
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), wide_v)
    actual = long_window(q, k, v, pieces_of(query_len, kv_len, window, dtype, CPU), None)
    assert_matches(actual, expected, reduced=4)


@pytest.mark.parametrize("window", [1, 64, 129, 300])
def test_a_sliding_window_multiplies_with_little_more_than_it_sees(window: int) -> None:
    pieces = pieces_of(2048, 4096, window, torch.float32, CPU)
    assert [piece.queries.start for piece in pieces] == [0, *(piece.queries.stop for piece in pieces[:-1])]
    products = sum((p.queries.stop - p.queries.start) * (p.keys.stop - p.keys.start) for p in pieces)
    assert products <= 2048 * (window + max(SHORTEST_PIECE, window))


def test_scores_far_apart_before_and_behind_the_first_query() -> None:
    """Whichever side has all the weight, the other brings nothing, and nothing overflows."""
    queries, before = MANY_QUERIES, 5
    q = torch.ones(queries, 1, 4)
    v = torch.cat([torch.full((before, 1, 4), 3.0), torch.full((queries, 1, 4), 7.0)])
    for side, expected in ((slice(0, before), 3.0), (slice(before, None), 7.0)):
        k = torch.full((before + queries, 1, 4), -500.0)
        k[side] = 500.0
        actual = long_window(q, k, v, pieces_of(queries, before + queries, 0, torch.float32, CPU), 1.0)
        torch.testing.assert_close(actual, torch.full_like(q, expected))


def test_keys_behind_a_chunk_are_not_multiplied_with() -> None:
    queries = MANY_QUERIES - 1
    pieces = pieces_of(queries, 2048 + queries, 0, torch.float32, CPU)
    assert all(piece.keys.stop == 2048 + piece.queries.stop for piece in pieces)
    assert sum(p.mask.untyped_storage().nbytes() for p in pieces if p.mask is not None) < 100_000
