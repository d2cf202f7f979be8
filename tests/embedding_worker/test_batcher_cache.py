"""The patch batcher and the embedding cache against plain models of themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_worker.batcher import PatchBatcher
from embedding_worker.cache import CachedMedium, EmbeddingCache


@settings(max_examples=200, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 40), max_size=30), budget=st.integers(1, 50))
def test_every_item_leaves_once_within_budget_oldest_first(sizes: list[int], budget: int) -> None:
    batcher: PatchBatcher[int] = PatchBatcher(budget)
    for key, size in enumerate(sizes):
        batcher.add(key, size)
    left = list(range(len(sizes)))
    while left:
        assert batcher.num_patches == sum(sizes[key] for key in left)
        batch = batcher.next_batch()
        assert batch[0] == left[0], "the oldest is always served"
        total = sum(sizes[key] for key in batch)
        assert total <= budget or len(batch) == 1
        assert list(batch) == sorted(batch)
        left = [key for key in left if key not in batch]
        assert len(batcher) == len(left)
        assert all(sizes[key] > budget - total for key in left) or total >= budget, "nothing that fits stays behind"
    assert batcher.next_batch() == ()


def test_an_item_cannot_wait_twice_or_be_empty() -> None:
    batcher: PatchBatcher[str] = PatchBatcher(8)
    batcher.add("a", 3)
    for key, size in (("a", 1), ("b", 0)):
        with pytest.raises(ValueError, match="waits already or is empty"):
            batcher.add(key, size)
    assert batcher.next_batch() == ("a",)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    capacity=st.sampled_from([0, 3, 5, 8]),
    steps=st.lists(st.tuples(st.booleans(), st.sampled_from("abcd"), st.sampled_from([1, 2, 3, 14])), max_size=60),
)
def test_cache_is_least_recently_used_by_rows(capacity: int, steps: list[tuple[bool, str, int]]) -> None:
    cache, model = EmbeddingCache(capacity), list[tuple[str, int]]()
    for is_put, key, rows in steps:
        held = dict(model)
        if is_put:
            cache.put(key, CachedMedium(rows=torch.full((rows, 2), float(rows)), grid=(1, 2, 2 * rows)))
            model = [entry for entry in model if entry[0] != key]
            if rows <= capacity:
                model.append((key, rows))
            while sum(size for _, size in model) > capacity:
                model.pop(0)
        else:
            found = cache.get(key)
            assert (found.rows.shape[0] if found else None) == held.get(key)
            model.sort(key=lambda entry: entry[0] == key)
        assert cache.num_rows == sum(size for _, size in model) <= capacity
        assert len(cache) == len(model)


def test_what_was_asked_for_outlives_what_was_not() -> None:
    cache = EmbeddingCache(2)
    one_row = CachedMedium(rows=torch.zeros(1, 2), grid=(1, 2, 2))
    cache.put("old", one_row)
    cache.put("unused", one_row)
    assert cache.get("old") is one_row
    cache.put("new", one_row)
    assert (cache.get("old"), cache.get("unused"), cache.get("new")) == (one_row, None, one_row)
