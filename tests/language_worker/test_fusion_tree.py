"""FusionTree against a dense float64 restatement: every option and layout, loading strict both ways, dtypes kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.dispatch import forced
from language_worker.config import EngineConfig
from language_worker.engine import Engine
from language_worker.engine_builder import check_model
from language_worker.errors import EngineError, ModelNotSupported
from language_worker.models.fusion_tree import FusionTreeLayer
from tests.language_worker.helpers import GREEDY, drive, make_engine, prompt, request
from tests.tiny_fusion_tree import SIZES, VARIANTS, VOCAB, logits_of, make_fusion_tree, tensors_of
from tests.tiny_tokenizer import NUM_TOKENS
from transfer.checkpoint import CheckpointError

LAYOUTS = ("training", "bare", "deepspeed")


def _engine(folder: Path, **config: Any) -> Engine:
    return make_engine(folder, **{"max_model_len": 300, "num_threads": 1, **config})


def _check(engine: Engine, config: dict[str, Any], tensors: dict[str, torch.Tensor], length: int) -> None:
    """Logits of a prompt, and the greedy tokens after it."""
    ids = prompt(length, seed=length, vocab=VOCAB)
    result = drive(engine, [request("a", ids, return_logits=True)])["a"]
    assert result.error is None and result.logits is not None
    tokens = result.tokens()
    wanted = logits_of(config, tensors, [*ids, *tokens[:-1]])
    assert (result.logits - wanted[:length]).abs().max() < 1e-4
    assert tokens == wanted[length - 1 :, :NUM_TOKENS].argmax(1).tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "pyramid"])
def test_logits_and_greedy_tokens(variant: str, layout: str, tmp_path: Path) -> None:
    seed = LAYOUTS.index(layout) * 100 + list(VARIANTS).index(variant)
    sizes = {**SIZES, **VARIANTS[variant]}
    folder = make_fusion_tree(tmp_path, seed=seed, layout=layout, **VARIANTS[variant])
    _check(_engine(folder, max_prefill_chunk=(0, 7)[seed % 2]), sizes, tensors_of(sizes, seed=seed), 40)


def test_a_pyramid_of_windows(tmp_path: Path) -> None:
    """Of 512 and 1024 positions: both are left behind."""
    sizes = {**SIZES, **VARIANTS["pyramid"]}
    engine = _engine(make_fusion_tree(tmp_path, **VARIANTS["pyramid"]), max_model_len=640)
    _check(engine, sizes, tensors_of(sizes), 560)


@pytest.mark.parametrize("name", ["window_size", "global_heads", "attention_type"])
def test_windows_and_reach_count(name: str, tmp_path: Path) -> None:
    """The tests above have power: with another window, or one more global head, logits are others."""
    others = {"window_size": 18, "global_heads": 2, "attention_type": "pyramidal"}
    engine = _engine(make_fusion_tree(tmp_path))
    ids = prompt(60, vocab=VOCAB)
    logits = drive(engine, [request("a", ids, return_logits=True)])["a"].logits
    wanted = logits_of({**SIZES, name: others[name]}, tensors_of(SIZES), ids)
    assert logits is not None and (logits - wanted).abs().max() > 0.01


def test_which_file_of_a_training_run_is_taken(tmp_path: Path) -> None:
    """The last step, unless there is a final one, unless one was called the best."""
    ids = prompt(9, vocab=VOCAB)

    def logits() -> torch.Tensor:
        result = drive(_engine(tmp_path), [request("a", ids, return_logits=True)])["a"].logits
        assert result is not None
        return result

    for seed, name in enumerate(("checkpoint_step_900.pt", "checkpoint_step_1000.pt", "final_model.pt")):
        make_fusion_tree(tmp_path, seed=seed, file_name=name)
        assert (logits() - logits_of(SIZES, tensors_of(SIZES, seed=seed), ids)).abs().max() < 1e-4, name
    (tmp_path / "best_model.pt").symlink_to("checkpoint_step_900.pt")
    assert (logits() - logits_of(SIZES, tensors_of(SIZES, seed=0), ids)).abs().max() < 1e-4


# -- what cannot be loaded is an error --------------------------------------------------------------------------------


def _rewrite(folder: Path, **changes: Any) -> None:
    """Change tensors (None: remove) of a bare map."""
    tensors = torch.load(folder / "checkpoint_step_40.pt", weights_only=True)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    torch.save(tensors, folder / "checkpoint_step_40.pt")


NAMES = sorted(
    name
    for name in tensors_of(SIZES)
    if not name.startswith("layers.1") and ".srte." not in name and "rope" not in name
)


def test_every_tensor_is_needed_and_named(tmp_path: Path) -> None:
    folder = make_fusion_tree(tmp_path, layout="bare")
    kept = torch.load(folder / "checkpoint_step_40.pt", weights_only=True)
    for name in NAMES:
        if name in ("layers.0.mamba.A_log", "layers.0.attention.q_proj.weight"):
            continue  # what the family is told by
        torch.save({n: t for n, t in kept.items() if n != name}, folder / "checkpoint_step_40.pt")
        with pytest.raises((CheckpointError, ModelNotSupported)) as caught:
            check_model(folder, EngineConfig())
        assert name in str(caught.value) or "config.json" in str(caught.value), (name, caught.value)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("layers.0.extra.weight", torch.zeros(3), "unexpected: layers.0.extra.weight"),
        ("layers.1.mamba.D", torch.zeros(63), "wrong shape: layers.1.mamba.D"),
        ("layers.0.mamba.conv1d.weight", torch.zeros(64, 2, 4), "wrong shape: layers.0.mamba.conv1d.weight"),
        ("layers.0.mamba.A_log", torch.zeros(64, 16), "wrong shape: layers.0.mamba.A_log"),
        ("shared_srte.freqs", torch.zeros(1, 99, 32), "wrong shape: shared_srte.freqs"),
        ("lm_head.weight", torch.zeros(VOCAB + 1, 32), "wrong shape: lm_head.weight"),
        ("layers.1.gate.u.weight", None, "missing: layers.1.gate.u.weight"),
        ("layers.1.alignment.residual_proj.bias", None, "missing: layers.1.alignment.residual_proj.bias"),
    ],
)
def test_what_does_not_fit_is_named(name: str, tensor: torch.Tensor | None, words: str, tmp_path: Path) -> None:
    folder = make_fusion_tree(tmp_path, layout="bare")
    _rewrite(folder, **{name: tensor})
    with pytest.raises(CheckpointError, match=words):
        _engine(folder)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"num_heads": 5}, "num_heads = 5"),
        ({"num_heads": 32}, "num_heads = 32"),
        ({"attention_type": "dense"}, "'dense'"),
        ({"srte_encoding": "rotary"}, "'rotary'"),
        ({"window_size": 0}, "window_size"),
        ({"global_heads": -1}, "global_heads = -1"),
        ({"global_heads": None}, "global_heads"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps = 'small'"),
        ({"num_layers": "2"}, "num_layers = '2'"),
    ],
)
def test_what_the_configuration_says_is_judged(sizes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = make_fusion_tree(tmp_path, layout="bare")
    with pytest.raises(ModelNotSupported, match=words):
        make_engine(folder, config_overrides=sizes)


def test_numbers_that_yaml_reads_as_strings(tmp_path: Path) -> None:
    folder = make_fusion_tree(tmp_path, layer_norm_eps="1e-5")
    _check(_engine(folder), SIZES, tensors_of(SIZES), 20)


def test_weights_alone_need_what_they_do_not_say(tmp_path: Path) -> None:
    folder = make_fusion_tree(tmp_path, layout="bare")
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotSupported, match=r"window_size, global_heads.*config_overrides"):
        _engine(folder)
    engine = _engine(folder, config_overrides={"window_size": 16, "global_heads": 1})
    _check(engine, SIZES, tensors_of(SIZES), 30)


@pytest.mark.parametrize("damage", ["cut", "empty", "pickle"])
def test_a_damaged_file_is_an_error_and_no_random_model(damage: str, tmp_path: Path) -> None:
    folder = make_fusion_tree(tmp_path)
    path = folder / "checkpoint_step_40.pt"
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "pickle": b"\x80\x04cos\nsystem\n."}[damage])
    with pytest.raises(CheckpointError, match=r"checkpoint_step_40\.pt"):
        _engine(folder)


# -- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_layer_keeps_the_dtype(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def fuse(self: Any, x: torch.Tensor, mamba: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        out = original(self, x, mamba, attended)
        seen.extend(part.dtype for part in (x, mamba, attended, out))
        return out

    original = FusionTreeLayer._fuse
    monkeypatch.setattr(FusionTreeLayer, "_fuse", fuse)
    engine = _engine(make_fusion_tree(tmp_path), dtype=dtype)
    ids = prompt(50, vocab=VOCAB)
    result = drive(engine, [request("a", ids, GREEDY), request("b", ids, return_logits=True)])["b"]
    assert set(seen) == {getattr(torch, dtype)}
    store = engine.runner.states
    assert store is not None
    assert {tensor.dtype for layer in store.layers for tensor in layer} == {getattr(torch, dtype), torch.float32}
    assert result.logits is not None
    wanted = logits_of(SIZES, tensors_of(SIZES), ids)
    assert (result.logits - wanted).abs().mean() < (0.1 if dtype == "bfloat16" else 0.02)


# -- state ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fusion_tree(tmp_path_factory.mktemp("fusion"))


def test_what_recurrent_state_cannot_do_is_refused_or_off(folder: Path) -> None:
    with pytest.raises(ModelNotSupported, match="recurrent state"):
        _engine(folder, decode_strategy="speculative")
    with pytest.raises(ModelNotSupported, match="recurrent state"):
        _engine(folder, draft_model=str(folder))
    with pytest.raises(ModelNotSupported, match="quantization"):
        _engine(folder, quantization="int8")
    engine = _engine(folder, prefix_cache=True)
    for name in ("a", "b"):
        result = drive(engine, [request(name, prompt(99, vocab=VOCAB))])[name]
        assert isinstance(result.error, EngineError) is False and result.done is not None
    assert engine.stats()["prefix_cache_hits_total"] == engine.stats()["kv_pages_cached"] == 0


def test_a_decode_step_reads_no_more_of_a_longer_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of windows and state: keys that attention is asked for, and numbers of state, do not grow."""
    folder = make_fusion_tree(tmp_path, global_heads=0)
    engine = _engine(folder, page_size=4)
    asked: list[int] = []

    def attend(q: torch.Tensor, k: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        asked.append(k.shape[-2])
        return original(q, k, *rest, **options)

    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    read = []
    for length in (30, 100, 250):
        with forced("torch"):
            result = drive(engine, [request(f"r{length}", prompt(length, vocab=VOCAB))])[f"r{length}"]
        assert result.done is not None
        read.append(asked[-2 * SIZES["num_layers"] :])
    assert read[0] == read[1] == read[2] == [SIZES["window_size"] // 2 + 1] * 2 * SIZES["num_layers"]


def test_what_cannot_be_served_is_found_before_anything_is_loaded(tmp_path: Path) -> None:
    folder = make_fusion_tree(tmp_path)
    with pytest.raises(ModelNotSupported, match="recurrent state"):
        check_model(folder, EngineConfig(decode_strategy="speculative"))
