"""Preemption that leaves KV in host memory: nothing is computed twice, no token shows it, and it is bounded.

Under any traffic, with planted bugs: `test_crowded_traffic.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from language_worker.config import EngineConfig
from language_worker.engine import Engine
from language_worker.errors import InvalidRequest
from language_worker.page_pool import PagePool
from language_worker.swap_space import Swapped, SwapSpace
from tests.language_worker.helpers import GREEDY, drive, make_engine, prompt, request
from tests.tiny_text_models import make_text_model
from tests.tiny_tokenizer import NUM_TOKENS

LONG = dataclasses.replace(GREEDY, max_tokens=40, temperature=0.8, seed=3)
ASKED = [request(f"r{i}", prompt(10 + 7 * i, seed=i, vocab=NUM_TOKENS), LONG) for i in range(6)]
SHORT = {"kv_cache_tokens": 160, "max_model_len": 120, "page_size": 4, "prefix_cache": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("swap"), "qwen3", seed=2)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[list[int]]:
    """Tokens of each request in an engine of its own."""
    return [drive(make_engine(folder), [one])[one.request_id].tokens() for one in ASKED]


def _run(engine: Engine) -> list[list[int]]:
    results = drive(engine, ASKED)
    return [results[one.request_id].tokens() for one in ASKED]


def test_nothing_is_computed_twice(folder: Path, alone: list[list[int]]) -> None:
    ample = make_engine(folder, prefix_cache=False)
    recomputing, swapping = make_engine(folder, **SHORT), make_engine(folder, **SHORT, preemption="swap")
    assert _run(ample) == _run(recomputing) == _run(swapping) == alone
    least, more, same = (e.stats()["computed_tokens_total"] for e in (ample, recomputing, swapping))
    assert same == least < more
    stats = swapping.stats()
    assert stats["num_preemptions_total"] > 0 and stats["kv_pages_swapped"] == 0 == stats["kv_pages_referenced"]
    assert stats["kv_pages_swapped_in_total"] == stats["kv_pages_swapped_out_total"] > 0
    assert recomputing.stats()["kv_pages_swapped_out_total"] == 0


@pytest.mark.parametrize(
    "change", [{"decode_strategy": "speculative"}, {"max_prefill_chunk": 5}, {"prefix_cache": True}]
)
def test_no_token_shows_it(folder: Path, alone: list[list[int]], change: dict[str, Any]) -> None:
    engine = make_engine(folder, **SHORT | change, preemption="swap")
    assert _run(engine) == alone and engine.stats()["kv_pages_swapped_out_total"] > 0


def test_a_draft_models_pages_go_along(folder: Path) -> None:
    """Drafts of the model itself are all right, wherever its pages have been."""
    settings = {**SHORT, "draft_model": str(folder), "kv_cache_tokens": 200, "num_draft_tokens": 3}
    engine = make_engine(folder, **settings, preemption="swap")
    greedy = [dataclasses.replace(one, sampling=dataclasses.replace(LONG, temperature=0.0)) for one in ASKED]
    drive(engine, greedy)
    stats = engine.stats()
    assert stats["kv_pages_swapped_out_total"] > 0
    assert stats["spec_decode_num_accepted_tokens_total"] == stats["spec_decode_num_draft_tokens_total"] > 0


def test_host_memory_is_bounded(folder: Path, alone: list[list[int]]) -> None:
    """What finds no room is computed again."""
    engine = make_engine(folder, **SHORT, preemption="swap", swap_tokens=60)
    assert engine.runner.host is not None and engine.runner.host.num_pages == 15
    most = []
    results = drive(engine, ASKED, on_step=lambda: most.append(engine.stats()["kv_pages_swapped"]))
    assert [results[one.request_id].tokens() for one in ASKED] == alone
    assert 0 < max(most) <= 15 and engine.stats()["kv_pages_swapped"] == 0


def test_what_is_cancelled_while_it_waits_keeps_nothing(folder: Path) -> None:
    engine = make_engine(folder, **SHORT, preemption="swap")
    for one in ASKED:
        engine.submit(one)
    while not engine.stats()["kv_pages_swapped"]:
        engine.step()
    for one in ASKED:
        engine.cancel(one.request_id)
    engine.step()
    assert engine.stats()["kv_pages_swapped"] == 0 == engine.stats()["kv_pages_referenced"]


def test_the_ledger() -> None:
    space, cache = SwapSpace(4), PagePool(8)
    pages = cache.allocate(3, "a")
    assert space.put((1, 0), pages, first_page=2, num_tokens=18)
    assert not space.put((2, 0), cache.allocate(2, "b"), first_page=0, num_tokens=7), "one page is free"
    assert not space.put((3, 0), [], first_page=0, num_tokens=0), "nothing to keep"
    assert space.take_moves().outs == ((0, 0), (1, 1), (2, 2)) and space.num_in_use == 3
    space.fetch((1, 0), [7, 6])
    assert space.find((1, 0)) == Swapped(num_tokens=18, first_page=2, pages=(0, 1, 2))
    assert space.num_in_use == 3, "its pages are read after everybody else's have come out"
    assert space.take_moves().ins == ((1, 7), (2, 6)) and space.num_in_use == 0 and space.find((1, 0)) is None
    space.drop((9, 9))
    space.check_invariants([])


@pytest.mark.parametrize(
    ("values", "word"),
    [({"preemption": "drop"}, "recompute, swap"), ({"swap_tokens": 9}, "swap_tokens"), ({"swap_tokens": -1}, "swap")],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidRequest, match=word):
        EngineConfig(**values)
