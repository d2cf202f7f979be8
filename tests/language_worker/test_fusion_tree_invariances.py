"""FusionTree: splits, chunks, pages, forks, preemption, neighbours and failing steps change nothing."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from language_worker.api import GenerateRequest
from language_worker.engine import Engine
from language_worker.plan import StateStart, StepPlan, Window
from language_worker.request import Sequence
from language_worker.runner import ModelRunner
from language_worker.sampling_params import SamplingParams
from tests.language_worker.helpers import drive, make_engine, request
from tests.tiny_fusion_tree import SIZES, VOCAB, logits_of, make_fusion_tree, tensors_of

LONGEST = 160
LENGTH = 46  # beyond the window, several pages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fusion_tree(tmp_path_factory.mktemp("fusion"))


def _engine(folder: Path, **config: Any) -> Engine:
    return make_engine(folder, **{"max_model_len": LONGEST, "num_threads": 1, **config})


# -- one sequence, cut in every way -----------------------------------------------------------------------------------

IDS = [random.Random(1).randrange(VOCAB) for _ in range(LENGTH)]
PAGES = [3, 9, 1, 20, 7, 30, 31, 2, 11, 12, 13, 14]


@pytest.fixture(scope="module")
def wanted() -> torch.Tensor:
    return logits_of(SIZES, tensors_of(SIZES), IDS)


def _sequence(runner: ModelRunner, slot: int) -> Sequence:
    seq = Sequence(key=(0, 0), prompt=IDS, max_len=LONGEST)
    seq.pages, seq.state_slot = list(PAGES), slot
    runner.start_states([StateStart(slot=slot)])
    return seq


def _run(runner: ModelRunner, seq: Sequence, start: int, end: int) -> torch.Tensor:
    """Logits of the last of positions [start, end)."""
    window = Window(seq=seq, start=start, length=end - start, num_final=end - start, samples=True)
    return runner.run(StepPlan(windows=(window,))).logits[-1]


def test_prefill_and_decode_at_every_split_are_the_whole(folder: Path, wanted: torch.Tensor) -> None:
    runner = _engine(folder, page_size=4).runner
    for split in range(1, LENGTH):
        seq = _sequence(runner, split % 5)
        cuts = [0, split, *range(split + 1, LENGTH + 1)]
        for start, end in itertools.pairwise(cuts):
            assert (_run(runner, seq, start, end) - wanted[end - 1]).abs().max() < 1e-4, (split, end)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9, 16, 17, 33])
def test_chunks_of_every_size_are_the_whole(folder: Path, wanted: torch.Tensor, size: int) -> None:
    runner = _engine(folder, page_size=4).runner
    seq = _sequence(runner, 2)
    for start in range(0, LENGTH, size):
        end = min(start + size, LENGTH)
        assert (_run(runner, seq, start, end) - wanted[end - 1]).abs().max() < 1e-4


@pytest.mark.parametrize("moved_at", [1, 2, 3, 8, 9, 17, 33])
def test_pages_and_state_are_all_that_a_sequence_needs_elsewhere(
    folder: Path, wanted: torch.Tensor, moved_at: int
) -> None:
    here, there = (_engine(folder, page_size=4).runner for _ in range(2))
    seq = _sequence(here, 1)
    _run(here, seq, 0, moved_at)
    assert here.states is not None and there.states is not None
    there.cache.write_rows(torch.tensor(there._slots(seq, 0, moved_at)), here.export_rows(seq, 0, moved_at))
    there.states.write(4, here.export_state(seq))
    seq.state_slot = 4
    for start in range(moved_at, LENGTH):
        assert (_run(there, seq, start, start + 1) - wanted[start]).abs().max() < 1e-4


@pytest.mark.parametrize("part", ["ssm", "conv_tail"])
def test_both_parts_of_the_state_count(folder: Path, wanted: torch.Tensor, part: str) -> None:
    """The test above has power: without one of them logits are others."""
    runner = _engine(folder, page_size=4).runner
    seq = _sequence(runner, 1)
    _run(runner, seq, 0, 20)
    assert runner.states is not None
    state = runner.states.read(1)
    state[part].zero_()
    runner.states.write(1, state)
    assert (_run(runner, seq, 20, 21) - wanted[20]).abs().max() > 0.01


def test_several_windows_of_all_lengths_in_one_step(folder: Path, wanted: torch.Tensor) -> None:
    """Single tokens together, chunks behind them, each at a place of its own."""
    runner = _engine(folder, page_size=LENGTH).runner
    starts, ends = [9, 20, 45, 0, 17, 3], [10, 21, 46, 30, 46, 5]
    windows = []
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        seq = _sequence(runner, i)
        seq.pages = [i]
        if start:
            _run(runner, seq, 0, start)
        windows.append(Window(seq=seq, start=start, length=end - start, num_final=end - start, samples=True))
    logits = runner.run(StepPlan(windows=tuple(windows))).logits
    assert (logits - wanted[torch.tensor(ends) - 1]).abs().max() < 1e-4


# -- whole engines ----------------------------------------------------------------------------------------------------


def _requests(num: int) -> list[GenerateRequest]:
    """Prompts of several lengths that begin alike in two groups, some with several samples."""
    rng = random.Random(5)
    stems = [[rng.randrange(VOCAB) for _ in range(40)] for _ in range(2)]
    made = []
    for i in range(num):
        ids = stems[i % 2][: 40 - i] + [rng.randrange(VOCAB) for _ in range(3 * i)]
        params = SamplingParams(max_tokens=9, temperature=0.0 if i % 3 else 0.9, seed=i, n=1 + i % 3, ignore_eos=True)
        made.append(request(f"r{i}", ids, params))
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[list[int]]]:
    """The tokens of each sample by itself, its prompt computed in one piece."""
    engine = _engine(folder, max_num_seqs=1, page_size=LONGEST)
    return {
        one.request_id: [drive(engine, [dataclasses.replace(one, request_id=f"{one.request_id}-{i}")])[
            f"{one.request_id}-{i}"].tokens(i) for i in range(one.sampling.n)]
        for one in _requests(7)
    }  # fmt: skip


def _tokens(engine: Engine, alone: dict[str, list[list[int]]]) -> tuple[dict[str, list[list[int]]], int]:
    """Of all requests together, and how often one of them was preempted."""
    results = drive(engine, _requests(7))
    got = {name: [result.tokens(i) for i in range(len(alone[name]))] for name, result in results.items()}
    return got, sum(result.done.num_preemptions for result in results.values() if result.done)


@pytest.mark.parametrize(
    "config",
    [
        {"page_size": 4},
        {"page_size": 4, "max_prefill_chunk": 1},
        {"page_size": 1, "max_prefill_chunk": 3},
        {"page_size": 8, "max_prefill_chunk": 11, "max_step_tokens": 24, "max_num_seqs": 5},
        {"page_size": 4, "kv_cache_tokens": 160},
        {"page_size": 4, "max_num_seqs": 2},
    ],
)
def test_together_is_as_alone(folder: Path, alone: dict[str, list[list[int]]], config: dict[str, Any]) -> None:
    engine = _engine(folder, **config)
    for _ in range(2):  # the second time slots were used before
        got, num_preemptions = _tokens(engine, alone)
        assert got == alone
    assert engine.stats()["kv_pages_referenced"] == 0
    assert num_preemptions > 0 or "kv_cache_tokens" not in config


def test_steps_that_fail_leave_no_trace(
    folder: Path, alone: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every third step of several sequences raises when it is through, and is run again one by one."""
    engine = _engine(folder, page_size=4, max_prefill_chunk=11)
    counts = {"steps": 0, "failed": 0}

    def run(self: ModelRunner, plan: StepPlan) -> Any:
        logits = original(self, plan)
        if len(plan.windows) > 1:
            counts["steps"] += 1
            if counts["steps"] % 3 == 0:
                counts["failed"] += 1
                raise RuntimeError("planted")
        return logits

    original = ModelRunner.run
    monkeypatch.setattr(ModelRunner, "run", run)
    assert _tokens(engine, alone)[0] == alone
    assert counts["failed"] > 3
