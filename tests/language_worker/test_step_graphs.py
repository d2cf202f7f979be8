"""Steps that are recorded and replayed, on a pretended GPU that hears nothing of the host while it replays."""

from __future__ import annotations

import logging
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from kernels.recorded_batch import RecordedBatch
from language_worker import step_graphs
from language_worker.diffusion_params import DiffusionParams
from language_worker.engine import Engine
from language_worker.sampling_params import SamplingParams
from language_worker.step_graphs import BATCH_SIZES, StepGraphs, num_spare_pages
from tests.language_worker.helpers import Results, drive, make_engine, prompt, request
from tests.pretended_cuda import DEVICE, inner, pretended_cuda
from tests.tiny_llada import make_llada
from tests.tiny_text_models import make_text_model


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are recorded when they are first asked for, so that short answers meet many graphs."""
    monkeypatch.setattr(StepGraphs, "_is_first", lambda graphs, kind: False)


def graphs_of(engine: Engine) -> StepGraphs:
    graphs = engine.runner.graphs
    assert graphs is not None
    return graphs


def test_requests_that_come_and_go_get_the_tokens_of_the_cpu(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through many batch sizes, with rows of padding, bounds that grow, and pages that change hands."""
    monkeypatch.setattr(step_graphs, "SHORTEST_BOUND", 16)
    rng = random.Random(5)
    arrivals = [
        (
            rng.choice([0, 0, 6]),
            request(
                f"r{i}",
                prompt(rng.randrange(2, 30), seed=i),
                SamplingParams(
                    temperature=rng.choice([0, 0.8]), seed=i, max_tokens=rng.randrange(4, 12), ignore_eos=True
                ),
            ),
        )
        for i in range(10)
    ]
    config = {"page_size": 4, "kv_cache_tokens": 240, "max_model_len": 80, "max_num_seqs": 9}
    expected = drive(make_engine(tiny, **config), [asked for _, asked in arrivals])
    with pretended_cuda():
        engine, results = make_engine(tiny, device=str(DEVICE), **config), Results()
        step = idle = 0
        while idle < 2 or step < 8:
            for due, asked in arrivals:
                if due == step:
                    engine.submit(asked)
            report = engine.step()
            results.take(report)
            engine.scheduler.check_invariants()
            step, idle = step + 1, 0 if report.did_run else idle + 1
        graphs = graphs_of(engine)
        assert graphs.num_replays > 5
        rungs = {rung for rung, _, _ in graphs._recorded}
        assert len(rungs) > 1
        assert rungs <= set(BATCH_SIZES)
        assert len({bound for _, _, bound in graphs._recorded}) > 1
    assert {name: result.tokens() for name, result in results.items()} == {
        name: result.tokens() for name, result in expected.items()
    }


