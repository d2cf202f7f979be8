"""The ops on pages over 8-bit caches: what they give over a plain cache of the numbers that the 8 bits stand for."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention_mask import BIDIRECTIONAL, CAUSAL, AttentionMask
from kernels.dispatch import Path, forced
from kernels.paged_attention import AttentionBatch, paged_attention
from kernels.pages import write_pages
from kernels.quantise import dequantise_rows
from kernels.quantised_pages import LivePages, QuantisedPages
from tests import oracles
from tests.kernels.paths import WITH_NATIVE, with_native
from tests.profiles import IS_SOAK
from tests.tolerances import assert_matches

SIZE, KV_HEADS, HEAD_DIM = 4, 2, 16
NARROW = (torch.int8, torch.float8_e4m3fn)
MASKS = (CAUSAL, AttentionMask(window=5), AttentionMask(block_length=4), BIDIRECTIONAL)


def _poisoned(num_pages: int, narrow: torch.dtype) -> QuantisedPages:
    """Pages whose scales are NaN: what reads one that nobody wrote shows it."""
    shape = (num_pages, SIZE, KV_HEADS, HEAD_DIM)
    return QuantisedPages(torch.ones(shape).to(narrow), torch.full(shape[:-1], math.nan))


def _fill(caches: tuple[QuantisedPages, QuantisedPages], table: torch.Tensor, kv_len: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, v = (3 * torch.randn(kv_len, KV_HEADS, HEAD_DIM, generator=generator) for _ in range(2))
    slots = [int(table[p // SIZE]) * SIZE + p % SIZE for p in range(kv_len)]
    write_pages(*caches, k, v, torch.tensor(slots))


@settings(max_examples=200 if IS_SOAK else 20, deadline=None, derandomize=True)
@given(
    windows=st.lists(
        st.tuples(st.sampled_from([1, 1, 2, 5, 20]), st.sampled_from([0, 1, 7, 30])), min_size=1, max_size=4
    ),
    shared=st.integers(0, 3),
    narrow=st.sampled_from(NARROW),
    mask=st.sampled_from(MASKS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    path=with_native,
    seed=st.integers(0, 99),
)
def test_attention_reads_what_was_written(
    windows: list[tuple[int, int]],
    shared: int,
    narrow: torch.dtype,
    mask: AttentionMask,
    dtype: torch.dtype,
    path: Path,
    seed: int,
) -> None:
    """Of sequences that share their first pages, as far as both have them, in pages of any order."""
    query_lens = [asked for asked, _ in windows]
    kv_lens = [asked + before for asked, before in windows]
    counts = [-(-length // SIZE) for length in kv_lens]
    ids = list(range(sum(counts) + 3))
    random.Random(seed).shuffle(ids)
    table = torch.full((len(windows), max(counts) + 1), ids[-1])
    for row, count in enumerate(counts):
        own = [ids.pop(0) for _ in range(count)]
        common = min(shared, count - 1, counts[0] - 1, kv_lens[0] // SIZE) if row else 0
        table[row, :count] = torch.tensor([*table[0, :common].tolist(), *own[common:]])
    caches = _poisoned(len(ids) + sum(counts), narrow), _poisoned(len(ids) + sum(counts), narrow)
    with forced(path):
        for row in reversed(range(len(windows))):  # shared pages are the first sequence's
            _fill(caches, table[row], kv_lens[row], seed + row)
        q = torch.randn(sum(query_lens), 4, HEAD_DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)
        starts = [sum(query_lens[:i]) for i in range(len(query_lens))]
        batch = AttentionBatch(page_table=table, query_lens=query_lens, kv_lens=kv_lens, query_start=starts)
        actual = paged_attention(q, *caches, batch, mask=mask)
        assert torch.equal(actual, paged_attention(q, *caches, batch, mask=mask)), "what the batch keeps is as good"
    plain = [dequantise_rows(cache.values, cache.scales, dtype) for cache in caches]
    for row, (start, asked, kv_len) in enumerate(zip(starts, query_lens, kv_lens, strict=True)):
        slots = [int(table[row, p // SIZE]) * SIZE + p % SIZE for p in range(kv_len)]
        k, v = (cache.view(-1, KV_HEADS, HEAD_DIM)[slots] for cache in plain)
        positions = torch.arange(kv_len)
        seen = mask.visible(positions[kv_len - asked :], positions)
        rows = slice(start, start + asked)
        expected, _ = oracles.masked_attention(
            q[rows], k, v, sees=lambda i, j, seen=seen: bool(seen[i, j]), softcap=None
        )
        assert_matches(actual[rows], expected, reduced=4)


@pytest.mark.parametrize("path", WITH_NATIVE)
@pytest.mark.parametrize("narrow", NARROW)
def test_other_slots_stay_as_they_are(narrow: torch.dtype, path: Path) -> None:
    caches = _poisoned(3, narrow), _poisoned(3, narrow)
    with forced(path):
        write_pages(
            *caches, torch.ones(2, KV_HEADS, HEAD_DIM), torch.zeros(2, KV_HEADS, HEAD_DIM), torch.tensor([9, 2])
        )
    for cache, largest in zip(caches, (1.0, 0.0), strict=True):
        written = cache.scales.view(-1, KV_HEADS)
        assert not written[[9, 2]].isnan().any() and written.isnan().sum() == 10 * KV_HEADS
        values = dequantise_rows(cache.values.view(-1, KV_HEADS, HEAD_DIM), written, torch.float32)
        assert torch.allclose(values[[9, 2]], torch.full((2, KV_HEADS, HEAD_DIM), largest))


def test_live_pages_are_numbered_in_their_order() -> None:
    """So a lone sequence's pages are neighbours, wherever they lie."""
    table = torch.tensor([[7, 2, 9, 0], [7, 2, 5, 0]])
    live = LivePages.of(table, [9, 11], SIZE, torch.device("cpu"))
    assert live.page_table.tolist() == [[0, 1, 2, 0], [0, 1, 3, 0]]
    assert live.slots.view(-1, SIZE)[:, 0].tolist() == [28, 8, 36, 20]


def test_a_batch_that_contradicts_itself_is_refused() -> None:
    caches = _poisoned(2, torch.int8), _poisoned(2, torch.int8)
    batch = AttentionBatch(page_table=torch.tensor([[0]]), query_lens=[1], kv_lens=[9], query_start=[0])
    with pytest.raises(ValueError, match="asks 1 positions of 9"):
        paged_attention(torch.zeros(1, 4, HEAD_DIM), *caches, batch)
