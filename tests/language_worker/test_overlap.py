"""Prefill on the arrived prefix, in virtual time: how much of a slow transfer of embedding rows it hides.

A step costs what its tokens cost and a fixed part (the weights are read for however few); rows arrive in blocks at an
even pace. Nothing here depends on how fast this machine is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from language_worker.api import TokenChunk
from language_worker.plan import StepPlan
from language_worker.step_logits import StepLogits
from tests.language_worker.helpers import GREEDY, ManualClock, Media, make_engine, prompt, request
from tests.tiny_tokenizer import TOKEN_IDS

NUM_ROWS = 1600
TOKEN_S = 0.001
STEP_S = 16 * TOKEN_S
AT_ONCE_S = STEP_S + (NUM_ROWS + 6) * TOKEN_S
IDS = (*prompt(3), TOKEN_IDS["<|image_pad|>"], *prompt(3))


@pytest.fixture(scope="module")
def media() -> Media:
    rows = torch.randn(NUM_ROWS, 64, generator=torch.Generator().manual_seed(1))
    return Media(grids=[(1, 2, 2 * NUM_ROWS)], rows=rows)


def _first_token(folder: Path, media: Media, transfer_s: float, block: int, **settings: Any) -> tuple[float, list[int]]:
    """Seconds to the first token, and that token; the last rows arrive after `transfer_s`."""
    clock = ManualClock()
    engine = make_engine(folder, clock=clock, kv_cache_tokens=2048, max_model_len=2048, prefix_cache=False, **settings)
    engine.runner.run = _costing(clock, engine.runner.run)  # type: ignore[method-assign]
    began, written = clock.now, 0
    engine.submit(request("a", IDS, GREEDY, num_media=1))
    engine.announce("a", NUM_ROWS, media.items())
    while True:
        report = engine.step()
        for output in report.outputs:
            if isinstance(output, TokenChunk):
                return clock.now - began, list(output.token_ids)
        if not report.did_run:
            clock.now = max(clock.now, began + transfer_s * min(written + block, NUM_ROWS) / NUM_ROWS)
        buffer = engine.media_buffer("a")
        assert buffer is not None
        while written < NUM_ROWS:
            end = min(written + block, NUM_ROWS)
            if began + transfer_s * end / NUM_ROWS > clock.now:
                break
            buffer.write(written, media.rows[written:end])
            written = end


def _costing(clock: ManualClock, run: Callable[[StepPlan], StepLogits]) -> Callable[[StepPlan], StepLogits]:
    def timed(plan: StepPlan) -> StepLogits:
        clock.now += STEP_S + plan.num_tokens * TOKEN_S
        return run(plan)

    return timed


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("pace", [0.5, 0.8, 1.0])
def test_most_of_a_throttled_transfer_is_hidden(pace: float, block: int, tiny: Path, media: Media) -> None:
    at_once, expected = _first_token(tiny, media, 0.0, block)
    assert at_once == pytest.approx(AT_ONCE_S)
    transfer_s = pace * AT_ONCE_S
    waiting, late = _first_token(tiny, media, transfer_s, block, min_partial_chunk=2048)
    assert waiting == pytest.approx(transfer_s + AT_ONCE_S), "the yardstick overlaps nothing"
    overlapping, early = _first_token(tiny, media, transfer_s, block)
    assert early == late == expected
    hidden = (waiting - overlapping) / transfer_s
    assert 0.7 <= hidden <= 1.0, hidden


def test_a_transfer_slower_than_the_computation_hides_the_computation(tiny: Path, media: Media) -> None:
    transfer_s = 3 * AT_ONCE_S
    overlapping, _ = _first_token(tiny, media, transfer_s, 128)
    assert overlapping - transfer_s <= 0.15 * AT_ONCE_S, "what is left to compute when the last rows arrive"
