"""8-bit rows, quantised pages, and linear layers on 8-bit and 4-bit weights against plain float64 arithmetic."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dispatch import Path, forced
from kernels.quantise import (
    FEW_NUMBERS,
    LARGEST,
    dequantise_rows,
    quantise_rows,
    read_quantised_pages,
    write_quantised_pages,
)
from kernels.quantised_linear import (
    int4_linear,
    int8_linear,
    quantise_weight_int4,
    quantise_weight_int8,
    unpack_int4,
)
from tests.kernels.paths import WITH_NATIVE, paths, with_native
from tests.profiles import IS_SOAK
from tests.tolerances import assert_matches

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NARROW = (torch.int8, torch.float8_e4m3fn)
EXAMPLES = 200 if IS_SOAK else 25


def _draw(seed: int, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def _largest_error(row: torch.Tensor, narrow: torch.dtype) -> torch.Tensor:
    """Half a step at every element of a row, as the number format has it, with room for float32 arithmetic."""
    magnitude = row.double().abs()
    if narrow == torch.int8:
        half = magnitude.amax(-1, keepdim=True) / 127 / 2
    else:  # three bits of mantissa; below 2^-6 of the scaled range steps stay as they are there
        half = torch.maximum(magnitude, magnitude.amax(-1, keepdim=True) / 448 * 2**-6) / 16
    return half * 1.0001 + 1e-30


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(1, 3), st.sampled_from([1, 3, 16, 100, 256])),
    scale=st.sampled_from([1e-4, 1.0, 300.0]),
    dtype=st.sampled_from(DTYPES),
    narrow=st.sampled_from(NARROW),
    path=paths,
)
def test_rows_come_back_within_half_a_step(
    shape: tuple[int, int, int], scale: float, dtype: torch.dtype, narrow: torch.dtype, path: Path
) -> None:
    x = _draw(3, *shape[:2], shape[2] + 1, dtype=dtype, scale=scale)[..., 1:]
    x[..., :1, :] *= 0  # rows of zeros
    with forced(path):
        values, scales = quantise_rows(x, narrow)
        wide = dequantise_rows(values, scales, torch.float32)
        same = dequantise_rows(values, scales, dtype)
    assert (values.dtype, values.shape, scales.shape) == (narrow, x.shape, x.shape[:-1])
    assert_matches(scales, x.double().abs().amax(-1) / LARGEST[narrow])
    assert bool(((wide.double() - x.double()).abs() <= _largest_error(x, narrow)).all())
    assert_matches(same, values.double() * scales.double()[..., None])


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    tokens=st.integers(0, 9),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 8, 48]),
    page_size=st.sampled_from([1, 4, 16]),
    dtype=st.sampled_from(DTYPES),
    narrow=st.sampled_from(NARROW),
    seed=st.integers(0, 99),
    path=paths,
)
def test_pages_are_quantised_in_place_and_read_by_slot(
    tokens: int,
    heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    narrow: torch.dtype,
    seed: int,
    path: Path,
) -> None:
    num_pages = -(-tokens // page_size) + 2
    cache = torch.full((num_pages, page_size, heads, head_dim), 77, dtype=torch.int8).view(narrow)
    scales = torch.full((num_pages, page_size, heads), math.nan)  # a read of an unwritten slot shows
    slots = torch.tensor(random.Random(seed).sample(range(num_pages * page_size), tokens), dtype=torch.int64)
    x = _draw(seed, tokens, heads + 1, head_dim, dtype=dtype)[:, 1:]
    with forced(path):
        write_quantised_pages(cache, scales, x, slots)
        back = read_quantised_pages(cache, scales, slots, torch.float32)
    assert back.shape == x.shape
    assert bool(((back.double() - x.double()).abs() <= _largest_error(x, narrow)).all())
    untouched = torch.ones(num_pages * page_size, dtype=torch.bool)
    untouched[slots] = False
    assert bool((cache.view(torch.int8).view(-1, heads, head_dim)[untouched] == 77).all())
    assert bool(scales.view(-1, heads)[untouched].isnan().all())


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([0, 1, 3, 17, 40]),
    columns=st.sampled_from([1, 31, 32, 70]),
    inputs=st.sampled_from([1, 33, 64, 300]),
    has_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    path=with_native,
)
def test_int8_linear(
    rows: int, columns: int, inputs: int, has_bias: bool, dtype: torch.dtype, seed: int, path: Path
) -> None:
    x = _draw(seed, rows, inputs + 1, dtype=dtype)[:, 1:]
    weight, bias = _draw(seed + 1, columns, inputs, dtype=dtype), _draw(seed + 2, columns, dtype=dtype)
    numbers, scales = quantise_weight_int8(weight)
    with forced(path):
        actual = int8_linear(x, numbers, scales, bias if has_bias else None)
    oracle = x.double() @ (numbers.double() * scales.double()[:, None]).T + (bias.double() if has_bias else 0)
    assert_matches(actual, oracle, reduced=inputs)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([0, 1, 3, 17, 40]),
    columns=st.sampled_from([1, 31, 70]),
    groups=st.integers(1, 7),
    group_size=st.sampled_from([32, 64, 128]),
    has_bias=st.booleans(),
    has_zeros=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    path=with_native,
)
def test_int4_linear(
    rows: int, columns: int, groups: int, group_size: int, has_bias: bool, has_zeros: bool, dtype: torch.dtype,
    path: Path,
) -> None:  # fmt: skip
    inputs = groups * group_size
    x, bias = _draw(1, rows, inputs, dtype=dtype), _draw(2, columns, dtype=dtype)
    packed, scales = quantise_weight_int4(_draw(0, columns, inputs, dtype=dtype), group_size)
    zeros = (8 + 4 * _draw(3, columns, groups, dtype=torch.float32)).round().clamp(0, 16).to(torch.uint8)
    weight = torch.empty(columns, inputs, dtype=torch.float64)
    for column in range(inputs):  # as the packing is described, input by input
        group, place = divmod(column, group_size)
        half, byte = divmod(place, group_size // 2)
        numbers = (packed[:, group * group_size // 2 + byte].int() >> (4 * half)) & 15
        zero = zeros[:, group].int() if has_zeros else 8
        weight[:, column] = (numbers - zero).double() * scales[:, group].double()
    with forced(path):
        actual = int4_linear(x, packed, scales, bias if has_bias else None, zeros if has_zeros else None)
    assert_matches(actual, x.double() @ weight.T + (bias.double() if has_bias else 0), reduced=inputs)


@pytest.mark.parametrize("inputs", [16, 24, 33, 40])
@pytest.mark.parametrize("columns", [3, 48])
def test_few_bfloat16_rows_of_any_width(inputs: int, columns: int) -> None:
    """torch's own product reads sixteens of inputs whole, whatever their number."""
    numbers, scales = quantise_weight_int8(_draw(0, columns, inputs, dtype=torch.float32))
    exact = numbers.double() * scales.double()[:, None]
    for rows in range(1, 11):
        x = _draw(rows, rows, inputs, dtype=torch.bfloat16)
        assert_matches(int8_linear(x, numbers, scales), x.double() @ exact.T, reduced=inputs)


