"""A long list of mixed prompts through `LLM.generate`: every answer as if asked alone, a progress bar, flat memory."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from cluster import LLM
from tests.cluster.ledger import await_empty
from tests.cluster.test_llm import MODEL, SETTINGS, _mixed, _what
from tests.memory import resident_bytes
from tests.profiles import IS_SOAK

ROUNDS = 3
NUM_REQUESTS, NUM_CHECKED = (700, 35) if IS_SOAK else (60, 5)  # of a round
FLAT_BYTES = 32 << 20
# What a finished request may leave behind. The allocator takes a large piece now and then, but not in every round.
BYTES_PER_REQUEST = 30 << 10
LARGE_PAGE = 2 << 20  # in which the kernel may hand out memory: one in every round shows nothing
CACHES = {"kv_cache_tokens": 1024, "cache_tokens": 512}  # soon full, so that nothing of them is touched late


@pytest.fixture
def llm() -> Iterator[LLM]:
    before = torch.get_num_threads()
    with LLM(model=MODEL, **SETTINGS | CACHES) as llm:
        yield llm
    torch.set_num_threads(before)


def test_many_mixed_requests_in_flat_memory(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(3)
    llm.generate(*_mixed(rng, max(100, NUM_REQUESTS)))  # every cache is full once, and as many were there at once
    rises: list[int] = []
    for _ in range(ROUNDS):
        prompts, params = _mixed(rng, NUM_REQUESTS)
        before = resident_bytes()
        answers = llm.generate(prompts, params, use_progress=True)
        rises.append(resident_bytes() - before)
        assert len(answers) == NUM_REQUESTS
        assert f"{NUM_REQUESTS}/{NUM_REQUESTS}" in capsys.readouterr().out
        for i in rng.sample(range(NUM_REQUESTS), NUM_CHECKED):
            (alone,) = llm.generate([prompts[i]], params[i])
            assert _what(alone) == _what(answers[i]), f"request {i}"
    await_empty(llm)
    most = NUM_REQUESTS * BYTES_PER_REQUEST + LARGE_PAGE
    assert sum(rises) < FLAT_BYTES and min(rises) < most, f"{rises} bytes more"
