"""Routing is a pure function of the snapshot: live workers only, least load, and media that meet their cache again."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import NoWorker
from cluster.router import LOAD_FACTOR, WorkerView, choose_embedding, choose_language

LIVE = st.booleans()
VIEWS = st.lists(
    st.tuples(st.sampled_from(["embedding", "language"]), LIVE, st.integers(0, 40)), min_size=1, max_size=9
)


def _views(rows: list[tuple[str, bool, int]]) -> list[WorkerView]:
    return [
        WorkerView(name=f"{kind}-{i}", kind=kind, is_alive=is_alive, num_running=running)  # type: ignore[arg-type]
        for i, (kind, is_alive, running) in enumerate(rows)
    ]


def _embedding(loads: list[int]) -> list[WorkerView]:
    return _views([("embedding", True, load) for load in loads])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rows=VIEWS, key=st.text(max_size=8), excluded=st.sets(st.integers(0, 9)))
def test_only_live_workers_of_the_kind_that_are_not_excluded(
    rows: list[tuple[str, bool, int]], key: str, excluded: set[int]
) -> None:
    views = _views(rows)
    names = {views[i].name for i in excluded if i < len(views)}
    choices: dict[str, Callable[[], str]] = {
        "language": lambda: choose_language(views, names),
        "embedding": lambda: choose_embedding(views, key, names),
    }
    for kind, choose in choices.items():
        usable = {v.name: v.num_running for v in views if v.kind == kind and v.is_alive and v.name not in names}
        if not usable:
            with pytest.raises(NoWorker, match=f"{sum(v.kind == kind for v in views)} {kind} workers"):
                choose()
            continue
        chosen = choose()
        assert chosen in usable
        if kind == "language":
            assert usable[chosen] == min(usable.values())
        else:
            assert usable[chosen] < LOAD_FACTOR * (sum(usable.values()) + 1) / len(usable)


def test_the_order_of_the_snapshot_does_not_matter() -> None:
    views = _views([("language", True, 3), ("language", True, 1), ("language", True, 1), ("embedding", True, 0)] * 2)
    orders = list(itertools.islice(itertools.permutations(views), 200))
    assert {choose_language(order) for order in orders} == {"language-1"}
    assert len({choose_embedding(order, "an image") for order in orders}) == 1


def test_the_same_image_meets_the_same_worker_and_images_spread() -> None:
    views = _embedding([0] * 4)
    homes = {f"image {i}": choose_embedding(views, f"image {i}") for i in range(2000)}
    assert homes == {key: choose_embedding(views, key) for key in homes}
    counts = Counter(homes.values())
    assert len(counts) == 4
    assert all(400 < count < 600 for count in counts.values()), counts  # 500 each, five standard deviations are 97


def test_losing_a_worker_moves_only_its_images() -> None:
    views = _embedding([0] * 5)
    for key in (f"image {i}" for i in range(300)):
        home = choose_embedding(views, key)
        rest = [view for view in views if view.name != "embedding-2"]
        if home != "embedding-2":
            assert choose_embedding(rest, key) == home
        assert choose_embedding(views, key, {home}) != home


def test_a_worker_beyond_its_share_gives_way_to_the_next_in_line() -> None:
    idle = _embedding([0, 0, 0, 0])
    home = choose_embedding(idle, "popular")
    loads = [9 if view.name == home else 1 for view in idle]
    second = choose_embedding(_embedding(loads), "popular")
    assert second == choose_embedding(idle, "popular", {home}) != home
    even = _embedding([9, 9, 9, 9])
    assert choose_embedding(even, "popular") == home, "equal load is no reason to leave the cache"
