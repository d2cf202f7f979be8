"""Norms and activations against float64 oracles, over shapes, strides and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels._native.limits import SHARED_NUMBERS
from kernels.activation import gelu, gelu_sigmoid, gelu_tanh, swiglu
from kernels.dispatch import Path, forced
from kernels.norm import add_rms_norm, layer_norm, rms_norm, rms_norm_heads
from kernels.rotary import RotaryTable, rotary_table, rotate
from tests import oracles
from tests.kernels.paths import WITH_NATIVE, with_native
from tests.tolerances import assert_matches

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 129))


def _draw(seed: int, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    path=with_native,
)
def test_rms_norm(shape: tuple[int, int, int], dtype: torch.dtype, seed: int, scale: float, path: Path) -> None:
    x, weight = _draw(seed, *shape, dtype=dtype, scale=scale), _draw(seed + 1, shape[-1], dtype=dtype)
    with forced(path):
        assert_matches(rms_norm(x, weight, 1e-6), oracles.rms_norm(x, weight, 1e-6))
        assert_matches(rms_norm(x, None, 1e-6), oracles.rms_norm(x, torch.ones(shape[-1]), 1e-6))


@pytest.mark.parametrize("path", WITH_NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_a_strided_view(dtype: torch.dtype, path: Path) -> None:
    x, weight = _draw(0, 9, 80, dtype=dtype)[:, 8:72], _draw(1, 64, dtype=dtype)
    with forced(path):
        assert_matches(rms_norm(x, weight, 1e-5), oracles.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("path", WITH_NATIVE)
def test_rms_norm_takes_statistics_in_float32(path: Path) -> None:
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # squares overflow float16
    weight = torch.ones(4096, dtype=torch.float16)
    with forced(path):
        assert_matches(rms_norm(x, weight, 1e-6), oracles.rms_norm(x, weight, 1e-6))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), path=with_native)
def test_every_head_is_normalised_with_its_own_weight(
    shape: tuple[int, int, int], dtype: torch.dtype, seed: int, path: Path
) -> None:
    tokens, heads, width = shape
    x, weight = (
        _draw(seed, tokens, heads + 2, width, dtype=dtype)[:, :heads],
        _draw(seed + 1, heads, width, dtype=dtype),
    )
    with forced(path):
        normed = rms_norm_heads(x, weight, 1e-6)
    for head in range(heads):
        assert_matches(normed[:, head], oracles.rms_norm(x[:, head], weight[head], 1e-6))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), path=with_native)
def test_add_rms_norm_adds_then_normalises(
    shape: tuple[int, int, int], dtype: torch.dtype, seed: int, path: Path
) -> None:
    x, residual = _draw(seed, *shape, dtype=dtype), _draw(seed + 1, *shape, dtype=dtype)
    weight, total = _draw(seed + 2, shape[-1], dtype=dtype), x + residual
    with forced(path):
        normed, stream = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(stream, total)
    assert stream is residual
    assert_matches(normed, oracles.rms_norm(total, weight, 1e-6))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(shape=shapes, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), path=with_native)
def test_layer_norm(shape: tuple[int, int, int], dtype: torch.dtype, seed: int, path: Path) -> None:
    width = shape[-1]
    x, weight, bias = (_draw(seed + i, *size, dtype=dtype) for i, size in enumerate((shape, (width,), (width,))))
    with forced(path):
        normed, without = layer_norm(x, weight, bias, 1e-3), layer_norm(x, weight, None, 1e-3)
    assert_matches(without, oracles.layer_norm(x, weight, torch.zeros(width), 1e-3))
    assert_matches(normed, oracles.layer_norm(x, weight, bias, 1e-3))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.1, 3.0, 20.0]),
    path=with_native,
)
def test_activations(shape: tuple[int, int, int], dtype: torch.dtype, seed: int, scale: float, path: Path) -> None:
    x = _draw(seed, *shape[:2], 2 * shape[2], dtype=dtype, scale=scale)
    before = x.clone()
    with forced(path):
        assert_matches(swiglu(x), oracles.swiglu(x), reduced=16)  # silu is rounded once before the product
        assert_matches(gelu(x), oracles.gelu(x))
        assert_matches(gelu_tanh(x), oracles.gelu_tanh(x))
        assert_matches(gelu_sigmoid(x), oracles.gelu_sigmoid(x), reduced=16)  # torch rounds its three steps
        assert_matches(swiglu(x[:, :0]), oracles.swiglu(x[:, :0]))
    assert torch.equal(x, before)


def test_swiglu_refuses_an_odd_width() -> None:
    with pytest.raises(ValueError, match="must be even"):
        swiglu(torch.zeros(2, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_shared_out_among_threads_are_rows_alone(dtype: torch.dtype) -> None:
    """The same bits for a tensor that one thread takes and for one of which each thread takes a part."""
    tokens, width = 2 * SHARED_NUMBERS // 64 + 3, 66
    x, weight = _draw(0, tokens, 2, width // 2, dtype=dtype), _draw(1, width // 2, dtype=dtype)
    table = rotary_table(*(_draw(seed, tokens, width // 2 // 2, dtype=torch.float32) for seed in (2, 3)))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for op in (
            lambda rows: rms_norm(x[rows], weight, 1e-6),
            lambda rows: rms_norm(x[rows], None, 1e-6),
            lambda rows: add_rms_norm(x[rows], x[rows].clone(), weight, 1e-6)[0],
            lambda rows: swiglu(x[rows].flatten(1)),
            lambda rows: rotate(x[rows][..., :-1], RotaryTable(cos=table.cos[rows], signed_sin=table.signed_sin[rows])),
        ):
            parts = [op(slice(start, start + 500)) for start in range(0, tokens, 500)]
            assert torch.equal(op(slice(0, tokens)), torch.cat(parts))
    finally:
        torch.set_num_threads(before)
