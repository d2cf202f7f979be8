"""Placeholder expansion, the input budget, and M-RoPE positions against transformers."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from language_worker.errors import MediaMismatch, MediaTooLarge
from language_worker.media import InputBudget, MediaItem, expand_prompt
from language_worker.models.mrope import mrope_positions
from tests.tiny_models import reference

PAD = 9


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pieces=st.lists(st.lists(st.integers(0, 8), max_size=4), min_size=1, max_size=5), rows=st.data())
def test_expansion(pieces: list[list[int]], rows: st.DataObject) -> None:
    counts = [rows.draw(st.integers(1, 6)) for _ in pieces[1:]]
    ids = list(itertools.chain(pieces[0], *([PAD, *piece] for piece in pieces[1:])))
    items = [MediaItem(grid=(1, 2, 2 * n), rows=n) for n in counts]
    expanded = expand_prompt(ids, PAD, items)
    assert list(expanded.token_ids) == list(
        itertools.chain(pieces[0], *([PAD] * n + piece for n, piece in zip(counts, pieces[1:], strict=True)))
    )
    assert list(expanded.media_positions) == [i for i, t in enumerate(expanded.token_ids) if t == PAD]
    covered = [i for start, n in zip(expanded.starts, counts, strict=True) for i in range(start, start + n)]
    assert covered == list(expanded.media_positions)


@pytest.mark.parametrize(("ids", "count"), [([PAD], 0), ([1], 1), ([PAD, PAD], 1)])
def test_counts_must_agree(ids: list[int], count: int) -> None:
    with pytest.raises(MediaMismatch, match=str(len(ids) if ids[0] == PAD else 0)):
        expand_prompt(ids, PAD, [MediaItem(grid=(1, 2, 2), rows=1)] * count)


def test_a_text_model_has_no_placeholders() -> None:
    assert expand_prompt([1, PAD], None, []).token_ids == (1, PAD)


def test_budget_is_whole_and_oldest_first() -> None:
    budget = InputBudget(10)
    budget.request(3, 4)
    budget.request(1, 7)
    budget.request(2, 5)
    assert budget.grant() == [1]
    budget.release(2)
    assert budget.grant() == [] and budget.num_reserved == 7
    budget.release(1)
    assert budget.grant() == [3]
    budget.release(99)
    with pytest.raises(MediaTooLarge, match="11"):
        budget.request(4, 11)
    budget.request(5, 6)
    assert budget.grant() == [5] and budget.num_reserved == 10


GRID = st.tuples(st.just(1), st.integers(1, 6).map(lambda n: 2 * n), st.integers(1, 6).map(lambda n: 2 * n))


@pytest.fixture(scope="module")
def theirs(tiny: Path):
    return reference(tiny).model


@settings(max_examples=80, deadline=None, derandomize=True)
@given(grids=st.lists(GRID, max_size=4), gaps=st.lists(st.integers(1, 5), min_size=5, max_size=5))
def test_mrope_positions_equal_transformers(grids: list, gaps: list[int], theirs) -> None:
    kinds, media = [0] * gaps[0], []
    for grid, gap in zip(grids, gaps[1:], strict=False):
        media.append((len(kinds), (grid[0], grid[1] // 2, grid[2] // 2)))
        kinds += [1] * (grid[1] * grid[2] // 4) + [0] * gap
    ids = torch.zeros(1, len(kinds), dtype=torch.long)
    expected, delta = theirs.get_rope_index(
        ids, mm_token_type_ids=torch.tensor([kinds]), image_grid_thw=torch.tensor(grids) if grids else None
    )
    ours = mrope_positions(len(kinds), media)
    assert torch.equal(ours.ids, expected[:, 0])
    assert ours.delta == int(delta.flatten()[0])


def test_adjacent_items_each_have_their_own_grid() -> None:
    ours = mrope_positions(6, [(0, (1, 1, 2)), (2, (1, 2, 2))])
    assert ours.ids.tolist() == [[0, 0, 2, 2, 2, 2], [0, 0, 2, 2, 3, 3], [0, 1, 2, 3, 2, 3]]
    assert ours.delta == 4 - 6


@pytest.mark.parametrize("media", [[(0, (1, 2, 2)), (3, (1, 1, 1))], [(4, (1, 2, 2))]])
def test_overlapping_or_overlong_items_are_refused(media: list) -> None:
    with pytest.raises(ValueError, match="media item"):
        mrope_positions(6, media)
