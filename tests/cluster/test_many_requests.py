"""A long list of mixed prompts through `LLM.generate`: every answer as if asked alone, a progress bar, flat memory."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from cluster import LLM
from tests.cluster.test_llm import MODEL, SETTINGS, _await_empty, _mixed, _what
from tests.memory import resident_bytes
from tests.profiles import IS_SOAK

NUM_REQUESTS, NUM_CHECKED = (2000, 100) if IS_SOAK else (120, 12)
FLAT_BYTES = 32 << 20


@pytest.fixture
def llm() -> Iterator[LLM]:
    before = torch.get_num_threads()
    with LLM(model=MODEL, **SETTINGS) as llm:
        yield llm
    torch.set_num_threads(before)


def test_many_mixed_requests_in_flat_memory(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(3)
    llm.generate(*_mixed(rng, max(60, NUM_REQUESTS // 5)))  # every cache is full once
    prompts, params = _mixed(rng, NUM_REQUESTS)
    before = resident_bytes()
    answers = llm.generate(prompts, params, use_progress=True)
    rise = resident_bytes() - before
    assert len(answers) == NUM_REQUESTS and rise < FLAT_BYTES, f"{rise >> 20} MiB more than before"
    assert f"{NUM_REQUESTS}/{NUM_REQUESTS}" in capsys.readouterr().out
    for i in rng.sample(range(NUM_REQUESTS), NUM_CHECKED):
        (alone,) = llm.generate([prompts[i]], params[i])
        assert _what(alone) == _what(answers[i]), f"request {i}"
    _await_empty(llm)
