"""nanochat with smear and windows: chunks, pages, forks, prefix hits, preemption, drafts and moves change nothing."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from language_worker.api import GenerateRequest
from language_worker.engine import Engine
from language_worker.errors import ModelNotSupported
from language_worker.plan import StepPlan, Window
from language_worker.request import Sequence
from language_worker.sampling_params import SamplingParams
from tests.language_worker.helpers import drive, make_engine, request
from tests.tiny_nanochat import NANO_VOCAB, SIZES, make_native_nanochat, native_logits, native_tensors

SIZED = {"window_pattern": "SL", "sequence_len": 20}
LONGEST = 160


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_native_nanochat(tmp_path_factory.mktemp("nano"), 4, **SIZED)


def _requests(num: int) -> list[GenerateRequest]:
    """Prompts of several lengths that begin alike in two groups, some with several samples."""
    rng = random.Random(5)
    stems = [[rng.randrange(NANO_VOCAB) for _ in range(40)] for _ in range(2)]
    made = []
    for i in range(num):
        ids = stems[i % 2][: 40 - i] + [rng.randrange(NANO_VOCAB) for _ in range(3 * i)]
        params = SamplingParams(max_tokens=9, temperature=0.0 if i % 3 else 0.9, seed=i, n=1 + i % 3, ignore_eos=True)
        made.append(request(f"r{i}", ids, params))
    return made


def _engine(folder: Path, **config: object) -> Engine:
    return make_engine(folder, **{"max_model_len": LONGEST, **config})


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[list[int]]]:
    """The tokens of each request by itself, prefilled in one piece, nothing shared."""
    engine = _engine(folder, prefix_cache=False, max_num_seqs=1, page_size=LONGEST)
    return {
        one.request_id: [drive(engine, [dataclasses.replace(one, request_id=f"{one.request_id}-{i}")])[
            f"{one.request_id}-{i}"].tokens(i) for i in range(one.sampling.n)]
        for one in _requests(7)
    }  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        {"page_size": 4},
        {"page_size": 4, "max_prefill_chunk": 1},
        {"page_size": 1, "max_prefill_chunk": 3},
        {"page_size": 8, "max_prefill_chunk": 11, "max_step_tokens": 24, "max_num_seqs": 5},
        {"page_size": 4, "kv_cache_tokens": 160},
        {"page_size": 4, "decode_strategy": "speculative"},
        {"page_size": 2, "decode_strategy": "speculative", "prefix_cache": False, "kv_cache_tokens": 170},
    ],
)
def test_together_is_as_alone(folder: Path, alone: dict[str, list[list[int]]], config: dict[str, object]) -> None:
    engine = _engine(folder, **config)
    for _ in range(2):  # the second time prefixes are there
        results = drive(engine, _requests(7))
        got = {name: [result.tokens(i) for i in range(len(alone[name]))] for name, result in results.items()}
        assert got == alone
    stats = engine.stats()
    assert stats["kv_pages_referenced"] == 0
    if config.get("prefix_cache", True):
        assert stats["prefix_cache_hits_total"] > 0
    if "kv_cache_tokens" in config:
        assert sum(result.done.num_preemptions for result in results.values() if result.done) > 0


@pytest.mark.parametrize("moved_at", [1, 2, 7, 19, 20, 21, 33])
def test_pages_and_tokens_are_all_that_a_sequence_needs_elsewhere(folder: Path, moved_at: int) -> None:
    """prefill(n) here and the rest there, with the pages copied and nothing but the tokens beside them."""
    here, there = (_engine(folder, page_size=4).runner for _ in range(2))
    ids = [random.Random(1).randrange(NANO_VOCAB) for _ in range(45)]
    seq = Sequence(key=(0, 0), prompt=ids, max_len=LONGEST)
    seq.pages = [3, 9, 1, 20, 7, 30, 31, 2, 11, 12, 13, 14]
    here.run(StepPlan(windows=(Window(seq=seq, start=0, length=moved_at, num_final=moved_at, samples=True),)))
    for (keys, values), (to_keys, to_values) in zip(here.cache.layers, there.cache.layers, strict=True):
        to_keys.copy_(keys)
        to_values.copy_(values)
    config = {**SIZES, **SIZED}
    wanted = native_logits(4, config, native_tensors(4, config, seed=0, padded=True), ids)
    for start in range(moved_at, len(ids)):
        window = Window(seq=seq, start=start, length=1, num_final=1, samples=True)
        logits = there.run(StepPlan(windows=(window,))).logits
        assert (logits[0] - wanted[start]).abs().max().item() < 1e-4


def test_the_token_before_counts(folder: Path) -> None:
    """The test above has power: with another token before the first of a window the logits are others."""
    runner = _engine(folder).runner
    seq = Sequence(key=(0, 0), prompt=[5, 6, 7], max_len=LONGEST)
    seq.pages = [0]
    largest = 0.0
    for last in range(20):
        seq.tokens = [5, 6, last]
        runner.run(StepPlan(windows=(Window(seq=seq, start=0, length=2, num_final=2, samples=True),)))
        logits = []
        for before in (6, 50):
            seq.tokens[1] = before
            window = Window(seq=seq, start=2, length=1, num_final=1, samples=True)
            logits.append(runner.run(StepPlan(windows=(window,))).logits)
        largest = max(largest, (logits[0] - logits[1]).abs().max().item())
    assert largest > 0.1


def test_without_a_length_the_trained_one_is_served_and_more_on_request(folder: Path) -> None:
    assert make_engine(folder, max_model_len=0).limits.max_model_len == SIZED["sequence_len"]
    assert _engine(folder).limits.max_model_len == LONGEST
    with pytest.raises(ModelNotSupported, match="200 positions"):
        make_engine(folder, max_model_len=201)


def test_a_model_with_smear_is_refused_as_a_draft_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotSupported, match="token before"):
        _engine(folder, draft_model=str(folder))
    plain = make_native_nanochat(tmp_path, 3, **SIZED)
    engine = _engine(folder, draft_model=str(plain))
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    ids = [random.Random(2).randrange(NANO_VOCAB) for _ in range(30)]
    drafted = drive(engine, [request("a", ids, params)])["a"].tokens()
    assert drafted == drive(_engine(folder), [request("a", ids, params)])["a"].tokens()


def test_bfloat16_is_served_when_asked_for(folder: Path) -> None:
    engine = _engine(folder, dtype="bfloat16")
    assert engine.dtype == torch.bfloat16
    assert len(drive(engine, _requests(1))["r0"].tokens()) == 9
