"""Rows that are put to places, few and many, against an assignment row by row."""

from __future__ import annotations

import pytest
import torch

from kernels.put_rows import FEW_NUMBERS, put_rows


@pytest.mark.parametrize(
    "target_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 400])
@pytest.mark.parametrize("has_strides", [False, True])
def test_rows_go_to_their_places_and_nowhere_else(
    target_dtype: torch.dtype, dtype: torch.dtype, width: int, has_strides: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(50, 2, width, generator=generator).mul_(200).to(dtype)
    target = torch.full((70, 2, width * (1 + has_strides)), 7.0).to(target_dtype)[..., :width]
    rows = rows.transpose(0, 1).contiguous().transpose(0, 1) if has_strides else rows
    assert (rows.numel() > FEW_NUMBERS) == (width == 400)
    places = torch.randperm(70, generator=generator)[:50]
    expected = target.clone()
    for place, row in zip(places.tolist(), rows, strict=True):
        expected[place] = row
    put_rows(target, places, rows)
    assert torch.equal(target.float(), expected.float())


def test_nothing_is_put() -> None:
    target = torch.ones(2, 3)
    put_rows(target, torch.empty(0, dtype=torch.int64), torch.empty(0, 3))
    assert torch.equal(target, torch.ones(2, 3))
