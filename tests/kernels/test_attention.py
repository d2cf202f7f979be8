"""Segment and paged attention against a query-by-query float64 oracle; pages that nobody owns are full of NaN."""

from __future__ import annotations

import dataclasses
import random
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention_mask import AttentionMask
from kernels.dispatch import Path, forced, twin
from kernels.paged_attention import AttentionBatch, paged_attention
from kernels.pages import copy_pages, write_pages
from kernels.varlen_attention import Segments, varlen_attention
from tests import oracles
from tests.kernels.paths import WITH_NATIVE, paths, with_native
from tests.profiles import IS_SOAK
from tests.tolerances import assert_matches

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _draw(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _triton() -> ModuleType:
    """The Triton path's module as ops get it, which on a GPU is one that moves tensors there."""
    with forced("triton"):
        found = twin("paged_attention", torch.empty(0))
    assert found is not None
    return found


@settings(max_examples=300 if IS_SOAK else 24, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 4, 4, 4, 7, 16, 23]), min_size=1, max_size=12),
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([1, 4, 20, 33]),
    dtype=st.sampled_from(DTYPES),
    path=paths,
)
def test_segments_attend_within_themselves(
    lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype, path: Path
) -> None:
    qkv = _draw(0, sum(lengths), 3, heads, head_dim, dtype=dtype)
    q, k, v = qkv.unbind(1)
    with forced(path):
        actual = varlen_attention(q, k, v, Segments.from_lengths(lengths))
        assert_matches(actual, oracles.segment_attention(q, k, v, lengths), reduced=4)
        bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        assert torch.equal(actual, varlen_attention(q, k, v, bounds))
        assert torch.equal(actual, varlen_attention(q, k, v, torch.tensor(bounds, dtype=torch.int32)))


@settings(max_examples=200 if IS_SOAK else 16, deadline=None, derandomize=True)
@given(
    segments=st.lists(st.sampled_from([(2, 1), (4, 0), (4, 1), (4, 1), (23, 5), (40, 1)]), min_size=1, max_size=8),
    head_dim=st.sampled_from([4, 33]),
    dtype=st.sampled_from(DTYPES),
    path=paths,
)
def test_the_end_of_a_segment_may_be_unseen(
    segments: list[tuple[int, int]], head_dim: int, dtype: torch.dtype, path: Path
) -> None:
    """Tokens that nobody attends to attend as if they stood among the others, and change no answer of those."""
    lengths, num_unseen = zip(*segments, strict=True)
    q, k, v = _draw(0, sum(lengths), 3, 2, head_dim, dtype=dtype).unbind(1)
    with forced(path):
        actual = varlen_attention(q, k, v, Segments.from_lengths(lengths, num_unseen))
    assert_matches(actual, oracles.segment_attention(q, k, v, lengths, num_unseen), reduced=4)


def test_segments_that_do_not_cover_the_tokens_are_refused() -> None:
    x = torch.zeros(5, 1, 4)
    for bounds, message in (([0, 3], "cover 3 tokens"), ([1, 5], "begin with 0"), ([0, 5, 5], "must not be empty")):
        with pytest.raises(ValueError, match=message):
            varlen_attention(x, x, x, bounds)
    for num_unseen in ([2, 0], [-1, 0]):
        with pytest.raises(ValueError, match="of which unseen"):
            Segments.from_lengths([2, 3], num_unseen)


