"""A draft model changes the number of steps and nothing else; one equal to the model is never wrong."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from language_worker.config import EngineConfig
from language_worker.decode.drafts import OPEN, OpenDrafts
from language_worker.decode.speculative import Speculative
from language_worker.engine import Engine
from language_worker.errors import InvalidRequest, ModelNotSupported
from language_worker.sampling_params import SamplingParams
from tests.language_worker.helpers import GREEDY, Media, drive, make_engine, prompt, request
from tests.language_worker.test_sampling_distribution import check_frequencies
from tests.language_worker.test_speculative import KINDS, _shown
from tests.language_worker.toy import VOCAB, naive, toy_engine, toy_probabilities
from tests.profiles import IS_SOAK
from tests.tiny_models import make_qwen2_5_vl
from tests.tiny_text_models import make_text_model
from tests.tiny_tokenizer import NUM_TOKENS, TOKEN_IDS

PAD = TOKEN_IDS["<|image_pad|>"]
NUM_REQUESTS = 250 if IS_SOAK else 60  # of a hundred samples each
TIGHT = {"page_size": 4, "kv_cache_tokens": 160, "max_model_len": 100, "max_num_seqs": 3}
ASKED = [request(f"r{i}", prompt(9 + 5 * i, seed=i % 5), kind) for i, kind in enumerate(KINDS * 2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_model(tmp_path_factory.mktemp("model"), "llama", seed=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another family, other sizes, a vocabulary without padding."""
    return make_text_model(
        tmp_path_factory.mktemp("small"), "qwen3", seed=2, num_hidden_layers=1, hidden_size=32, vocab_size=NUM_TOKENS
    )


def _counts(engine: Engine) -> tuple[float, float]:
    stats = engine.stats()
    assert stats["kv_pages_referenced"] == 0
    return stats["spec_decode_num_draft_tokens_total"], stats["spec_decode_num_accepted_tokens_total"]


@pytest.mark.parametrize("config", [{}, TIGHT, {"max_prefill_chunk": 5, "prefix_cache": False}])
def test_a_draft_model_equal_to_the_model_is_always_right(config: dict, model: Path) -> None:
    """Its KV is there whatever the traffic: chunks, forks, prefix hits, preemption, drafts all accepted. Drawn tokens
    too, since both draw with the same numbers."""
    plain = drive(make_engine(model), ASKED)
    engine = make_engine(model, draft_model=str(model), **config)
    drafted = drive(engine, ASKED)
    assert _shown(drafted) == _shown(plain)
    num_proposed, num_accepted = _counts(engine)
    assert num_proposed == num_accepted > 200
    assert engine.stats()["num_preemptions_total"] > 0 or config is not TIGHT


@pytest.mark.parametrize("config", [{}, TIGHT])
def test_output_is_identical_with_any_draft_model(config: dict, model: Path, small: Path) -> None:
    plain = drive(make_engine(model), ASKED)
    engine = make_engine(model, draft_model=str(small), num_draft_tokens=3, **config)
    assert _shown(drive(engine, ASKED)) == _shown(plain)
    num_proposed, num_accepted = _counts(engine)
    assert num_proposed > num_accepted


def test_prompts_with_media_are_drafted_for_too(tiny: Path, small: Path) -> None:
    media = {"a": Media(grids=[(1, 4, 6)], rows=torch.randn(6, 64, generator=torch.Generator().manual_seed(0)))}
    asked = [request("a", (*prompt(9), PAD, *prompt(5, seed=1)), dataclasses.replace(GREEDY, n=3), num_media=1)]
    plain = drive(make_engine(tiny), asked, media)
    engine = make_engine(tiny, draft_model=str(small), page_size=4)
    assert _shown(drive(engine, asked, media)) == _shown(plain)
    assert _counts(engine)[0] > 0


def test_the_distribution_is_preserved(tiny: Path) -> None:
    """Pairs of a first token and a drafted second one, against the product of their probabilities."""
    sampling = SamplingParams(n=100, max_tokens=2, ignore_eos=True, temperature=0.9)
    ids = [4, 9, 16, 5]
    asked = [request(f"r{i}", ids, dataclasses.replace(sampling, seed=i)) for i in range(NUM_REQUESTS)]
    engine = toy_engine(
        tiny, num_pages=400, strategy=Speculative(3, OpenDrafts), has_drafter=True, max_num_seqs=64, max_step_tokens=512
    )
    results = drive(engine, asked)
    pairs = [tuple(results[one.request_id].tokens(i)) for one in asked for i in range(100)]
    assert len(pairs) == 100 * NUM_REQUESTS
    first = toy_probabilities(ids, 0.9)
    expected = np.concatenate([first[i] * toy_probabilities([*ids, i], 0.9) for i in range(VOCAB)])
    check_frequencies(np.bincount([a * VOCAB + b for a, b in pairs], minlength=VOCAB**2), expected)
    assert [results["r0"].tokens(i) for i in range(100)] == naive(asked[0])


def test_drafts_of_a_right_model_save_steps(model: Path) -> None:
    engine, runs = make_engine(model, draft_model=str(model), num_draft_tokens=7), []
    run = engine.runner.run
    engine.runner.run = lambda plan: runs.append(plan) or run(plan)
    drive(engine, [request("a", prompt(5), dataclasses.replace(GREEDY, max_tokens=57))])
    assert len(runs) == 8, "one for the first token, then eight tokens a step"
    assert all(draft >= 0 for plan in runs for window in plan.windows for draft in window.drafts), f"no {OPEN} is left"


def test_both_caches_come_out_of_one_budget(model: Path, small: Path) -> None:
    sizes = [
        make_engine(model, kv_cache_tokens=0, kv_cache_bytes=1 << 19, **drafting).scheduler.pool.num_pages
        for drafting in ({}, {"draft_model": str(small)}, {"draft_model": str(model)})
    ]
    assert sizes[0] > sizes[1] > sizes[2] == sizes[0] // 2


def test_a_draft_model_of_other_tokens_is_refused(model: Path, tmp_path: Path) -> None:
    other = make_qwen2_5_vl(tmp_path)
    known = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    known["added_tokens"][0]["content"] = "<|another|>"
    (other / "tokenizer.json").write_text(json.dumps(known), encoding="utf-8")
    with pytest.raises(ModelNotSupported, match="another tokenizer"):
        make_engine(model, draft_model=str(other))
    with pytest.raises(InvalidRequest, match="draft_model"):
        EngineConfig(draft_model="somewhere", decode_strategy="autoregressive")
