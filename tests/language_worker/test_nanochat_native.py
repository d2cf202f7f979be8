"""nanochat's own layout, every generation: against a dense float64 restatement, and what is refused."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from language_worker.engine import Engine
from language_worker.errors import ModelNotSupported
from language_worker.models import open_model
from language_worker.models.nanochat_generations import GENERATIONS, detect_generation
from language_worker.sampling_params import SamplingParams
from tests.language_worker.helpers import GREEDY, drive, make_engine, request
from tests.tiny_nanochat import NANO_VOCAB, SIZES, make_native_nanochat, native_logits, native_tensors
from transfer.checkpoint import CheckpointError

TOLERANCE = 1e-4
VARIANTS: list[dict[str, Any]] = [
    {},
    {"window_pattern": "SSSL"},
    {"window_pattern": "SL", "n_kv_head": 4, "n_layer": 5},
    {"window_pattern": "S", "n_kv_head": 1, "n_layer": 2, "sequence_len": 20},
    {"n_layer": 1, "n_head": 2, "n_kv_head": 2},
    {"n_embd": 64, "n_layer": 3, "window_pattern": "LS"},
    {"n_head": 6, "n_kv_head": 3, "sequence_len": 30, "window_pattern": "SSL"},
    {"n_layer": 6, "n_embd": 32, "n_head": 2, "n_kv_head": 1, "sequence_len": 64, "window_pattern": "SLS"},
    {"n_head": 2, "n_kv_head": 1, "window_pattern": "L", "sequence_len": 25},
    {"n_embd": 40, "n_head": 5, "n_kv_head": 5, "n_layer": 3},
]
CASES = list(itertools.product(range(5), range(len(VARIANTS))))


def _ids(length: int, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(NANO_VOCAB) for _ in range(length))


def _engine(folder: Path, **config: Any) -> Engine:
    """An engine for lengths that the tiny checkpoints' rotary tables have."""
    return make_engine(folder, **{"max_model_len": 120, **config})


def _sizes(generation: int, variant: int) -> dict[str, Any]:
    """Windows came with generation 1."""
    sizes = dict(VARIANTS[variant])
    return {k: v for k, v in sizes.items() if generation or k != "window_pattern"}


def _greedy(
    generation: int, config: dict[str, Any], tensors: dict[str, torch.Tensor], ids: Any, count: int
) -> list[int]:
    known = list(ids)
    for _ in range(count):
        known.append(int(native_logits(generation, config, tensors, known)[-1].argmax()))
    return known[len(ids) :]


@pytest.mark.parametrize(("generation", "variant"), CASES)
def test_logits_and_greedy_tokens_equal_the_restatement(generation: int, variant: int, tmp_path: Path) -> None:
    """Prompts longer than the windows, chunks of several sizes, names with and without a wrapper's prefix."""
    sizes, seed = _sizes(generation, variant), generation * 10 + variant
    prefix, padded = ("_orig_mod." if variant % 2 else ""), variant % 3 != 0
    folder = make_native_nanochat(tmp_path, generation, seed=seed, prefix=prefix, padded=padded, **sizes)
    config = {**SIZES, **sizes}
    tensors = native_tensors(generation, config, seed=seed, padded=padded)
    ids = _ids(70, seed)
    wanted = native_logits(generation, config, tensors, ids)
    engine = _engine(folder, dtype="auto", max_prefill_chunk=(0, 1, 7, 64)[variant % 4])
    assert engine.dtype == torch.float32
    sampling = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    result = drive(engine, [request("a", ids, sampling, return_logits=True)])["a"]
    assert result.error is None and result.logits is not None
    difference = (result.logits - wanted).abs().max().item()
    assert difference < TOLERANCE, f"logits differ by {difference}"
    assert result.tokens() == _greedy(generation, config, tensors, ids, 6)


@pytest.mark.parametrize("generation", range(1, 5))
def test_short_windows_are_rounded_as_each_generation_does(generation: int) -> None:
    """On lengths where the multiples of 128 show; the tiny checkpoints' windows are shorter than that."""
    got = GENERATIONS[generation].windows("SSL", 2048, 4)
    short = {1: 1024, 2: 1024, 3: 768, 4: 512}[generation]
    assert got == (short, short, 2048, 2048)


@pytest.mark.parametrize("generation", [3, 4])
def test_long_prompts_past_a_rounded_window(generation: int, tmp_path: Path) -> None:
    sizes = {"sequence_len": 256, "window_pattern": "SL", "n_layer": 3}
    folder = make_native_nanochat(tmp_path, generation, **sizes)
    config, ids = {**SIZES, **sizes}, _ids(300, generation)
    wanted = native_logits(generation, config, native_tensors(generation, config, seed=0, padded=True), ids)
    engine = _engine(folder, max_model_len=320, max_prefill_chunk=100)
    result = drive(engine, [request("a", ids, GREEDY, return_logits=True)])["a"]
    assert result.logits is not None and (result.logits - wanted).abs().max().item() < TOLERANCE


