"""What does not fit an op is refused on the Triton path, where pointers would lead past its end.

Each case is an op that fits, and one argument in whose place another is given that does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels.activation import swiglu
from kernels.blocks import copy_pages, place_rows, store_rows
from kernels.dispatch import Path, forced
from kernels.norm import add_rms_norm, layer_norm, rms_norm, rms_norm_heads
from kernels.paged_attention import AttentionBatch, paged_attention
from kernels.pages import write_pages
from kernels.quantise import read_quantised_pages, write_quantised_pages
from kernels.rotary import RotaryTable, rotate
from kernels.varlen_attention import varlen_attention
from tests.kernels.paths import PATHS, WITH_NATIVE

TWO = torch.tensor([1, 6])
ZEROS = torch.tensor([0, 0])


def _of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def _every_second(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Not contiguous in its last dimension."""
    return torch.ones((*shape[:-1], 2 * shape[-1]), dtype=dtype)[..., ::2]


def _rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    return rotate(x, RotaryTable(cos=cos, signed_sin=signed_sin))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    batch = AttentionBatch(page_table=torch.tensor([[0, 1]]), query_lens=[2], kv_lens=[5], query_start=[0])
    return paged_attention(q, k, v, batch)


def _copy(cache: torch.Tensor) -> None:
    copy_pages([cache], torch.tensor([0]), torch.tensor([1]))


ROWS = {"out": _of(3, 6), "targets": TWO - 1, "pool": _of(2, 4, 6), "tables": ZEROS[None], "streams": ZEROS}
CACHES = {"k_cache": _of(2, 4, 3, 8), "v_cache": _of(2, 4, 3, 8)}
NARROW = {"cache": _of(2, 4, 3, 8, dtype=torch.int8), "scales": _of(2, 4, 3)}
OPS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "rotate": (_rotate, {"x": _of(2, 3, 8), "cos": _of(2, 1, 8), "signed_sin": _of(2, 1, 8)}),
    "write_pages": (write_pages, {**CACHES, "k": _of(2, 3, 8), "v": _of(2, 3, 8), "slots": TWO}),
    "rms_norm": (rms_norm, {"x": _of(2, 8), "weight": _of(8), "eps": 1e-6}),
    "add_rms_norm": (add_rms_norm, {"x": _of(2, 8), "residual": _of(2, 8), "weight": _of(8), "eps": 1e-6}),
    "rms_norm_heads": (rms_norm_heads, {"x": _of(2, 3, 8), "weight": _of(3, 8), "eps": 1e-6}),
    "layer_norm": (layer_norm, {"x": _of(2, 8), "weight": _of(8), "bias": _of(8), "eps": 1e-6}),
    "paged_attention": (_attend, {"q": _of(2, 6, 8), "k": _of(2, 4, 3, 8), "v": _of(2, 4, 3, 8)}),
    "varlen_attention": (varlen_attention, {**dict.fromkeys("qkv", _of(4, 2, 8)), "cu_seqlens": [0, 3, 4]}),
    "place_rows": (place_rows, {**ROWS, "targets": torch.tensor([2, 0]), "rows": torch.tensor([1, 3])}),
    "store_rows": (
        store_rows,
        {name: ROWS[name] for name in ("pool", "tables", "streams")}
        | {"rows": torch.tensor([1, 3]), "values": _of(2, 6)},
    ),
    "copy_pages": (_copy, {"cache": _of(2, 4, 3)}),
    "write_quantised_pages": (write_quantised_pages, {**NARROW, "x": _of(2, 3, 8), "slots": TWO}),
    "read_quantised_pages": (read_quantised_pages, {**NARROW, "slots": TWO, "dtype": torch.float32}),
}
WRONG: list[tuple[str, str, torch.Tensor]] = [
    ("rotate", "cos", _of(1, 1, 6)),
    ("rotate", "signed_sin", _of(3, 1, 8)),
    ("write_pages", "k", _of(2, 4, 8)),
    ("write_pages", "v", _of(1, 3, 8)),
    ("write_pages", "slots", TWO[:1]),
    ("write_pages", "k_cache", _every_second(2, 4, 3, 8)),
    ("rms_norm", "weight", _of(7)),
    ("add_rms_norm", "residual", _of(3, 8)),
    ("add_rms_norm", "weight", _of(9)),
    ("rms_norm_heads", "weight", _of(2, 8)),
    ("layer_norm", "weight", _of(7)),
    ("layer_norm", "bias", _of(7)),
    ("paged_attention", "q", _of(2, 6, 7)),
    ("paged_attention", "v", _of(1, 4, 3, 8)),
    ("varlen_attention", "k", _of(3, 2, 8)),
    ("place_rows", "out", _of(3, 5)),
    ("place_rows", "pool", _every_second(2, 4, 6)),
    ("store_rows", "values", _of(2, 5)),
    ("store_rows", "pool", _every_second(2, 4, 6)),
    ("copy_pages", "cache", _every_second(2, 4, 3)),
    ("write_quantised_pages", "cache", _every_second(2, 4, 3, 8, dtype=torch.int8)),
    ("read_quantised_pages", "scales", _every_second(2, 4, 3)),
]


@pytest.mark.parametrize(("op", "name", "other"), WRONG, ids=[f"{op}-{name}" for op, name, _ in WRONG])
def test_what_does_not_fit_is_refused(op: str, name: str, other: torch.Tensor) -> None:
    function, arguments = OPS[op]
    with forced("triton"):
        function(**arguments)
        with pytest.raises(ValueError, match=op):
            function(**(arguments | {name: other}))


@pytest.mark.parametrize("path", WITH_NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_is_written_and_gated_where_there_is_nothing(path: Path, dtype: torch.dtype) -> None:
    caches = torch.zeros(2, 4, 3, 8, dtype=dtype), torch.zeros(2, 4, 3, 8, dtype=dtype)
    none = torch.zeros(0, 3, 8, dtype=dtype)
    with forced(path):
        write_pages(*caches, none, none, TWO[:0])
        assert swiglu(torch.zeros(3, 0, dtype=dtype)).shape == (3, 0)
        assert rms_norm_heads(none, torch.ones(3, 8, dtype=dtype), 1e-6).shape == (0, 3, 8)


@pytest.mark.parametrize("path", PATHS)
def test_factors_of_a_norm_may_lie_apart(path: Path) -> None:
    x, factors = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16.0)
    with forced(path):
        apart, together = factors[::2], factors[::2].clone()
        assert torch.equal(rms_norm(x, apart, 1e-6), rms_norm(x, together, 1e-6))
        assert torch.equal(layer_norm(x, apart, apart, 1e-6), layer_norm(x, together, together, 1e-6))
