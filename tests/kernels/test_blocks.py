"""Rows through tables and block/page conversion against one-row-at-a-time loops; what nobody owns is NaN and stays."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.blocks import blocks_to_pages, copy_pages, pages_to_blocks, place_rows, store_rows
from kernels.dispatch import Path, forced
from tests.kernels.paths import paths
from tests.profiles import IS_SOAK

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXAMPLES = 300 if IS_SOAK else 30


def _draw(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    block_size=st.sampled_from([1, 3, 16]),
    width=st.sampled_from([1, 5, 64, 130]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    seed=st.integers(0, 99),
    path=paths,
)
def test_rows_of_streams_are_stored_in_blocks_and_placed_in_inputs(
    lengths: list[int], block_size: int, width: int, dtypes: tuple[torch.dtype, torch.dtype], seed: int, path: Path
) -> None:
    order = random.Random(seed)
    counts = [-(-length // block_size) for length in lengths]
    ids = order.sample(range(sum(counts) + 3), sum(counts))
    pool = torch.full((sum(counts) + 3, block_size, width), math.nan, dtype=dtypes[0])
    tables = torch.full((len(lengths), max(counts) + 1), 10**6, dtype=torch.int32)  # an entry nobody may follow
    for s, count in enumerate(counts):
        tables[s, :count] = torch.tensor([ids.pop() for _ in range(count)], dtype=torch.int32)
    pairs = [(s, r) for s, length in enumerate(lengths) for r in range(length)]
    order.shuffle(pairs)
    streams = torch.tensor([s for s, _ in pairs], dtype=torch.int64)
    rows = torch.tensor([r for _, r in pairs], dtype=torch.int64)
    values = _draw(seed, len(pairs), width + 2, dtype=dtypes[1])[:, 1 : 1 + width]
    expected_pool = pool.clone()
    for i, (s, r) in enumerate(pairs):
        expected_pool[int(tables[s, r // block_size]), r % block_size] = values[i].to(dtypes[0])
    with forced(path):
        store_rows(pool, tables, streams, rows, values)
    assert _same(pool, expected_pool)

    out = torch.full((len(pairs) + 4, width), math.nan, dtype=dtypes[1])
    targets = torch.tensor(order.sample(range(len(out)), len(pairs)), dtype=torch.int64)
    expected = out.clone()
    for i, (s, r) in enumerate(pairs):
        expected[int(targets[i])] = pool[int(tables[s, r // block_size]), r % block_size].to(dtypes[1])
    with forced(path):
        place_rows(out, targets, pool, tables, streams, rows)
    assert _same(out, expected)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.sampled_from([1, 4, 6, 16]), st.sampled_from([1, 4, 16])),
    heads=st.sampled_from([1, 2, 5]),
    head_dim=st.sampled_from([1, 8, 20]),
    span=st.tuples(st.integers(0, 30), st.integers(0, 40)),
    head_major=st.booleans(),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    seed=st.integers(0, 99),
    path=paths,
)
def test_blocks_become_pages_and_pages_blocks(
    sizes: tuple[int, int],
    heads: int,
    head_dim: int,
    span: tuple[int, int],
    head_major: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
    seed: int,
    path: Path,
) -> None:
    (block_size, page_size), (first, count) = sizes, span
    order = random.Random(seed)
    num_blocks, num_pages = (-(-(first + count) // size) for size in sizes)
    if head_major:
        memory = torch.full((num_blocks + 2, heads, block_size, head_dim), math.nan, dtype=dtypes[0])
        blocks = memory.transpose(1, 2)
    else:
        blocks = torch.full((num_blocks + 2, block_size, heads, head_dim), math.nan, dtype=dtypes[0])
    block_ids = torch.tensor(order.sample(range(len(blocks)), num_blocks), dtype=torch.int64)
    values = _draw(seed, count, heads, head_dim, dtype=dtypes[0])
    for i in range(count):
        blocks[int(block_ids[(first + i) // block_size]), (first + i) % block_size] = values[i]
    pages = torch.full((num_pages + 2, page_size, heads, head_dim), math.nan, dtype=dtypes[1])
    page_ids = torch.tensor(order.sample(range(len(pages)), num_pages), dtype=torch.int64)
    expected = pages.clone()
    for i in range(count):
        expected[int(page_ids[(first + i) // page_size]), (first + i) % page_size] = values[i].to(dtypes[1])
    with forced(path):
        blocks_to_pages(blocks, block_ids, pages, page_ids, first, count)
        assert _same(pages, expected)
        back = torch.full_like(blocks, math.nan)
        pages_to_blocks(pages, page_ids, back, block_ids, first, count)
    untouched = torch.full_like(blocks, math.nan)
    for i in range(count):
        value = values[i].to(dtypes[1]).to(dtypes[0])
        untouched[int(block_ids[(first + i) // block_size]), (first + i) % block_size] = value
    assert _same(back, untouched)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    pages=st.integers(1, 9),
    shape=st.sampled_from([(1, 1, 1), (16, 2, 24), (7, 3, 200)]),
    copies=st.integers(0, 4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    path=paths,
)
def test_pages_are_copied_whole_and_others_stay(
    pages: int, shape: tuple[int, int, int], copies: int, dtype: torch.dtype, seed: int, path: Path
) -> None:
    copies = min(copies, pages - 1)
    caches = [_draw(seed + i, pages, *shape, dtype=dtype) for i in (0, 1)]
    ids = random.Random(seed).sample(range(pages), copies + 1)
    sources, targets = [ids[0]] * copies, ids[1:]
    expected = [cache.clone() for cache in caches]
    for cache in expected:
        for source, target in zip(sources, targets, strict=True):
            cache[target] = cache[source]
    with forced(path):
        copy_pages(caches, torch.tensor(sources, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64))
    assert all(torch.equal(*pair) for pair in zip(caches, expected, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    blocks, pages, ids = torch.zeros(2, 4, 1, 8), torch.zeros(3, 2, 1, 8), torch.arange(2)
    with pytest.raises(ValueError, match=r"2 pages of 2 rows do not hold rows 1\.\.6"):
        blocks_to_pages(blocks, ids, pages, ids, 1, 5)
    with pytest.raises(ValueError, match="other heads"):
        pages_to_blocks(pages, ids, blocks[..., :4], ids, 0, 1)
    with pytest.raises(ValueError, match=r"\(2,\) sources and \(3,\) targets"):
        copy_pages([pages], ids, torch.arange(3))
    with pytest.raises(ValueError, match="1 rows"):
        place_rows(torch.zeros(4, 8), ids, torch.zeros(2, 4, 8), torch.zeros(1, 2, dtype=torch.int32), ids, ids[:1])
