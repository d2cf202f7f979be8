"""A vocabulary padded beyond the tokenizer, as published checkpoints have it: ids of no token never come out.

Two of its padding rows point in opposite directions and are long, so that at every position one of them has the
largest logit by far; transformers, which does not know the tokenizer, would choose it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from language_worker.sampling_params import SamplingParams
from tests.language_worker.helpers import drive, make_engine, prompt, request
from tests.tiny_models import make_qwen2_5_vl
from tests.tiny_tokenizer import NUM_TOKENS

LENGTH = 12


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_qwen2_5_vl(tmp_path_factory.mktemp("padded"), vocab_size=NUM_TOKENS + 6)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    direction = torch.randn(tensors["lm_head.weight"].shape[1], generator=torch.Generator().manual_seed(1))
    tensors["lm_head.weight"][NUM_TOKENS + 2] = 1000 * direction
    tensors["lm_head.weight"][NUM_TOKENS + 5] = -1000 * direction
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 1.0, "seed": 3},
        {"top_p": 0.9, "seed": 4},
    ],
)
def test_ids_beyond_the_tokenizer_are_not_generated(padded: Path, values: dict) -> None:
    engine = make_engine(padded)
    sampling = SamplingParams(max_tokens=LENGTH, ignore_eos=True, **values)
    results = drive(engine, [request("r", prompt(9), sampling, return_logits=True)])
    tokens = results["r"].tokens()
    assert len(tokens) == LENGTH and max(tokens) < NUM_TOKENS
    logits = results["r"].logits
    assert logits is not None and bool((logits.argmax(-1) >= NUM_TOKENS).all()), "the padding rows had to win"
    if values.get("temperature") == 0:
        assert tokens[0] == int(logits[-1, :NUM_TOKENS].argmax())
