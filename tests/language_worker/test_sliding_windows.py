"""Sliding windows: logits and tokens are transformers', pages that no layer sees any more are free, nothing else shows.

The pages' bookkeeping under any traffic is in `test_random_traffic.py`, the masks of the ops in `tests/kernels`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from language_worker.engine import Engine
from language_worker.errors import ModelNotSupported
from language_worker.models import resolve_model
from language_worker.models.qwen2_5_vl import Qwen2_5_VLConfig
from language_worker.page_keeper import PageKeeper
from language_worker.page_pool import PagePool
from language_worker.prefix_cache import PrefixCache, first_seen_page
from language_worker.request import Sequence
from tests.language_worker.helpers import GREEDY, drive, make_engine, prompt, request
from tests.tiny_models import make_qwen2_5_vl
from tests.tiny_text_models import make_text_model, text_reference
from tests.tiny_tokenizer import NUM_TOKENS

TOLERANCE = 1e-4
SWITCHED = {"use_sliding_window": True}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
CASES: list[tuple[str, dict[str, Any], int]] = [  # family, config.json, and the window in whichever layer
    ("qwen2", {**SWITCHED, "sliding_window": 20, "max_window_layers": 0}, 20),
    ("qwen2", {**SWITCHED, "sliding_window": 33, "max_window_layers": 1, "num_hidden_layers": 3}, 0),
    ("qwen2", {**SWITCHED, "sliding_window": 7}, 0),  # from layer 28 on
    ("qwen3", {**SWITCHED, "sliding_window": 1, "max_window_layers": 0}, 1),
    ("qwen3", {**SWITCHED, "sliding_window": 12, "layer_types": MIXED, "num_hidden_layers": 3}, 0),
    ("mistral", {"sliding_window": 16}, 16),
    ("mistral", {"sliding_window": 5, "num_hidden_layers": 4}, 5),
    ("mistral", {"sliding_window": None}, 0),
    ("mistral", {"sliding_window": 500}, 500),
    ("mistral", {}, 4096),
    ("ministral", {"sliding_window": 24}, 24),
    ("ministral", {"sliding_window": 9, "layer_types": MIXED, "num_hidden_layers": 3}, 0),
    ("mixtral", {"sliding_window": 18}, 18),
    ("qwen2_moe", {**SWITCHED, "sliding_window": 10, "num_hidden_layers": 3, "max_window_layers": 28}, 0),
    ("qwen3_moe", {**SWITCHED, "sliding_window": 14}, 14),
    ("dots1", {"sliding_window": 11, "max_window_layers": 1}, 0),
    ("dots1", {"sliding_window": 11, "max_window_layers": 0, "max_position_embeddings": 512}, 11),
]


def _read_window(family: str, folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    return resolve_model(config).read_spec(config).kv.window


@pytest.mark.parametrize("index", range(len(CASES)))
def test_logits_and_greedy_tokens_equal_transformers(index: int, tmp_path: Path) -> None:
    family, overrides, window = CASES[index]
    folder = make_text_model(tmp_path, family, seed=index, **overrides)
    assert _read_window(family, folder) == window
    ids = prompt(90, seed=index, vocab=NUM_TOKENS)
    model = text_reference(folder)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    with torch.no_grad():
        logits = model(**inputs).logits[0]
        model.generation_config.eos_token_id = None
        padding = list(range(NUM_TOKENS, logits.shape[1]))
        out = model.generate(  # its cache for a window of 1 keeps all keys and masks none, so without one
            **inputs, max_new_tokens=40, do_sample=False, suppress_tokens=padding, use_cache=False
        )
    engine = make_engine(folder, max_prefill_chunk=(0, 7, 40)[index % 3], max_model_len=200, page_size=4)
    sampling = dataclasses.replace(GREEDY, max_tokens=40)
    result = drive(engine, [request("a", ids, sampling, return_logits=True)])["a"]
    difference = (result.logits - logits).abs().max().item()
    assert difference < TOLERANCE, f"logits differ by {difference}"
    assert result.tokens() == out[0, len(ids) :].tolist()


def test_a_window_changes_the_logits(tmp_path: Path) -> None:
    """The comparison above has power."""
    folders = [make_text_model(tmp_path / str(w), "mistral", sliding_window=w) for w in (None, 20, 21)]
    asked = [request("a", prompt(90, vocab=NUM_TOKENS), GREEDY, return_logits=True)]
    plain, near, next_to = (drive(make_engine(folder), asked)["a"].logits for folder in folders)
    assert torch.equal(plain[:20], near[:20]) or (plain[:20] - near[:20]).abs().max() < TOLERANCE
    assert (plain - near).abs().max() > 100 * TOLERANCE and (near - next_to).abs().max() > 100 * TOLERANCE


def _mistral(folder: Path, **config: Any) -> Engine:
    made = make_text_model(folder, "mistral", seed=5, sliding_window=16, num_hidden_layers=3)
    return make_engine(made, **{"page_size": 4, "max_prefill_chunk": 12, **config})


def test_pages_out_of_the_window_are_free_while_their_sequence_runs(tmp_path: Path) -> None:
    engine = _mistral(tmp_path, prefix_cache=False)
    held = []
    sampling = dataclasses.replace(GREEDY, max_tokens=200)
    asked = request("a", prompt(100, vocab=NUM_TOKENS), sampling)
    result = drive(engine, [asked], on_step=lambda: held.append(engine.scheduler.pool.num_in_use))["a"]
    assert len(result.tokens()) == 200
    decoding = held[-150:-2]  # the last step ends it
    assert max(decoding) <= 16 // 4 + 2, decoding
    assert engine.stats()["kv_pages_referenced"] == 0 == engine.scheduler.pool.num_in_use


def test_more_sequences_run_in_one_pool_for_it(tmp_path: Path) -> None:
    """Four answers of 200 tokens in pages for 240 at once: nobody is preempted, since each needs 24 in the end."""
    sampling = dataclasses.replace(GREEDY, max_tokens=200)
    asked = [request(f"r{i}", prompt(30, seed=i, vocab=NUM_TOKENS), sampling) for i in range(4)]
    alone = [drive(_mistral(tmp_path), [one])[one.request_id].tokens() for one in asked]
    engine = _mistral(tmp_path, kv_cache_tokens=240, max_model_len=240)
    together = drive(engine, asked)
    assert [together[one.request_id].tokens() for one in asked] == alone
    assert engine.stats()["num_preemptions_total"] == 0


def test_forks_prefix_hits_and_drafts_change_nothing(tmp_path: Path) -> None:
    sampling = dataclasses.replace(GREEDY, temperature=0.7, seed=1, n=3, max_tokens=30)
    stem = prompt(60, vocab=NUM_TOKENS)
    asked = [request(f"r{i}", (*stem, *prompt(3, seed=i)), sampling) for i in range(4)]
    plain = drive(_mistral(tmp_path, prefix_cache=False, max_num_seqs=1), asked)
    engine = _mistral(tmp_path, decode_strategy="speculative")
    for one in asked:
        result = drive(engine, [one])[one.request_id]
        assert [result.tokens(i) for i in range(3)] == [plain[one.request_id].tokens(i) for i in range(3)]
    assert engine.stats()["prefix_cache_hits_total"] == 3 * 60


def test_a_prefix_hit_needs_the_pages_of_its_window_alone() -> None:
    pool = PagePool(16)
    cache = PrefixCache(pool, 4, b"root")
    first = Sequence(key=(0, 0), prompt=range(24), max_len=32)
    first.pages = pool.allocate(6, first.key)
    cache.record(first, 0, 6)
    kept = list(first.pages)
    pool.release_first(first.key, 2)
    pool.release(first.key)
    taken = pool.allocate(12, "other")  # free pages, and the two that were given back first
    assert set(taken) & set(kept) == set(kept[:2])
    again = Sequence(key=(1, 0), prompt=range(24), max_len=32)
    assert cache.find(again) == ()
    assert cache.find_tail(again, 9) == (2, tuple(kept[2:5]))  # 20 tokens; the last must be computed
    assert cache.find_tail(again, 13) == (0, ())
    assert cache.find_tail(Sequence(key=(2, 0), prompt=range(19), max_len=32), 9) == (0, ())


def test_which_page_is_seen_first() -> None:
    """By the definition: a query at `num_tokens` or the one before it sees the keys less than `window` behind it."""
    for size, window, num_tokens in [(s, w, n) for s in (1, 3, 4) for w in (1, 2, 5, 8) for n in range(30)]:
        seen = [j for q in (num_tokens - 1, num_tokens) for j in range(q + 1) if 0 <= q - j < window]
        assert first_seen_page(num_tokens, window, size) == min(seen) // size
    assert first_seen_page(1000, 0, 4) == 0


@pytest.mark.parametrize(
    ("family", "change", "word"),
    [
        ("llama", {"use_sliding_window": True}, "sliding"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ("qwen2", {**SWITCHED, "sliding_window": "16"}, "sliding_window"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "no window"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types"),
        ("ministral", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
    ],
)
def test_windows_that_are_not_served_are_refused_by_name(
    family: str, change: dict[str, Any], word: str, tmp_path: Path
) -> None:
    folder = make_text_model(tmp_path, family)
    config = json.loads((folder / "config.json").read_text()) | change
    with pytest.raises(ModelNotSupported, match=word):
        resolve_model(config).read_spec(config)


def test_qwen2_5_vl_slides_from_a_layer_on(tmp_path: Path) -> None:
    config = json.loads((make_qwen2_5_vl(tmp_path) / "config.json").read_text()) | SWITCHED | {"sliding_window": 50}
    assert Qwen2_5_VLConfig.read(config | {"max_window_layers": 1}).block.windows == (0, 50)
    read = Qwen2_5_VLConfig.read(config | {"max_window_layers": 0})
    assert read.block.windows == (50, 50) and read.spec.kv.window == 50


def test_pages_whose_kv_has_yet_to_leave_are_kept() -> None:
    """A prefill worker sends all positions; a prefix from its cache may be long out of the window before it does."""
    for is_exported, num_left in ((False, 2), (True, 5)):
        keeper = PageKeeper(PagePool(8), 4, window=4)
        seq = Sequence(key=(0, 0), prompt=range(20), max_len=30, is_exported=is_exported)
        seq.pages = list(keeper.pool.allocate(5, seq.key))
        seq.kv_len = 19
        keeper.trim(seq)
        assert len(seq.pages) == num_left
