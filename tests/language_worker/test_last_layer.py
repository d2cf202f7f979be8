"""A prefill's last layer goes on with the positions whose logits somebody wants, and with no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from language_worker.models import feed_forward
from tests.language_worker.helpers import SamplingParams, drive, make_engine, prompt, request
from tests.tiny_models import make_qwen2_5_vl

ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
LAYERS = 3


@pytest.fixture
def rows_of_mlps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each MLP saw, in order."""
    seen: list[int] = []
    swiglu = feed_forward.swiglu

    def recording(gate_up: torch.Tensor) -> torch.Tensor:
        seen.append(gate_up.shape[0])
        return swiglu(gate_up)

    monkeypatch.setattr(feed_forward, "swiglu", recording)
    return seen


def test_of_a_prompt_only_the_last_position_goes_on(tmp_path: Path, rows_of_mlps: list[int]) -> None:
    engine = make_engine(make_qwen2_5_vl(tmp_path, num_hidden_layers=LAYERS), prefix_cache=False)
    drive(engine, [request("a", prompt(40), ONE_TOKEN)])
    assert rows_of_mlps == [40, 40, 1]


def test_of_two_prompts_one_position_each_and_of_wanted_logits_all(tmp_path: Path, rows_of_mlps: list[int]) -> None:
    engine = make_engine(make_qwen2_5_vl(tmp_path, num_hidden_layers=LAYERS), prefix_cache=False)
    wanted = request("b", prompt(7, seed=2), ONE_TOKEN, return_logits=True)
    results = drive(engine, [request("a", prompt(40), ONE_TOKEN), wanted, request("c", prompt(9, seed=3), ONE_TOKEN)])
    assert rows_of_mlps == [56, 56, 1 + 7 + 1]
    logits = results["b"].logits
    assert logits is not None and int(logits[-1].argmax()) == results["b"].tokens()[0]
    alone = {
        name: drive(engine, [request(name, ids, ONE_TOKEN)])[name].tokens()
        for name, ids in (("a", prompt(40)), ("c", prompt(9, seed=3)))
    }
    assert alone == {name: results[name].tokens() for name in alone}


def test_a_chunk_in_the_middle_of_a_prompt_is_computed_whole(tmp_path: Path, rows_of_mlps: list[int]) -> None:
    folder = make_qwen2_5_vl(tmp_path, num_hidden_layers=LAYERS)
    engine = make_engine(folder, prefix_cache=False, max_prefill_chunk=32)
    drive(engine, [request("a", prompt(60), ONE_TOKEN)])
    assert rows_of_mlps[:3] == [32, 32, 32] and rows_of_mlps[3:] == [28, 28, 1]
