"""What the C twins are not made for is a ValueError: a pointer carries no dtype, no shape and no end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels._native import linear, norm, paged_attention, pages, rotary, selective_scan
from kernels._native.limits import MAX_ROWS
from kernels.dispatch import forced
from kernels.pages import write_pages

HALF, FULL = torch.bfloat16, torch.float32


def _of(*shape: int, dtype: torch.dtype = FULL) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def _plain() -> dict[str, Any]:
    return {"x": _of(2, 8, dtype=HALF), "weight": _of(6, 8, dtype=HALF), "bias": _of(6, dtype=HALF)}


def _mixed() -> dict[str, Any]:
    return {"x": _of(2, 8), "weight": _of(6, 8, dtype=HALF), "bias": _of(6)}


def _int8() -> dict[str, Any]:
    return {"x": _of(2, 8), "weight": _of(6, 8, dtype=torch.int8), "scales": _of(6), "bias": _of(6)}


def _int4() -> dict[str, Any]:
    numbers = {"packed": _of(6, 32, dtype=torch.uint8), "zeros": _of(6, 2, dtype=torch.uint8)}
    return {"x": _of(2, 64), **numbers, "scales": _of(6, 2), "bias": _of(6)}


def _norm() -> dict[str, Any]:
    return {"x": _of(2, 3, 8), "weight": _of(3, 8), "eps": 1e-6}


def _add_norm() -> dict[str, Any]:
    return {"x": _of(2, 8), "residual": _of(2, 8), "weight": _of(8), "eps": 1e-6}


def _rotation() -> dict[str, Any]:
    return {"x": _of(2, 3, 8), "cos": _of(2, 1, 8), "signed_sin": _of(2, 1, 8)}


def _writing() -> dict[str, Any]:
    return {
        "k_cache": _of(2, 4, 3, 8),
        "v_cache": _of(2, 4, 3, 8),
        "k": _of(2, 3, 8),
        "v": _of(2, 3, 8),
        "slots": torch.tensor([1, 6]),
    }


def _attention() -> dict[str, Any]:
    return {
        "q": _of(3, 6, 8),
        "k_cache": _of(2, 4, 3, 8),
        "v_cache": _of(2, 4, 3, 8),
        "out": _of(3, 6, 8),
        "page_table": torch.tensor([[0, 1], [1, 7]]),
        "windows": torch.tensor([[1, 2], [5, 4], [0, 1]]),
        "scale": 1.0,
    }


def _scan() -> dict[str, Any]:
    return {
        "x": _of(5, 6, dtype=HALF),
        "dt": _of(5, 6, dtype=HALF),
        "b": _of(5, 4, dtype=HALF),
        "c": _of(5, 4, dtype=HALF),
        "a": -_of(6, 4),
        "skip": _of(6),
        "states": _of(3, 6, 4),
        "spans": torch.tensor([[0, 2, 2], [2, 3, 0]]),
        "dt_bias": _of(6),
        "gate": _of(5, 6, dtype=HALF),
    }


OPS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "linear": (linear.linear, _plain),
    "mixed_linear": (linear.mixed_linear, _mixed),
    "int8_linear": (linear.int8_linear, _int8),
    "int4_linear": (linear.int4_linear, _int4),
    "rms_norm": (norm.rms_norm, _norm),
    "add_rms_norm": (norm.add_rms_norm, _add_norm),
    "rotate": (rotary.rotate, _rotation),
    "write_pages": (pages.write_pages, _writing),
    "paged_attention": (paged_attention.paged_attention, _attention),
    "selective_scan": (selective_scan.selective_scan, _scan),
}
WRONG: list[tuple[str, str, torch.Tensor]] = [
    ("linear", "weight", _of(6, 8)),
    ("linear", "weight", _of(6, 9, dtype=HALF)),
    ("linear", "weight", _of(8, 6, dtype=HALF).T),
    ("linear", "weight", _of(3, 8, dtype=HALF)),
    ("linear", "x", _of(MAX_ROWS + 1, 8, dtype=HALF)),
    ("linear", "bias", _of(6)),
    ("linear", "bias", _of(5, dtype=HALF)),
    ("mixed_linear", "weight", _of(6, 8)),
    ("mixed_linear", "x", _of(2, 8, dtype=HALF)),
    ("mixed_linear", "bias", _of(6, dtype=HALF)),
    ("int8_linear", "weight", _of(6, 9, dtype=torch.int8)),
    ("int8_linear", "weight", _of(6, 8)),
    ("int8_linear", "scales", _of(6, dtype=HALF)),
    ("int8_linear", "scales", _of(5)),
    ("int8_linear", "bias", _of(6, dtype=HALF)),
    ("int4_linear", "packed", _of(6, 31, dtype=torch.uint8)),
    ("int4_linear", "scales", _of(6, 3)),
    ("int4_linear", "scales", _of(6, 2, dtype=torch.float64)),
    ("int4_linear", "bias", _of(6, dtype=torch.float16)),
    ("int4_linear", "zeros", _of(6, 3, dtype=torch.uint8)),
    ("int4_linear", "zeros", _of(6, 2)),
    ("rms_norm", "weight", _of(3, 8, dtype=HALF)),
    ("rms_norm", "weight", _of(3, 9)),
    ("rms_norm", "weight", _of(2, 8)),
    ("add_rms_norm", "residual", _of(2, 8, dtype=HALF)),
    ("add_rms_norm", "residual", _of(1, 8)),
    ("add_rms_norm", "residual", _of(8, 2).T),
    ("add_rms_norm", "weight", _of(7)),
    ("rotate", "cos", _of(2, 1, 8, dtype=HALF)),
    ("rotate", "signed_sin", _of(2, 1, 4)),
    ("rotate", "cos", _of(1, 1, 8)),
    ("write_pages", "k_cache", _of(2, 4, 3, 8, dtype=HALF)),
    ("write_pages", "v_cache", _of(2, 4, 2, 8)),
    ("write_pages", "v_cache", _of(2, 3, 4, 8).transpose(1, 2)),
    ("write_pages", "v", _of(2, 3, 8, dtype=HALF)),
    ("write_pages", "v", _of(1, 3, 8)),
    ("write_pages", "slots", torch.tensor([1, 6], dtype=torch.int32)),
    ("write_pages", "slots", torch.tensor([1])),
    ("paged_attention", "k_cache", _of(2, 4, 3, 8, dtype=HALF)),
    ("paged_attention", "v_cache", _of(1, 4, 3, 8)),
    ("paged_attention", "q", _of(3, 5, 8)),
    ("paged_attention", "q", _of(3, 6, 9)),
    ("paged_attention", "out", _of(3, 6, 8, dtype=HALF)),
    ("paged_attention", "page_table", torch.tensor([[0, 1], [1, 7]], dtype=torch.int32)),
    ("paged_attention", "page_table", torch.tensor([[0], [1]])),
    ("paged_attention", "page_table", torch.tensor([[0, 2], [1, 7]])),
    ("paged_attention", "page_table", torch.tensor([[0, -1], [1, 7]])),
    ("paged_attention", "windows", torch.tensor([[1, 2], [5, 4], [0, 2]])),
    ("paged_attention", "windows", torch.tensor([[1, 2], [5, 1], [0, 1]])),
    ("paged_attention", "windows", torch.tensor([[1], [5], [0]])),
    ("selective_scan", "x", _of(5, 6)),
    ("selective_scan", "x", _of(5, 7, dtype=HALF)),
    ("selective_scan", "x", _of(5, 6, dtype=torch.float16)),
    ("selective_scan", "dt", _of(5, 6)),
    ("selective_scan", "dt", _of(6, 5, dtype=HALF)),
    ("selective_scan", "dt_bias", _of(6, dtype=HALF)),
    ("selective_scan", "dt_bias", _of(5)),
    ("selective_scan", "gate", _of(5, 6)),
    ("selective_scan", "gate", _of(4, 6, dtype=HALF)),
    ("selective_scan", "b", _of(5, 3, dtype=HALF)),
    ("selective_scan", "c", _of(4, 4, dtype=HALF)),
    ("selective_scan", "a", -_of(6, 300)),
    ("selective_scan", "skip", _of(6, dtype=HALF)),
    ("selective_scan", "states", _of(3, 6, 4, dtype=HALF)),
    ("selective_scan", "states", _of(3, 4, 6).transpose(1, 2)),
    ("selective_scan", "spans", torch.tensor([[0, 2, 2], [2, 3, 0]], dtype=torch.int32)),
    ("selective_scan", "spans", torch.tensor([[0, 2, 3], [2, 3, 0]])),
    ("selective_scan", "spans", torch.tensor([[0, 2, 2], [2, 3, -1]])),
    ("selective_scan", "spans", torch.tensor([[0, 2, 2], [2, 4, 0]])),
    ("selective_scan", "spans", torch.tensor([[-1, 2, 2], [2, 3, 0]])),
]


@pytest.mark.parametrize("op", OPS)
def test_what_fits_is_taken(op: str) -> None:
    function, arguments = OPS[op]
    function(**arguments())


@pytest.mark.parametrize(
    ("op", "name", "wrong"), WRONG, ids=[f"{op}-{name}-{i}" for i, (op, name, _) in enumerate(WRONG)]
)
def test_what_does_not_fit_is_refused(op: str, name: str, wrong: torch.Tensor) -> None:
    function, arguments = OPS[op]
    with pytest.raises(ValueError, match=rf"^{op}: .*{name}"):
        function(**{**arguments(), name: wrong})


@pytest.mark.parametrize("path", ["torch", "native"])
@pytest.mark.parametrize("slot", [8, -1])
def test_no_row_is_written_beside_the_cache(slot: int, path: Any) -> None:
    memory = torch.zeros(4, 4, 3, 8)  # the caches are the inner two pages, so that a mistake harms nobody
    with forced(path), pytest.raises(IndexError, match=r"slot|out of bounds"):
        write_pages(memory[1:3], memory[1:3], _of(1, 3, 8), _of(1, 3, 8), torch.tensor([slot]))
    assert not memory.any()


def test_slots_any_distance_apart_are_followed() -> None:
    k_cache, v_cache, slots = torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 3, 8), torch.tensor([1, 0, 6, 0])[::2]
    with forced("native"):
        write_pages(k_cache, v_cache, _of(2, 3, 8), _of(2, 3, 8), slots)
    assert torch.nonzero(k_cache.view(8, -1)[:, 0]).flatten().tolist() == [1, 6]
