"""How images of any shape are cut, with the published settings: against transformers' own functions, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embedding_worker.tiles import Tiling

PUBLISHED = {"image_aspect_ratio": "anyres_max_4", "image_grid_pinpoints": "(1x1),...,(6x6)"}
TILING = Tiling.from_config(PUBLISHED, side=384, features=27)
PINPOINTS = [(x * 384, y * 384) for x in range(1, 7) for y in range(1, 7)]  # (width, height)
SIZES = st.integers(1, 4000)


def test_pinpoints_may_be_written_in_three_ways() -> None:
    for value in ([list(pair) for pair in PINPOINTS], str(PINPOINTS)):
        assert Tiling.from_config({**PUBLISHED, "image_grid_pinpoints": value}, side=384, features=27) == TILING
    assert len(TILING.canvases) == 36 and TILING.max_squares == 4


@settings(max_examples=80, deadline=None, derandomize=True)
@given(height=SIZES, width=SIZES)
@example(height=1, width=1)
@example(height=4000, width=20)
@example(height=27, width=4000)
def test_it_is_as_transformers_does_it(height: int, width: int) -> None:
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

    best = select_best_resolution((height, width), [(rows, columns) for columns, rows in PINPOINTS])
    down, across = TILING.canvas(height, width)
    assert (down * 384, across * 384) == tuple(best)
    kept = TILING.kept(height, width)
    exact = height * across * 27 / width if width / height > across / down else width * down * 27 / height
    if abs(exact - round(exact)) > 1e-6:  # else the published code and transformers round to different sides
        assert kept == tuple(unpad_image(torch.zeros(1, down * 27, across * 27), (height, width)).shape[1:])
    fitted = TILING.fitted(height, width)
    assert 1 <= fitted[0] <= down * 384 and 1 <= fitted[1] <= across * 384
    assert fitted[0] == down * 384 or fitted[1] == across * 384
    rows, columns = TILING.shrunk(height, width)
    assert math.sqrt(rows * columns / (4 * 27**2)) <= 1.1
    assert TILING.num_rows(height, width) == 729 + rows * (columns + 1)
    assert TILING.num_squares(height, width) == 1 + down * across


def test_an_image_takes_as_many_rows_as_the_page_says() -> None:
    rows = [TILING.num_rows(height, width) - 729 for height in range(20, 4000, 83) for width in range(20, 4000, 79)]
    assert 3400 < max(rows) < 3700


@pytest.mark.parametrize("pinpoints", [None, "", "many", [[384, 0]], [[400, 384]], [[384]], [["384", "384"]], 7])
def test_canvases_that_are_none_are_named(pinpoints: object) -> None:
    with pytest.raises(ValueError, match="image_grid_pinpoints are"):
        Tiling.from_config({**PUBLISHED, "image_grid_pinpoints": pinpoints}, side=384, features=27)
