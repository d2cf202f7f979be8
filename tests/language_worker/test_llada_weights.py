"""LLaDA checkpoints: all tensors accounted for in both layouts, variants honoured or refused, logits right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from language_worker.errors import ModelNotSupported
from language_worker.models import resolve_model
from language_worker.models.llada import Llada
from tests.language_worker.helpers import drive, make_engine, prompt, request
from tests.oracles_llada import LladaOracle
from tests.profiles import IS_SOAK
from tests.tiny_llada import LLAMA_NAMES, MASK_ID, llama_name, make_llada
from transfer.checkpoint import Checkpoint, CheckpointError
from transfer.checkpoint_rules import StoredTensor, plan

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"n_kv_heads": 2},
    "tied": {"weight_tying": True},
    "kv heads left out": {"n_kv_heads": None},
    "other theta": {"rope_theta": 10000.0, "n_layers": 3},
}


@pytest.fixture(scope="module", params=["own", "llama"])
def full_size(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """As many tensors as LLaDA-8B has, each tiny, in five shards."""
    folder = tmp_path_factory.mktemp("full")
    make_llada(folder, layout=request.param, num_shards=5, n_layers=32, d_model=8, n_heads=2, n_kv_heads=2)
    return Checkpoint.open(folder)


def test_every_tensor_of_the_published_count_is_used(full_size: Checkpoint) -> None:
    assert len(full_size.tensors) == 291 and Llada.check(full_size) == 291
    model = Llada.load(full_size, dtype=torch.float32, device=torch.device("cpu"))
    assert len(model.parameters()) == 195


def test_every_tensor_that_is_lacking_renamed_or_misshapen_is_named(full_size: Checkpoint) -> None:
    """Each in turn, and then all at once."""
    model, rules, foreign = Llada.empty(full_size, dtype=torch.float32, device=torch.device("meta"))

    def problems(tensors: dict[str, StoredTensor]) -> list[str]:
        return plan(tensors, model.parameters(), rules, foreign)[2]

    def longer(tensor: StoredTensor) -> StoredTensor:
        return dataclasses.replace(tensor, shape=(*tensor.shape[:-1], tensor.shape[-1] + 1))

    assert problems(dict(full_size.tensors)) == []
    has_own_names = "model.transformer.ln_f.weight" in full_size.tensors
    for name in list(full_size.tensors)[:: 1 if has_own_names or IS_SOAK else 7]:
        tensor = full_size.tensors[name]
        others = {other: kept for other, kept in full_size.tensors.items() if other != name}
        missing = [f"missing: {name}"]
        assert problems(others) == missing
        renamed = f"unexpected: {name}x (the model has no such tensor)"
        assert problems(others | {name + "x": tensor}) == [renamed, *missing]
        (found,) = problems(others | {name: longer(tensor)})
        assert found.startswith(f"wrong shape: {name} is {longer(tensor).shape}")
    found_all = problems({name: longer(tensor) for name, tensor in full_size.tensors.items()})
    assert all(any(text.startswith(f"wrong shape: {name} ") for text in found_all) for name in full_size.tensors)


@pytest.mark.parametrize("layout", ["own", "llama"])
def test_head_and_down_projection_do_not_take_each_other_s_place(tmp_path: Path, layout: str) -> None:
    """A square model, where the two that share a name also share a shape."""
    sizes: dict[str, Any] = {"d_model": 288, "mlp_hidden_size": 288, "embedding_size": 288, "vocab_size": 288}
    folder = make_llada(tmp_path, layout=layout, n_layers=1, n_heads=4, n_kv_heads=4, **sizes)
    model = Llada.load(Checkpoint.open(folder), dtype=torch.float32, device=torch.device("cpu"))
    tensors = load_file(folder / "model.safetensors")
    names = ["model.transformer.ff_out.weight", "model.transformer.blocks.0.ff_out.weight"]
    head, down = (tensors[llama_name(name) if layout == "llama" else name] for name in names)
    assert torch.equal(model.head, head) and torch.equal(model.blocks[0].mlp.down, down)


def test_own_names_map_to_llama_s_one_to_one() -> None:
    assert len(set(LLAMA_NAMES.values())) == len(LLAMA_NAMES) == 9


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["own", "llama"])
def test_logits_are_the_oracle_s(tmp_path: Path, layout: str, variant: str) -> None:
    """At every prompt position, each of which sees the whole prompt."""
    own = make_llada(tmp_path / "own", **VARIANTS[variant])
    folder = own if layout == "own" else make_llada(tmp_path / "llama", layout="llama", **VARIANTS[variant])
    ids = prompt(23, vocab=250)
    result = drive(make_engine(folder), [request("a", ids, return_logits=True)])["a"]
    assert result.error is None and result.logits is not None
    expected = LladaOracle(own)(torch.tensor(ids))
    torch.testing.assert_close(result.logits.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_oracle_is_a_llama_without_a_causal_mask(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = make_llada(tmp_path / "own")
    c = json.loads((folder / "config.json").read_text())
    config = LlamaConfig(
        hidden_size=c["d_model"], num_attention_heads=c["n_heads"], num_hidden_layers=c["n_layers"],
        intermediate_size=c["mlp_hidden_size"], vocab_size=c["vocab_size"], rms_norm_eps=c["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]}, tie_word_embeddings=False,
        max_position_embeddings=512,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    tensors = load_file(folder / "model.safetensors")
    llama.load_state_dict({llama_name(name): tensor for name, tensor in tensors.items()})
    ids = torch.tensor(prompt(19, vocab=250))
    with torch.no_grad():
        expected = llama(ids[None], attention_mask=torch.zeros(1, 1, 19, 19)).logits[0]
        causal = llama(ids[None]).logits[0]
    logits = LladaOracle(folder)(ids)
    torch.testing.assert_close(logits, expected.double(), atol=1e-5, rtol=1e-5)
    assert (causal - expected).abs().max() > 0.1  # the mask matters


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"block_type": "sequential"}, "block_type = 'sequential'"),
        ({"include_qkv_bias": True}, "include_qkv_bias"),
        ({"layer_norm_type": "default"}, "layer_norm_type"),
        ({"alibi": True}, "alibi"),
        ({"activation_type": "gelu"}, "gelu"),
        ({"mask_token_id": None}, "mask_token_id"),
        ({"mask_token_id": 10**6}, "mask_token_id"),
        ({"pad_token_id": MASK_ID}, "must differ"),
    ],
)
def test_what_is_not_served_is_refused(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    folder = make_llada(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | changed
    with pytest.raises(ModelNotSupported, match=named):
        resolve_model(config).read_spec(config)


def test_a_tied_model_with_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = make_llada(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"weight_tying": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"unexpected: model\.transformer\.ff_out\.weight"):
        Llada.load(Checkpoint.open(folder), dtype=torch.float32, device=torch.device("cpu"))
