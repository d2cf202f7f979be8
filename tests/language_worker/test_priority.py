"""Whose turn it is: a smaller priority comes first, and who has waited long enough comes before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from language_worker.api import GenerateRequest
from language_worker.errors import InvalidRequest
from language_worker.sampling_params import MAX_PRIORITY, PRIORITY_S, SamplingParams
from tests.language_worker.helpers import GREEDY, ManualClock, Media, Results, make_engine
from tests.tiny_tokenizer import TOKEN_IDS


def order_of_answers(folder: Path, asked: list[tuple[str, int, float]]) -> list[str]:
    """Who of (name, priority, seconds after the one before) is answered first, with one seat that is taken."""
    clock = ManualClock()
    engine = make_engine(folder, clock=clock, max_num_seqs=1)
    engine.submit(GenerateRequest(request_id="running", prompt_token_ids=(1, 2, 3), sampling=GREEDY))
    results, order = Results(), list[str]()
    results.take(engine.step())
    for name, priority, later_s in asked:
        clock.now += later_s
        sampling = replace(GREEDY, priority=priority)
        engine.submit(GenerateRequest(request_id=name, prompt_token_ids=(1, 2, 3), sampling=sampling))
    while len(order) < 1 + len(asked):
        results.take(engine.step())
        order += [name for name, result in results.items() if result.done is not None and name not in order]
    assert len({tuple(result.tokens()) for result in results.values()}) == 1
    assert order[0] == "running"
    return order[1:]


def test_a_smaller_priority_comes_first(tiny: Path) -> None:
    asked = [("later", 1, 0.0), ("usual", 0, 1.0), ("urgent", -1, 1.0), ("usual too", 0, 0.0)]
    assert order_of_answers(tiny, asked) == ["urgent", "usual", "usual too", "later"]


@pytest.mark.parametrize(("waited_s", "first"), [(2 * PRIORITY_S - 0.5, "urgent"), (2 * PRIORITY_S + 0.5, "patient")])
def test_who_waits_overtakes_priority(tiny: Path, waited_s: float, first: str) -> None:
    assert order_of_answers(tiny, [("patient", 1, 0.0), ("urgent", -1, waited_s)])[0] == first


def test_a_smaller_priority_has_room_for_its_images_first(tiny: Path) -> None:
    """The input buffer holds one request's rows."""
    media = Media(grids=[(1, 4, 4)], rows=torch.zeros(4, 64))
    engine = make_engine(tiny, clock=ManualClock(), rows=4)
    for name, priority in [("holding", 1), ("later", 1), ("usual", 0), ("urgent", -1), ("usual too", 0)]:
        sampling = replace(GREEDY, priority=priority)
        ids = (1, 2, TOKEN_IDS["<|image_pad|>"], 3)
        engine.submit(GenerateRequest(request_id=name, prompt_token_ids=ids, sampling=sampling, num_media=1))
        engine.announce(name, 4, media.items())
        if name == "holding":
            assert Results().take(engine.step()) == [name]
    results, admitted = Results(), ["holding"]
    while sum(result.done is not None for result in results.values()) < 5:
        buffer = engine.media_buffer(admitted[-1])
        if buffer is not None and not buffer.is_full:
            buffer.write(0, media.rows)
        admitted += results.take(engine.step())
    assert admitted == ["holding", "urgent", "usual", "usual too", "later"]


@pytest.mark.parametrize("priority", [MAX_PRIORITY + 1, -MAX_PRIORITY - 1, 0.5, True, None])
def test_a_wrong_priority_is_refused_by_name(priority: object) -> None:
    with pytest.raises(InvalidRequest, match="priority"):
        SamplingParams(priority=priority)  # type: ignore[arg-type]