def test_four_bits_keep_every_number_within_half_a_step() -> None:
    weight = _draw(0, 5, 256, dtype=torch.float32)
    packed, scales = quantise_weight_int4(weight, 64)
    assert (packed.dtype, packed.shape, scales.shape) == (torch.uint8, (5, 128), (5, 4))
    back = unpack_int4(packed, scales, torch.float32)
    steps = (weight.view(5, 4, 64).abs().amax(-1) / 7).repeat_interleave(64, 1)
    assert bool(((back - weight).abs() <= steps / 2 * 1.0001).all())


@pytest.mark.parametrize("path", WITH_NATIVE)
def test_leading_dimensions_are_kept(path: Path) -> None:
    numbers, scales = quantise_weight_int8(_draw(0, 6, 8, dtype=torch.float32))
    packed, group_scales = quantise_weight_int4(_draw(0, 6, 32, dtype=torch.float32), 32)
    with forced(path):
        assert int8_linear(torch.ones(2, 3, 8), numbers, scales).shape == (2, 3, 6)
        assert int4_linear(torch.ones(2, 3, 32), packed, group_scales).shape == (2, 3, 6)
        assert int8_linear(torch.ones(3, 8), numbers[:0], scales[:0]).shape == (3, 0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not torch\.int16"):
        quantise_rows(torch.ones(2, 2), torch.int16)
    with pytest.raises(ValueError, match="one scale per row"):
        read_quantised_pages(
            torch.zeros(1, 2, 1, 4, dtype=torch.int8), torch.zeros(1, 2), torch.arange(1), torch.float32
        )
    with pytest.raises(ValueError, match="do not fit"):
        int8_linear(torch.ones(1, 3), torch.zeros(2, 4, dtype=torch.int8), torch.ones(2))
    with pytest.raises(ValueError, match="a power of two from 32 up, and 96 inputs"):
        quantise_weight_int4(torch.ones(2, 96), 64)
    packed, scales = quantise_weight_int4(torch.ones(2, 64), 32)
    with pytest.raises(ValueError, match=r"zeros \(2, 1\) and scales \(2, 2\) do not fit"):
        int4_linear(torch.ones(1, 64), packed, scales, None, torch.zeros(2, 1, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_numbers_alone_and_among_many(dtype: torch.dtype) -> None:
    x = _draw(0, 2 * FEW_NUMBERS // 48, 48, dtype=dtype)
    x[0], x[1] = 0, 1e-38
    values, scales = quantise_rows(x)
    alone = [quantise_rows(row[None]) for row in x]
    assert torch.equal(torch.cat([numbers for numbers, _ in alone]), values)
    assert torch.equal(torch.cat([scale for _, scale in alone]), scales)


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_rows_too_small_for_a_scale_are_zeros(path: Path, narrow: torch.dtype) -> None:
    """The reciprocal of their scale is no float32: infinity times zero would be no number."""
    x = torch.tensor([[1e-38, 0.0, 2e-38, -1e-39], [1e-30, 0.0, -1e-31, 0.0], [0.0, 0.0, 0.0, 0.0]])
    with forced(path):
        values, scales = quantise_rows(x, narrow)
        wide = dequantise_rows(values, scales, torch.float32)
    assert bool(wide.isfinite().all()) and not wide[[0, 2]].any()
    assert_matches(wide[1, :1], x[1, :1].double())
