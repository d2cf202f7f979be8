"""A long prompt: the reference's numbers, in memory that grows with its length and not with the square of it."""

from pathlib import Path

import pytest
import torch

from tests.language_worker.helpers import GREEDY, drive, make_engine, prompt, request
from tests.memory import peak_rise
from tests.profiles import IS_SOAK
from tests.tiny_text_models import make_text_model, text_reference
from tests.tiny_tokenizer import NUM_TOKENS

MIB = 1 << 20
LENGTHS = [(4_000, 32 * MIB), *([(32_768, 96 * MIB)] if IS_SOAK else [])]  # scores of one chunk are 1 GiB at 32k tokens
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(("length", "bound"), LENGTHS)
@pytest.mark.parametrize("scaling", [{}, {"rope_scaling": YARN}], ids=["plain", "yarn"])
def test_a_long_prompt_stays_within_its_memory(length: int, bound: int, scaling: dict, tmp_path: Path) -> None:
    folder = make_text_model(tmp_path, "llama", vocab_size=NUM_TOKENS, max_position_embeddings=33_000, **scaling)
    ids = prompt(length, vocab=NUM_TOKENS)
    engine = make_engine(folder, kv_cache_tokens=length + 64, max_model_len=length + 64)
    drive(engine, [request("warm", prompt(300), GREEDY)])
    with peak_rise() as peak:
        result = drive(engine, [request("long", ids, GREEDY)])["long"]
    assert result.error is None
    assert peak.num_bytes < bound, f"{peak.num_bytes / MIB:.0f} MiB"
    with torch.no_grad():
        model = text_reference(folder)
        model.generation_config.eos_token_id = None
        expected = model.generate(torch.tensor([ids]), max_new_tokens=GREEDY.max_tokens, do_sample=False)
    assert result.tokens() == expected[0, length:].tolist()
