"""NanoChat in Hugging Face's layout against transformers' own model on random tiny checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster import LLM, SamplingParams
from language_worker.errors import ModelNotSupported
from language_worker.models import resolve_model
from tests.language_worker.helpers import prompt
from tests.tiny_nanochat import make_hf_nanochat
from tests.tiny_text_models import text_reference
from tests.tiny_tokenizer import NUM_TOKENS
from transfer.checkpoint import CheckpointError

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_tokens": 4096}
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1, "num_hidden_layers": 1},
    {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 77},
    {"final_logit_softcapping": 3.0},
    {"final_logit_softcapping": None},
    {"rope_theta": 500.0, "max_position_embeddings": 256},
    {"rms_norm_eps": 1e-4, "vocab_size": NUM_TOKENS},
    {"head_dim": 24, "num_attention_heads": 2},
    {"num_hidden_layers": 5, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2},
]


@pytest.mark.parametrize("index", range(len(SHAPES)))
def test_logits_and_greedy_tokens_equal_transformers(index: int, tmp_path: Path) -> None:
    folder = make_hf_nanochat(tmp_path, seed=index, **SHAPES[index])
    ids = list(prompt(90, seed=index, vocab=NUM_TOKENS))
    model = text_reference(folder)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    with torch.no_grad():
        wanted = model(**inputs).logits[0]
        model.generation_config.eos_token_id = None
        padding = list(range(NUM_TOKENS, wanted.shape[1])) or None
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False, suppress_tokens=padding)
    with LLM(model=str(folder), max_prefill_chunk=(0, 7, 64)[index % 3], **SETTINGS) as llm:
        difference = (llm.logits(ids) - wanted).abs().max().item()
        assert difference < 1e-4, f"logits differ by {difference}"
        (answer,) = llm.generate([ids], GREEDY)
    assert answer.outputs[0].token_ids == out[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden_act": "silu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word"),
        ({"final_logit_softcapping": -1}, "softcapping"),
        ({"num_attention_heads": 3}, "multiple"),
    ],
)
def test_unserved_options_are_refused_by_name(change: dict[str, Any], word: str, tmp_path: Path) -> None:
    config = json.loads((make_hf_nanochat(tmp_path) / "config.json").read_text()) | change
    with pytest.raises(ModelNotSupported, match=word):
        resolve_model(config).read_spec(config)


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    folder = make_hf_nanochat(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.fc3.weight"] = tensors.pop("model.layers.1.mlp.fc2.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"fc3[\s\S]*missing: model\.layers\.1\.mlp\.fc2\.weight"):
        LLM(model=str(folder), **SETTINGS)