@dataclasses.dataclass
class _Cache:
    """A cache of NaN whose pages are handed out in a random order, and the plain history of every sequence."""

    page_size: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    histories: list[tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=list)

    def fill(self, kv_lens: list[int], seed: int, neighbours: bool) -> None:
        counts = [-(-length // self.page_size) for length in kv_lens]
        num_pages = sum(counts) + 3
        ids = list(range(1, num_pages))
        if not neighbours:
            random.Random(seed).shuffle(ids)
        shape = (num_pages, self.page_size, self.kv_heads, self.head_dim)
        self.k, self.v = (torch.full(shape, float("nan"), dtype=self.dtype) for _ in range(2))
        self.table = torch.full((len(kv_lens), max(counts) + 2), num_pages - 1, dtype=torch.int32)
        for row, (length, count) in enumerate(zip(kv_lens, counts, strict=True)):
            self.table[row, :count] = torch.tensor([ids.pop(0) for _ in range(count)])
            k, v = (_draw(seed + 7 * row + i, length, self.kv_heads, self.head_dim, dtype=self.dtype) for i in (0, 1))
            self.histories.append((k, v))
            places = range(length)
            slots = [int(self.table[row, p // self.page_size]) * self.page_size + p % self.page_size for p in places]
            write_pages(self.k, self.v, k, v, torch.tensor(slots))


@st.composite
def _steps(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    query_lens, kv_lens = [], []
    for _ in range(draw(st.integers(1, 6))):
        query = draw(st.sampled_from([1, 1, 1, 2, 5, 16, 17, 40]))
        query_lens.append(query)
        kv_lens.append(query + draw(st.sampled_from([0, 0, 1, 3, 30, 64, 150])))
    return query_lens, kv_lens


@settings(max_examples=400 if IS_SOAK else 30, deadline=None, derandomize=True)
@given(
    step=_steps(),
    heads=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 7, 9])),
    head_dim=st.sampled_from([4, 16, 24]),
    page_size=st.sampled_from([1, 4, 16, 32]),
    neighbours=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    path=with_native,
)
def test_paged_attention(
    step: tuple[list[int], list[int]],
    heads: tuple[int, int],
    head_dim: int,
    page_size: int,
    neighbours: bool,
    dtype: torch.dtype,
    seed: int,
    path: Path,
) -> None:
    query_lens, kv_lens = step
    kv_heads, group = heads
    cache = _Cache(page_size=page_size, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    cache.fill(kv_lens, seed, neighbours)
    q = _draw(seed, sum(query_lens), kv_heads * group, head_dim, dtype=dtype)
    starts = [sum(query_lens[:i]) for i in range(len(query_lens))]
    batch = AttentionBatch(page_table=cache.table, query_lens=query_lens, kv_lens=kv_lens, query_start=starts)
    with forced(path):
        actual = paged_attention(q, cache.k, cache.v, batch)
        again = paged_attention(q, cache.k, cache.v, batch)
    assert torch.equal(actual, again), "a batch serves every layer of a step"
    for start, length, (k, v) in zip(starts, query_lens, cache.histories, strict=True):
        window = slice(start, start + length)
        assert_matches(actual[window], oracles.attention(q[window], k, v, causal_end=True), reduced=4)


@pytest.mark.parametrize("path", WITH_NATIVE)
def test_rows_may_lie_in_any_order_and_scale_is_honoured(path: Path) -> None:
    cache = _Cache(page_size=4, kv_heads=1, head_dim=8, dtype=torch.float32)
    cache.fill([9, 20, 9], seed=1, neighbours=False)
    q = _draw(5, 3 + 20, 2, 8, dtype=torch.float32)
    batch = AttentionBatch(page_table=cache.table, query_lens=[1, 20, 1], kv_lens=[9, 20, 9], query_start=[22, 1, 0])
    with forced(path):
        actual = paged_attention(q[:23], cache.k, cache.v, batch, 0.25)
    for rows, (k, v) in zip((slice(22, 23), slice(1, 21), slice(0, 1)), cache.histories, strict=True):
        assert_matches(actual[rows], oracles.attention(q[rows], k, v, scale=0.25, causal_end=True), reduced=4)


def test_copies_read_every_source_before_a_target_is_written() -> None:
    k, v = (torch.randn(6, 4, 2, 3, generator=torch.Generator().manual_seed(i)) for i in range(2))
    before = k.clone(), v.clone()
    copy_pages(k, v, torch.tensor([1, 2, 1]), torch.tensor([2, 3, 5]))
    for cache, old in zip((k, v), before, strict=True):
        assert torch.equal(cache, old[[0, 1, 1, 2, 4, 1]])


def _sees(mask: AttentionMask, query: int, key: int) -> bool:
    """The rule of AttentionMask, in words."""
    in_block = mask.block_length == 0 or key // mask.block_length <= query // mask.block_length
    return in_block and (mask.window == 0 or abs(query - key) < mask.window)


@settings(max_examples=400 if IS_SOAK else 16, deadline=None, derandomize=True)
@given(
    step=_steps(),
    mask=st.builds(
        AttentionMask, block_length=st.sampled_from([0, 1, 3, 8, 32]), window=st.sampled_from([0, 0, 1, 5, 64])
    ),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    num_splits=st.sampled_from([1, 2, 5]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    path=with_native,
)
def test_masks_soft_caps_and_log_sum_exps(
    step: tuple[list[int], list[int]],
    mask: AttentionMask,
    softcap: float | None,
    num_splits: int,
    dtype: torch.dtype,
    seed: int,
    path: Path,
) -> None:
    query_lens, kv_lens = step
    cache = _Cache(page_size=16, kv_heads=2, head_dim=20, dtype=dtype)
    cache.fill(kv_lens, seed, neighbours=False)
    q = _draw(seed, sum(query_lens), 6, 20, dtype=dtype)
    starts = [sum(query_lens[:i]) for i in range(len(query_lens))]
    batch = AttentionBatch(page_table=cache.table, query_lens=query_lens, kv_lens=kv_lens, query_start=starts)
    lse = torch.full((q.shape[0], 6), float("nan"))
    with forced(path):
        if path == "triton":
            triton = _triton()
            actual = triton.paged_attention(
                q, cache.k, cache.v, *batch.tiles(triton, q, 16, 3), None, mask=mask, softcap=softcap, lse=lse,
                num_splits=num_splits,
            )  # fmt: skip
        else:
            actual = paged_attention(q, cache.k, cache.v, batch, mask=mask, softcap=softcap, lse=lse)
    for start, length, kv_len, (k, v) in zip(starts, query_lens, kv_lens, cache.histories, strict=True):
        rows, first = slice(start, start + length), kv_len - length
        expected, expected_lse = oracles.masked_attention(
            q[rows], k, v, sees=lambda i, j, first=first: _sees(mask, first + i, j), softcap=softcap
        )
        assert_matches(actual[rows], expected, reduced=4)
        assert_matches(lse[rows], expected_lse, reduced=16 if dtype == torch.float32 else 10**6)


@settings(max_examples=300 if IS_SOAK else 12, deadline=None, derandomize=True)
@given(
    step=_steps(),
    windows=st.lists(st.sampled_from([1, 2, 5, 17, 40, 129, 1000]), min_size=1, max_size=2, unique=True),
    neighbours=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    path=with_native,
    seed=st.integers(0, 99),
)
def test_sliding_windows_and_whole_ones_over_one_batch(
    step: tuple[list[int], list[int]], windows: list[int], neighbours: bool, dtype: torch.dtype, path: Path, seed: int
) -> None:
    """As the layers of a model take turns: each size of a window, and no window, from the same batch."""
    query_lens, kv_lens = step
    cache = _Cache(page_size=16, kv_heads=2, head_dim=20, dtype=dtype)
    cache.fill(kv_lens, seed, neighbours=neighbours)
    q = _draw(seed, sum(query_lens), 6, 20, dtype=dtype)
    starts = [sum(query_lens[:i]) for i in range(len(query_lens))]
    batch = AttentionBatch(page_table=cache.table, query_lens=query_lens, kv_lens=kv_lens, query_start=starts)
    for window in [*windows, 0, windows[0]]:
        mask = AttentionMask(window=window)
        with forced(path):
            actual = paged_attention(q, cache.k, cache.v, batch, mask=mask)
        for start, length, kv_len, (k, v) in zip(starts, query_lens, kv_lens, cache.histories, strict=True):
            rows, first = slice(start, start + length), kv_len - length
            expected, _ = oracles.masked_attention(
                q[rows], k, v, sees=lambda i, j, first=first, mask=mask: _sees(mask, first + i, j), softcap=None
            )
            assert_matches(actual[rows], expected, reduced=4)


@pytest.mark.parametrize("path", WITH_NATIVE)
def test_layers_of_other_head_counts_share_a_batch(path: Path) -> None:
    """Where a tile holds fewer queries, and a mask has more rows, what was planned for other heads must not be used."""
    cache = _Cache(page_size=4, kv_heads=1, head_dim=8, dtype=torch.float32)
    cache.fill([30, 21], seed=1, neighbours=False)
    batch = AttentionBatch(page_table=cache.table, query_lens=[12, 7], kv_lens=[30, 21], query_start=[0, 12])
    for heads in (1, 4, 2, 1):
        q = _draw(heads, 19, heads, 8, dtype=torch.float32)
        with forced(path):
            actual = paged_attention(q, cache.k, cache.v, batch)
        for rows, (k, v) in zip((slice(0, 12), slice(12, 19)), cache.histories, strict=True):
            assert_matches(actual[rows], oracles.attention(q[rows], k, v, causal_end=True), reduced=4)


@pytest.mark.parametrize("path", WITH_NATIVE)
def test_a_window_of_one_sees_itself_alone(path: Path) -> None:
    cache = _Cache(page_size=4, kv_heads=1, head_dim=8, dtype=torch.float32)
    cache.fill([5], seed=1, neighbours=True)
    q, lse = _draw(0, 5, 1, 8, dtype=torch.float32), torch.zeros(5, 1)
    batch = AttentionBatch(page_table=cache.table, query_lens=[5], kv_lens=[5], query_start=[0])
    with forced(path):
        seen = paged_attention(q, cache.k, cache.v, batch, mask=AttentionMask(block_length=1, window=1), lse=lse)
    assert_matches(seen, cache.histories[0][1].double())  # each sees itself alone
    assert lse.isfinite().all()


def test_masks_of_negative_numbers_are_refused() -> None:
    for wrong in ({"block_length": -1}, {"window": -2}):
        with pytest.raises(ValueError, match="negative"):
            AttentionMask(**wrong)


@pytest.mark.parametrize("num_splits", [2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_shared_among_programs_give_the_same_answer(num_splits: int, dtype: torch.dtype) -> None:
    triton = _triton()
    query_lens, kv_lens, heads_per_key = [1, 1, 3, 20], [1, 333, 64, 129], 7
    cache = _Cache(page_size=16, kv_heads=2, head_dim=48, dtype=dtype)
    cache.fill(kv_lens, seed=2, neighbours=False)
    q = _draw(4, sum(query_lens), 2 * heads_per_key, 48, dtype=dtype)
    starts = [sum(query_lens[:i]) for i in range(len(query_lens))]
    shape = triton.shape_for(heads_per_key, 48, 20, q.element_size())
    tiles = triton.plan(cache.table, query_lens, kv_lens, starts, shape, heads_per_key, q.device)
    actual = triton.paged_attention(q, cache.k, cache.v, tiles, shape, None, num_splits=num_splits)
    for start, length, (k, v) in zip(starts, query_lens, cache.histories, strict=True):
        window = slice(start, start + length)
        assert_matches(actual[window], oracles.attention(q[window], k, v, causal_end=True), reduced=4)


@pytest.mark.parametrize("path", WITH_NATIVE)
def test_written_pages_hold_the_rows_and_nothing_else_changes(path: Path) -> None:
    cache = _Cache(page_size=4, kv_heads=2, head_dim=3, dtype=torch.float32)
    with forced(path):
        cache.fill([6, 3, 4], seed=3, neighbours=False)
    for row, (k, v) in enumerate(cache.histories):
        pages = cache.table[row].tolist()
        assert torch.equal(oracles.gather_pages(cache.k, pages, k.shape[0]), k)
        assert torch.equal(oracles.gather_pages(cache.v, pages, v.shape[0]), v)
    assert int(cache.k.isfinite().sum()) == int(cache.v.isfinite().sum()) == (6 + 3 + 4) * 2 * 3


@pytest.mark.parametrize(
    ("query_lens", "kv_lens", "message"),
    [([3], [2], "asks 3 positions of 2"), ([0], [2], "asks 0"), ([1], [99], "holds 8"), ([1, 1], [2, 2], "differ")],
)
def test_inconsistent_batches_are_refused(query_lens: list[int], kv_lens: list[int], message: str) -> None:
    batch = AttentionBatch(
        page_table=torch.zeros(1, 2, dtype=torch.int32), query_lens=query_lens, kv_lens=kv_lens, query_start=[0]
    )
    with pytest.raises(ValueError, match=message):
        paged_attention(torch.zeros(3, 1, 4), torch.zeros(2, 4, 1, 4), torch.zeros(2, 4, 1, 4), batch)
