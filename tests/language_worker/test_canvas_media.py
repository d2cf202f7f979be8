"""A canvas whose prompt has images: it waits for all their rows, holds up nobody, and begins anew when they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from language_worker.diffusion_params import DiffusionParams
from language_worker.engine import Engine
from language_worker.sampling_params import SamplingParams
from tests.language_worker.helpers import Results, make_engine, request
from tests.oracles_llada import by_count, generate
from tests.tiny_llada_v import IMAGE_ID, Made, make_llada_v
from tests.tiny_models import random_image

LENGTH, BLOCK = 12, 6
PARAMS = SamplingParams(
    max_tokens=LENGTH,
    temperature=0,
    ignore_eos=True,
    diffusion=DiffusionParams(schedule="static", block_length=BLOCK, kv_policy="dual"),
)
IDS = (5, IMAGE_ID, 7, IMAGE_ID)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_llada_v(tmp_path_factory.mktemp("llada-v"), seed=6)


def expected(made: Made, images: Sequence[Image.Image]) -> list[int]:
    oracle, prompt = made.oracle(IDS, images)
    settings: dict[str, Any] = {"block_length": BLOCK, "kv_policy": "dual", "never": made.never_ids()}
    return generate(oracle, prompt, LENGTH, choose=lambda n: by_count(n, n), **settings).tokens


def announce(engine: Engine, rows: Sequence[torch.Tensor]) -> None:
    items = [{"grid": [1, 30 + i, 40], "rows": len(own)} for i, own in enumerate(rows)]
    engine.announce("a", sum(map(len, rows)), items)


def run(engine: Engine, results: Results) -> None:
    idle = 0
    while idle < 2:
        report = engine.step()
        results.take(report)
        engine.scheduler.check_invariants()
        idle = 0 if report.did_run else idle + 1


@pytest.mark.parametrize("tokens", [8192, 128])  # of the cache: room for all, and for one at a time
def test_it_waits_for_its_rows_and_others_go_on(made: Made, tokens: int) -> None:
    engine = make_engine(made.folder, kv_cache_tokens=tokens, page_size=8, max_model_len=128)
    pictures = [random_image(57, 90, seed=1), random_image(30, 30, seed=2)]
    rows = made.image_rows(pictures)
    results = Results()
    engine.submit(request("a", IDS, PARAMS, num_media=2))
    announce(engine, rows)
    run(engine, results)
    buffer, every = engine.media_buffer("a"), torch.cat(rows)
    assert buffer is not None
    buffer.write(0, every[:-1])
    engine.submit(request("b", (9, 10), PARAMS))
    run(engine, results)
    assert results["b"].done is not None and not results["a"].chunks
    assert engine.stats()["computed_tokens_total"] == results["b"].done.num_forwarded_tokens
    buffer.write(len(every) - 1, every[-1:])
    run(engine, results)
    assert results["a"].tokens() == expected(made, pictures)
    assert engine.stats()["kv_pages_referenced"] == 0


def test_rows_that_come_anew_make_another_answer(made: Made) -> None:
    engine = make_engine(made.folder, kv_cache_tokens=1024, page_size=8)
    old, new = ([random_image(57, 90, seed=seed), random_image(30, 30, seed=seed)] for seed in (1, 3))
    results = Results()
    engine.submit(request("a", IDS, PARAMS, num_media=2))
    for pictures in (old, new):
        rows = made.image_rows(pictures)
        announce(engine, rows)
        results.take(engine.step())
        buffer = engine.media_buffer("a")
        assert buffer is not None
        buffer.write(0, torch.cat(rows))
        if pictures is old:
            for _ in range(3):
                results.take(engine.step())
            assert not results["a"].chunks  # a block has begun, none is done
            engine.forget_media("a")
    run(engine, results)
    assert results["a"].tokens() == expected(made, new) != expected(made, old)
