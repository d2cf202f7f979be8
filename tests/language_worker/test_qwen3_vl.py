"""The text half of Qwen3-VL by itself: deepstack planes are the reference's whatever the chunks, caches and company."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from language_worker.errors import MediaFailed, ModelNotSupported
from language_worker.media import MediaRows
from language_worker.models import resolve_model
from tests.language_worker.helpers import GREEDY, make_engine, request
from tests.tiny_models import random_image, reference_inputs
from tests.tiny_qwen3_vl import make_qwen3_vl, qwen3_vl_reference
from tests.tiny_tokenizer import TOKEN_IDS

SIZES = ((57, 90), (120, 41), (86, 84))
PAD = TOKEN_IDS["<|image_pad|>"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A checkpoint, a prompt of three images, the planes of its rows, and what the reference answers."""
    folder = make_qwen3_vl(tmp_path_factory.mktemp("qwen3-vl"), seed=5)
    pieces = ["Look: ", *(random_image(*size, seed=i) for i, size in enumerate(SIZES)), " how many?"]
    inputs = reference_inputs(folder, pieces)
    model = qwen3_vl_reference(folder)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        tower = model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"])
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    ids = inputs["input_ids"][0].tolist()
    return {
        "folder": folder,
        "ids": [token for i, token in enumerate(ids) if token != PAD or ids[i - 1] != PAD],
        "grids": inputs["image_grid_thw"].tolist(),
        "planes": (tower.pooler_output, *tower.deepstack_features),
        "tokens": out[0, len(ids) :].tolist(),
    }


def _answer(case: dict[str, Any], engine: Any, parts: int, copies: int = 1) -> list[list[int]]:
    """The tokens of so many equal requests, whose rows come in so many parts with steps between them."""
    items = [{"grid": grid, "rows": grid[1] * grid[2] // 4} for grid in case["grids"]]
    names = [str(i) for i in range(copies)]
    total = case["planes"][0].shape[0]
    tokens: dict[str, list[int]] = {name: [] for name in names}
    for name in names:
        engine.submit(request(name, case["ids"], GREEDY, num_media=len(items)))
        engine.announce(name, total, items)
    waiting = dict.fromkeys(names, 0)
    while waiting or any(len(found) < 12 for found in tokens.values()):
        for output in engine.step().outputs:
            assert getattr(output, "error", None) is None
            tokens[output.request_id] += getattr(output, "token_ids", ())
        for name, first in list(waiting.items()):
            buffer = engine.media_buffer(name)
            if buffer is not None:
                end = min(total, first + -(-total // parts))
                buffer.write(first, *(plane[first:end] for plane in case["planes"]))
                waiting[name] = end
                if end == total:
                    del waiting[name]
    return list(tokens.values())


@pytest.mark.parametrize(("chunk", "parts"), [(0, 1), (1, 2), (7, 5), (64, 3)])
def test_chunks_and_parts_change_nothing(case: dict[str, Any], chunk: int, parts: int) -> None:
    engine = make_engine(case["folder"], max_prefill_chunk=chunk, min_partial_chunk=1, prefix_cache=False)
    assert _answer(case, engine, parts) == [case["tokens"]]


def test_preempted_sequences_recompute_from_all_planes(case: dict[str, Any]) -> None:
    engine = make_engine(case["folder"], kv_cache_tokens=96, max_model_len=96, page_size=4, prefix_cache=False)
    assert _answer(case, engine, 1, copies=4) == [case["tokens"]] * 4
    assert engine.stats()["num_preemptions_total"] > 0


def test_rows_of_too_few_planes_or_other_shapes_are_refused() -> None:
    rows = MediaRows(4, 8, dtype=torch.float32, device=torch.device("cpu"), num_planes=2)
    good = torch.zeros(2, 8)
    for planes in [(good,), (good, torch.zeros(1, 8)), (good, torch.zeros(2, 7)), (good, good, good)]:
        with pytest.raises(MediaFailed, match="expected row 0 of 2 planes"):
            rows.write(0, *planes)
    rows.write(0, good, good + 1)
    assert rows.num_filled == 2 and bool((rows.rows[1, :2] == 1).all())


def test_more_planes_than_layers_are_refused(tmp_path: Path) -> None:
    config = json.loads((make_qwen3_vl(tmp_path) / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    with pytest.raises(ModelNotSupported, match="2 deepstack_visual_indexes for 1 layers"):
        resolve_model(config).read_spec(config)