def test_graphs_are_bounded_and_share_their_logits(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many shapes come: the one that was not used for longest goes."""
    monkeypatch.setattr(step_graphs, "SHORTEST_BOUND", 8)
    monkeypatch.setattr(step_graphs, "MOST_GRAPHS", 2)
    lasting = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (9, 4, 4, 6, 6)]
    asked = [request(f"r{i}", prompt(4, seed=i), sampling) for i, sampling in enumerate(lasting)]
    expected = drive(make_engine(tiny, page_size=4), asked)
    with pretended_cuda():
        engine = make_engine(tiny, device=str(DEVICE), page_size=4)
        recorded, sizes, graphs = graphs_of(engine)._recorded, set[int](), set[tuple[int, int, int]]()

        def look() -> None:
            sizes.add(len(recorded))
            graphs.update(recorded)

        results = drive(engine, asked, on_step=look)
        assert len(graphs) > 3 and max(sizes) == 2
        places = {inner(one.logits).untyped_storage().data_ptr() for one in recorded.values()}
        assert len(places) == 1
    for name, result in results.items():
        assert result.tokens() == expected[name].tokens()


def test_padding_touches_no_page_that_a_sequence_may_have(tiny: Path) -> None:
    """Three sequences on a rung of four: free pages keep what they hold, which no sequence reads either."""
    asked = [request(f"r{i}", prompt(5, seed=i)) for i in range(3)]
    expected = drive(make_engine(tiny, page_size=4), asked)
    with pretended_cuda():
        engine = make_engine(tiny, device=str(DEVICE), page_size=4, kv_cache_tokens=256, max_model_len=128)
        for keys, values in engine.runner.cache.layers:
            keys.fill_(torch.nan)
            values.fill_(torch.nan)
        results = drive(engine, asked)
        assert {rung for rung, _, _ in graphs_of(engine)._recorded} >= {4}
        for name, result in results.items():
            assert result.tokens() == expected[name].tokens()
        num_used = 3 * -(-(5 + 12) // 4)
        for keys, _ in engine.runner.cache.layers:
            free = keys[num_used : engine.runner.cache.num_pages]
            assert bool(free.isnan().all())
            spare = keys[engine.runner.cache.num_pages :]
            assert len(spare) == num_spare_pages(4) == 64
            assert not bool(spare.flatten(0, 1)[3].isnan().any())  # the fourth row's


@pytest.mark.parametrize("family", ["mistral", "qwen3_moe"])
def test_windows_and_mixtures_are_recorded_too(family: str, tmp_path: Path) -> None:
    make_text_model(tmp_path, family, seed=4)
    short = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    asked = [request(f"r{i}", prompt(4 + 9 * i, seed=i), short) for i in range(3)]
    expected = drive(make_engine(tmp_path, page_size=4), asked)
    with pretended_cuda():
        engine = make_engine(tmp_path, device=str(DEVICE), page_size=4)
        results = drive(engine, asked)
        assert graphs_of(engine).num_replays > 3
    for name, result in results.items():
        assert result.tokens() == expected[name].tokens()


@pytest.mark.parametrize("config", [{"cuda_graphs": False}, {"kv_cache_dtype": "int8"}])
def test_what_is_not_recorded_runs_as_ever(config: dict[str, Any], tiny: Path) -> None:
    with pretended_cuda():
        engine = make_engine(tiny, device=str(DEVICE), **config)
        assert engine.runner.graphs is None
        assert drive(engine, [request("a", prompt(5))])["a"].error is None
    assert make_engine(tiny).runner.graphs is None


def test_a_machine_that_cannot_record_says_so_once(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = drive(make_engine(tiny), [request("a", prompt(5))])["a"].tokens()
    with pretended_cuda(), mock.patch.object(torch.cuda, "graph", side_effect=RuntimeError("out of graphs")):
        engine = make_engine(tiny, device=str(DEVICE))
        with caplog.at_level(logging.WARNING):
            assert drive(engine, [request("a", prompt(5))])["a"].tokens() == expected
        assert graphs_of(engine).num_replays == 0
    assert [record.message for record in caplog.records if "out of graphs" in record.message] != []
    assert sum("not recorded" in record.message for record in caplog.records) == 1


def test_steps_that_are_recorded_stay_so_when_another_cannot_be(tiny: Path) -> None:
    with pretended_cuda():
        engine = make_engine(tiny, device=str(DEVICE))
        graphs = graphs_of(engine)
        drive(engine, [request("a", prompt(5))])
        before = graphs.num_replays
        with mock.patch.object(torch.cuda, "graph", side_effect=RuntimeError("out of memory")):
            drive(engine, [request(f"b{i}", prompt(5, seed=i)) for i in range(2)])
            assert graphs.num_replays == before
        drive(engine, [request("c", prompt(5))])
        assert graphs.num_replays == 2 * before > 0


def test_a_recorded_step_refuses_paths_that_read_lengths_on_the_host() -> None:
    batch = RecordedBatch(torch.zeros(2, 5, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32), 48)
    with pytest.raises(RuntimeError, match="Triton"):
        batch.prepare(page_size=16, heads_per_key=1, dtype=torch.float32, device=torch.device("cpu"))


def test_windows_that_do_not_fit_a_tile_are_not_recorded() -> None:
    from kernels._triton import paged_attention as triton

    q = torch.zeros(2, 4, 64)
    for length, fits in ((1, True), (16, True), (17, False)):  # float32 tiles have 16 rows
        batch = RecordedBatch(torch.zeros(1, 5, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int32), 48, length)
        with nullcontext() if fits else pytest.raises(RuntimeError, match="do not fit a tile"):
            tiles, _ = batch.tiles(triton, q, 16, 1)
            assert tiles.block_q == length


def test_drafts_and_blocks_of_masks_are_recorded_too(tiny: Path, tmp_path: Path) -> None:
    """Verified drafts beside sequences of as many; blocks of two canvases, which see all keys."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, allowed_token_ids=(5,))  # again and again
    drafts = [request("a", (5, 6, 7, 5, 5, 5), params)]
    config = {"decode_strategy": "speculative", "num_draft_tokens": 3}
    make_llada(tmp_path, seed=2)
    block = DiffusionParams(block_length=4, kv_policy="dual")
    params = SamplingParams(max_tokens=12, temperature=0, diffusion=block)
    masks = [request(f"r{i}", prompt(9 + 5 * i, seed=i, vocab=20), params) for i in range(2)]
    for folder, asked, options, length in ((tiny, drafts, config, 4), (tmp_path, masks, {}, 4)):
        expected = drive(make_engine(folder, **options), asked)
        with pretended_cuda():
            engine = make_engine(folder, device=str(DEVICE), **options)
            results = drive(engine, asked)
            assert length in {length for _, length, _ in graphs_of(engine)._recorded}
            assert graphs_of(engine).num_replays > 2
        for name, result in results.items():
            assert result.tokens() == expected[name].tokens()


def test_what_comes_once_is_not_recorded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (2, 3)]
    with pretended_cuda():
        engine = make_engine(tiny, device=str(DEVICE))
        graphs = graphs_of(engine)
        for sampling, num_recorded in zip(params, (0, 1), strict=True):  # one step behind the prompt, then two more
            drive(engine, [request("a", prompt(5), sampling)])
            assert len(graphs._recorded) == num_recorded
        assert graphs.num_replays == 2
