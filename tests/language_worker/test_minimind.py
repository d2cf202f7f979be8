"""MiniMind 2 and 3, dense and with experts, in each of their layouts, against the reference on random checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from language_worker.models import open_model, resolve_model
from language_worker.models.minimind import MiniMind
from language_worker.models.rope import Rope
from tests.language_worker.helpers import GREEDY, drive, make_engine, prompt, request
from tests.profiles import IS_SOAK
from tests.tiny_minimind import LAYOUTS, VARIANTS, YARN, make_minimind, minimind_reference
from tests.tiny_tokenizer import NUM_TOKENS
from transfer.checkpoint import CheckpointError

TOLERANCE = 1e-4
SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": False, "intermediate_size": 72},
    {"num_hidden_layers": 3, "num_key_value_heads": 8},
    {"hidden_size": 128, "head_dim": 16, "num_key_value_heads": 1},
    {"inference_rope_scaling": True, "num_hidden_layers": 1},
]
PAIRS = [pair for pair in itertools.product(VARIANTS, LAYOUTS) if pair != ("2-moe", "converted")]  # no such family
CASES = [(*pair, seed) for i, pair in enumerate(PAIRS) for seed in (range(10) if IS_SOAK else (i % 5, (i + 2) % 5))]


@pytest.mark.parametrize(("variant", "layout", "seed"), CASES)
def test_logits_and_greedy_tokens_equal_the_reference(variant: str, layout: str, seed: int, tmp_path: Path) -> None:
    overrides = dict(SHAPES[seed % len(SHAPES)])
    if "head_dim" in overrides and variant.startswith("2"):
        del overrides["head_dim"]
    if layout == "pth":
        overrides.pop("inference_rope_scaling", None)
    if variant == "3-moe":
        overrides["moe_intermediate_size"] = overrides.get("intermediate_size", 96)
    config = make_minimind(tmp_path, variant, layout, seed=seed, **overrides)
    ids = prompt(70, seed=seed, vocab=NUM_TOKENS)
    model = minimind_reference(variant, config, seed)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
        model.generation_config.eos_token_id = None
        out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    engine = make_engine(tmp_path, max_prefill_chunk=(0, 7, 32)[seed % 3])
    result = drive(engine, [request("a", ids, GREEDY, return_logits=True)])["a"]
    assert result.logits is not None and result.logits.shape == logits.shape
    assert (result.logits - logits).abs().max().item() < TOLERANCE
    assert result.tokens() == out[0, len(ids) :].tolist()


def test_half_precision_files_are_served_in_their_own_dtype(tmp_path: Path) -> None:
    make_minimind(tmp_path, "3", "pth", dtype=torch.float16)
    engine = make_engine(tmp_path, dtype="auto")
    assert engine.dtype == torch.float16
    assert len(drive(engine, [request("a", prompt(9))])["a"].tokens()) == 12


def test_repetition_penalty_equals_the_reference(tmp_path: Path) -> None:
    config = make_minimind(tmp_path, "3", "pth", seed=4)
    ids = prompt(40, seed=4, vocab=NUM_TOKENS)
    model = minimind_reference("3", config, 4)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, repetition_penalty=1.3)
    penalised = dataclasses.replace(GREEDY, repetition_penalty=1.3)
    result = drive(make_engine(tmp_path), [request("a", ids, penalised), request("b", ids)])
    assert result["a"].tokens() == out[0, len(ids) :].tolist() != result["b"].tokens()


@pytest.mark.parametrize("head_dim", [16, 64, 96])
def test_yarn_tables_equal_the_formula(head_dim: int) -> None:
    """Over 4096 positions, in float64, as the project's notes define it."""
    config = {"inference_rope_scaling": True, "hidden_size": 8 * head_dim, "intermediate_size": 64}
    rope = MiniMind.read_config(config).rope
    assert rope == Rope.read({"rope_scaling": YARN, "rope_theta": 1e6, "max_position_embeddings": 32768}, 1e6)
    frequencies = 1e6 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = torch.tensor([32.0, 1.0], dtype=torch.float64)
    low, high = head_dim * torch.log(2048 / (turns * 2 * torch.pi)) / (2 * torch.log(torch.tensor(1e6)))
    first, last = max(int(low.floor()), 0), min(int(high.ceil()), head_dim // 2 - 1)
    ramp = ((torch.arange(head_dim // 2) - first) / max(last - first, 0.001)).clamp(0, 1)
    expected = torch.arange(4096)[:, None] * (frequencies * (1 - ramp + ramp / 16))
    angles = torch.arange(4096)[:, None] * rope.frequencies(head_dim, 4096).double()
    assert (angles.cos() - expected.cos()).abs().max() < 1e-3  # float32 frequencies times 4096
    assert (rope.frequencies(head_dim, 4096).double() - expected[1]).abs().max() < 1e-7


def test_yarn_is_off_unless_switched_on_and_needed() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    assert MiniMind.read_config({**sizes, "rope_scaling": YARN}).rope.kind == "default"
    short = {**sizes, "inference_rope_scaling": True, "max_position_embeddings": 2048}
    assert MiniMind.read_config(short).rope.kind == "default"
    assert MiniMind.read_config({**short, "max_position_embeddings": 4096}).rope.kind == "yarn"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["pth", "bin"])
def test_every_tensor_is_needed_and_no_other_is_taken(variant: str, layout: str, tmp_path: Path) -> None:
    make_minimind(tmp_path, variant, layout, num_hidden_layers=1)
    (file,) = [path for path in tmp_path.iterdir() if path.suffix in (".pth", ".bin")]
    tensors = torch.load(file, weights_only=True)
    essential = {"model.embed_tokens.weight", "lm_head.weight"}  # without the first it is another kind of checkpoint
    for name in tensors:
        inferring = layout == "pth" and any(part in name for part in ("q_proj", "k_proj", "gate"))
        if name in essential or inferring:
            continue  # what the configuration is read off; see below
        torch.save({key: value for key, value in tensors.items() if key != name}, file)
        with pytest.raises(CheckpointError) as caught:
            make_engine(tmp_path)
        assert any(name in problem for problem in caught.value.problems), name
    torch.save({**tensors, "model.layers.0.extra": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.0\.extra"):
        make_engine(tmp_path)
    buffers = {"mask": torch.zeros(2), "model.freqs_cos": torch.zeros(2)}  # older files hold them
    torch.save({f"module.{name}": value for name, value in (tensors | buffers).items()}, file)
    assert resolve_model(open_model(tmp_path).config()).check(open_model(tmp_path)) == len(tensors) - 1


@pytest.mark.parametrize("missing", ["self_attn.k_proj", "mlp.gate_proj", "mlp.gate.", "mlp.experts.0.gate_proj"])
def test_a_file_without_what_it_is_recognised_by_is_refused(missing: str, tmp_path: Path) -> None:
    make_minimind(tmp_path, "3" if missing == "mlp.gate_proj" else "3-moe", "pth")
    (file,) = tmp_path.glob("*.pth")
    tensors = torch.load(file, weights_only=True)
    torch.save({key: value for key, value in tensors.items() if f".0.{missing}" not in key}, file)
    named = "mlp.gate_proj" if missing == "mlp.gate." else missing  # without a router it looks like a dense one
    with pytest.raises(CheckpointError, match=f"missing: model.layers.0.{named}"):
        make_engine(tmp_path)


def test_a_config_beside_the_file_overrules_what_was_inferred(tmp_path: Path) -> None:
    make_minimind(tmp_path, "2", "pth", num_attention_heads=4, num_key_value_heads=2)
    assert open_model(tmp_path).config()["num_attention_heads"] == 8  # what the project fixes
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4, "inference_rope_scaling": True}))
    config = open_model(tmp_path).config()
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 16)
    assert MiniMind.read_config(config).rope.kind == "yarn"


@pytest.mark.parametrize("variant", VARIANTS)
def test_company_chunks_preemption_and_forks_change_nothing(variant: str, tmp_path: Path) -> None:
    """Sampled with seeds: alone, and all at once in a cache that cannot hold them, in odd chunks and pages."""
    make_minimind(tmp_path, variant, "pth", seed=8)
    warm = dataclasses.replace(GREEDY, temperature=0.9, top_k=50, top_p=0.85, n=2)
    asked = [
        request(f"r{i}", prompt(11 + 5 * i, seed=i, vocab=NUM_TOKENS), dataclasses.replace(warm, seed=i))
        for i in range(6)
    ]
    alone = {}
    for one in asked:
        alone |= drive(make_engine(tmp_path, max_num_seqs=2), [one])
    tight = make_engine(tmp_path, kv_cache_tokens=102, max_model_len=60, page_size=3, max_prefill_chunk=7)
    together = drive(tight, asked)
    for one in asked:
        for sample in range(2):
            assert together[one.request_id].tokens(sample) == alone[one.request_id].tokens(sample)
    assert tight.stats()["num_preemptions_total"] > 0
    assert alone["r0"].tokens(0) != alone["r0"].tokens(1)