def test_every_generation_differs_from_every_other(tmp_path: Path) -> None:
    """The comparisons have power: the constants of another generation give other logits."""
    tensors, ids = native_tensors(4, SIZES, seed=0, padded=True), _ids(60, 0)
    config = {**SIZES, "window_pattern": "S"}
    logits = [native_logits(generation, config, tensors, ids) for generation in (3, 4)]
    assert (logits[0] - logits[1]).abs().max() > 0.1


def _shapes(generation: int) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in native_tensors(generation, SIZES, seed=0, padded=True).items()}


@pytest.mark.parametrize("generation", range(5))
def test_the_generation_is_seen_in_names_and_shapes(generation: int) -> None:
    assert detect_generation(_shapes(generation)) == generation


@pytest.mark.parametrize(
    ("generation", "remove", "add", "word"),
    [
        (1, ["x0_lambdas"], {}, "x0_lambdas"),
        (2, ["resid_lambdas", "x0_lambdas"], {}, "resid_lambdas"),
        (4, ["smear_lambda"], {}, "smear_lambda"),
        (1, [], {"value_embed_A.weight": (8, 8)}, "16 January"),
        (1, [], {"v0_lambdas": (4,)}, "16 January"),
        (2, [], {"transformer.h.1.attn.ve_gate.weight": (2, 16)}, "16, 32 channels"),
        (2, [], {"smear_gate.weight": (1, 24), "smear_lambda": (1,), "backout_lambda": (1,)}, "beside a smear"),
        (1, [], {"value_embeds.1.weight": (8, 8)}, "ve_gate"),
        (1, [], {"smear_gate.weight": (1, 24), "smear_lambda": (1,), "backout_lambda": (1,)}, "no value embeddings"),
    ],
)
def test_what_fits_no_generation_is_refused(
    generation: int, remove: list[str], add: dict[str, tuple[int, ...]], word: str
) -> None:
    shapes = {name: shape for name, shape in _shapes(generation).items() if name not in remove} | add
    with pytest.raises(ModelNotSupported, match=word) as caught:
        detect_generation(shapes)
    assert "config_overrides" in str(caught.value)


def test_the_user_may_name_generation_and_soft_cap(tmp_path: Path) -> None:
    """The week of generation 2 with a cap of 20 cannot be told by the tensors; nor can a gate of one's own width."""
    folder, ids = make_native_nanochat(tmp_path, 2), _ids(40, 3)
    wanted = native_logits(2, SIZES, native_tensors(2, SIZES, seed=0, padded=True), ids, cap=20.0)
    engine = _engine(folder, config_overrides={"generation": 2, "final_logit_softcapping": 20})
    result = drive(engine, [request("a", ids, GREEDY, return_logits=True)])["a"]
    assert result.logits is not None and (result.logits - wanted).abs().max().item() < TOLERANCE
    with pytest.raises(ModelNotSupported, match="generation is 5"):
        _engine(folder, config_overrides={"generation": 5})
    with pytest.raises(CheckpointError, match=r"missing: smear_gate\.weight"):
        _engine(folder, config_overrides={"generation": 4})


def test_a_week_that_tensors_cannot_tell_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _engine(make_native_nanochat(tmp_path, 2))
    assert "final_logit_softcapping" in caplog.text


def test_the_last_step_is_served_and_needs_its_meta_file(tmp_path: Path) -> None:
    make_native_nanochat(tmp_path, 1, step=9, seed=1)
    folder = make_native_nanochat(tmp_path, 4, step=100)
    assert "smear_lambda" in open_model(folder).tensors
    (folder / "meta_000100.json").unlink()
    with pytest.raises(CheckpointError, match=r"meta_000100\.json is missing"):
        open_model(folder)
    (folder / "meta_000100.json").write_text(json.dumps({"step": 100}))
    with pytest.raises(ModelNotSupported, match="model_config"):
        open_model(folder)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"n_head": 3, "n_kv_head": 2}, "multiple"),
        ({"window_pattern": "SX"}, "L and S"),
        ({"n_layer": 0}, "n_layer"),
        ({"sequence_len": None}, "sequence_len"),
    ],
)
def test_sizes_that_make_no_sense_are_refused_by_name(change: dict[str, Any], word: str, tmp_path: Path) -> None:
    folder = make_native_nanochat(tmp_path, 4)
    with pytest.raises(ModelNotSupported, match=word):
        _engine(folder, config_overrides=change)


@pytest.mark.parametrize("name", ["transformer.h.2.mlp.c_fc.weight", "value_embeds.3.weight", "transformer.wte.weight"])
def test_missing_and_unexpected_tensors_are_named(name: str, tmp_path: Path) -> None:
    folder = make_native_nanochat(tmp_path, 4)
    tensors = native_tensors(4, SIZES, seed=0, padded=True)
    tensors["rotary.weight"] = tensors.pop(name)
    torch.save(tensors, folder / "model_000007.pt")
    with pytest.raises((CheckpointError, ModelNotSupported)) as caught:
        _engine(folder)
    assert name in str(caught.value)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = make_native_nanochat(tmp_path, 4)
    torch.save({"a": Path("x")}, folder / "model_000007.pt")
    with pytest.raises(CheckpointError, match=r"model_000007\.pt cannot be read"):
        _engine(folder)
