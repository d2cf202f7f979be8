"""Linear layers whatever their weight is, and matrices that are quantised while they are filled, against float64."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels._native.linear
import kernels.linear
from kernels._native.limits import FEW_ROWS, MAX_ROWS
from kernels.dispatch import Path, forced, has_native
from kernels.halved_matrix import HalvedMatrix, halved
from kernels.linear import linear
from kernels.quantised_linear import (
    int4_linear,
    int8_dynamic_linear,
    int8_linear,
    quantise_weight_int4,
    quantise_weight_int8,
    sums_bytes_exactly,
    unpack_int4,
)
from kernels.quantised_matrix import Int4Matrix, Int8DynamicMatrix, QuantisedMatrix, Quantization, new_matrix
from tests.kernels.paths import WITH_NATIVE
from tests.tolerances import assert_matches

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_this_machine_has_the_c_path() -> None:
    """Where it has none, tests of "native" judge nothing: install a C compiler."""
    assert has_native()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, MAX_ROWS + 1),
    columns=st.sampled_from([1, 3, 4, 5, 31, 64]),
    inputs=st.sampled_from([1, 31, 32, 33, 100]),
    has_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    path=st.sampled_from(["torch", "native"]),
)
def test_plain_weights(rows: int, columns: int, inputs: int, has_bias: bool, dtype: torch.dtype, path: Path) -> None:
    x, weight, bias = _draw(0, rows, inputs + 3, dtype=dtype)[:, 3:], _draw(1, columns, inputs, dtype=dtype), None
    if has_bias:
        bias = _draw(2, columns, dtype=dtype)
    with forced(path):
        actual = linear(x, weight, bias)
    oracle = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert_matches(actual, oracle, reduced=inputs)


@pytest.fixture
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """As many threads of torch's as the parameter says; every matrix counts as large."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(kernels.linear, "CACHED_WEIGHTS", 0)
    monkeypatch.setattr(kernels._native.linear, "SMALL_WEIGHTS", 0)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3, 7], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [5, 27, 261])
def test_a_large_matrix_is_read_by_all_threads(columns: int, dtype: torch.dtype, threads: int) -> None:
    """Also where a thread would have fewer than four columns; a sum does not depend on which thread had it."""
    x, bias = _draw(0, FEW_ROWS, 700, dtype=dtype), _draw(1, columns, dtype=dtype)
    weight = _draw(2, columns, 700, dtype=dtype)
    numbers, scales = quantise_weight_int8(weight.float())
    exact = numbers.double() * scales.double()[:, None]
    for num_rows in (1, 2, FEW_ROWS):
        rows = x[:num_rows]
        for own in (None, bias):
            offset = 0 if own is None else own.double()
            with forced("native"):
                plain, bytewise = linear(rows, weight, own), int8_linear(rows, numbers, scales, own)
                assert_matches(plain, rows.double() @ weight.double().T + offset, reduced=700)
                assert_matches(bytewise, rows.double() @ exact.T + offset, reduced=700)
                torch.set_num_threads(1)
                assert torch.equal(plain, linear(rows, weight, own))
                assert torch.equal(bytewise, int8_linear(rows, numbers, scales, own))
                torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
def test_a_large_matrix_of_4_bits_is_read_by_all_threads(threads: int) -> None:
    columns, inputs = 261, 1088
    weight, x = _draw(0, columns, inputs), _draw(1, 5, inputs)
    packed, scales = quantise_weight_int4(weight, 64)
    exact = unpack_int4(packed, scales, torch.float32).double()
    with forced("native"):
        actual = int4_linear(x, packed, scales)
        torch.set_num_threads(1)
        alone = torch.cat([int4_linear(row[None], packed, scales) for row in x])
    assert_matches(actual, x.double() @ exact.T, reduced=inputs)
    assert torch.equal(actual, alone)


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
@pytest.mark.parametrize("columns", [4, 7, 64])
def test_a_weight_that_bfloat16_holds_exactly_is_read_from_there(rows: int, columns: int) -> None:
    weight, bias = _draw(0, columns, 100, dtype=torch.bfloat16).float(), _draw(1, columns)
    matrix, x = halved(weight), _draw(2, rows, 103)[:, 3:]
    assert isinstance(matrix, HalvedMatrix) and matrix.num_bytes == 2 * weight.numel()
    for own in (None, bias):
        oracle = x.double() @ weight.double().T + (0 if own is None else own.double())
        for path in ("torch", "native"):
            with forced(path):
                assert_matches(linear(x, matrix, own), oracle, reduced=100)
    weight[0, 0] += 2.0**-20
    assert halved(weight) is weight, "it would lose something"


@pytest.mark.parametrize("path", ["torch", "native"])
def test_a_row_of_the_result_depends_on_its_own_row_alone(path: Path) -> None:
    x, weight = _draw(0, 7, 96, dtype=torch.bfloat16), _draw(1, 40, 96, dtype=torch.bfloat16)
    with forced(path):
        whole = linear(x, weight)
        if path == "native":
            assert torch.equal(whole, torch.cat([linear(row[None], weight) for row in x]))
        poisoned = x.clone()
        poisoned[3] = float("nan")
        mixed = linear(poisoned, weight)
    assert bool(mixed[3].isnan().all()) and torch.equal(mixed[[0, 1, 2, 4, 5, 6]], whole[[0, 1, 2, 4, 5, 6]])


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Each row to the nearest of 255 even steps up to its largest number. The steps are float32's: what lies half way
    between two of them would go either way otherwise."""
    steps = 127 / x.float().abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return (x.float() * steps).round().double() / steps.double()


@pytest.mark.skipif(not sums_bytes_exactly(), reason="this processor has no VNNI")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_dynamic_activations_are_rounded_row_by_row(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = _draw(0, rows, 96, dtype=dtype), _draw(1, 33, 96), _draw(2, 33, dtype=dtype)
    x[0] *= 100  # which must not coarsen the other rows
    numbers, scales = quantise_weight_int8(weight)
    oracle = _rounded(x) @ (numbers.double() * scales.double()[:, None]).T + bias.double()
    matrix = Int8DynamicMatrix(33, 96, dtype=dtype, device=CPU)
    matrix.copy_(weight)
    unpacked = matrix.linear(x, bias)
    matrix.finish()
    assert matrix.packed is not None
    for actual in (int8_dynamic_linear(x, numbers, scales, bias), unpacked, matrix.linear(x, bias)):
        assert actual.dtype == dtype
        assert_matches(actual, oracle, reduced=96)


def _dequantised(matrix: QuantisedMatrix, weight: torch.Tensor) -> torch.Tensor:
    """What the numbers of `weight` stand for once they are rounded as the matrix rounds them, in float64."""
    if isinstance(matrix, Int4Matrix):
        groups = weight.double().unflatten(1, (-1, matrix.group_size))
        steps = groups.abs().amax(-1, keepdim=True) / 7
        return ((groups / steps).round().clamp(-7, 7) * steps).flatten(1)
    steps = weight.double().abs().amax(-1, keepdim=True) / 127
    return (weight.double() / steps).round().clamp(-127, 127) * steps


@pytest.mark.parametrize("path", WITH_NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "bits"), [("int8", 8), ("int4", 4)])
def test_a_matrix_filled_in_parts_multiplies_as_its_numbers_say(
    method: Quantization, bits: int, dtype: torch.dtype, path: Path
) -> None:
    weight, bias = _draw(0, 48, 192), _draw(1, 48, dtype=dtype)
    matrix = new_matrix(method, 48, 192, dtype=dtype, device=CPU)
    assert isinstance(matrix, QuantisedMatrix)
    for rows in (slice(32, 48), slice(0, 7), slice(7, 32)):  # as a fused weight's sources come, in any order
        part = matrix[rows]
        assert tuple(part.shape) == tuple(weight[rows].shape)
        part.copy_(weight[rows])
    exact = _dequantised(matrix, weight)
    assert 48 * 192 * bits // 8 < matrix.num_bytes < 48 * 192 * bits // 8 * 1.2
    results = []
    for is_finished in (False, True):
        if is_finished:
            matrix.finish()
        for rows in (1, 3, 40):
            x = _draw(2, rows, 192, dtype=dtype)
            with forced(path):
                results.append((x, linear(x, matrix, bias)))
    for x, actual in results:
        assert actual.dtype == dtype
        assert_matches(actual, x.double() @ exact.T + bias.double(), reduced=192)


def test_what_cannot_be_cut_into_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="40 inputs has no groups of 32"):
        new_matrix("int4", 8, 40, dtype=torch.float32, device=CPU)
    with pytest.raises(ValueError, match="do not fit"):
        int8_dynamic_linear(torch.ones(1, 3), torch.zeros(2, 4, dtype=torch.int8), torch.ones(2))


ON_THIS_PROCESSOR = """
import torch
from kernels.quantised_linear import PackedInt8, int8_dynamic_linear, packed_int8_dynamic_linear
from kernels.quantised_matrix import new_matrix

x, weight, scales = torch.ones(3, 256), torch.full((32, 256), 127, dtype=torch.int8), torch.ones(32)
packed = packed_int8_dynamic_linear(x, PackedInt8.of(weight, scales), None)
right = torch.full((3, 32), 127.0 * 256)
is_right = all(torch.allclose(sums, right) for sums in (int8_dynamic_linear(x, weight, scales), packed))
try:
    new_matrix("int8_dynamic", 32, 256, dtype=torch.float32, device=torch.device("cpu"))
    print(is_right, "served")
except ValueError as error:
    print(is_right, error)
new_matrix("int8", 32, 256, dtype=torch.float32, device=torch.device("cpu"))
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE", "ALL"])
def test_rounded_activations_are_served_where_their_sums_are_exact_and_refused_elsewhere(instructions: str) -> None:
    if instructions != "ALL" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("only x86 has processors whose 8-bit products saturate")
    own = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    done = subprocess.run([sys.executable, "-c", ON_THIS_PROCESSOR], env=own, capture_output=True, text=True)
    refusal = "False this processor adds 8-bit products up in 16 bits (it has no VNNI), which overflow; use 'int8'"
    allowed = ["True served", refusal] if instructions == "ALL" else [refusal]
    assert done.stdout.strip() in allowed, done.stderr


def test_small_groups_serve_where_large_ones_do_not_divide() -> None:
    sizes: Sequence[tuple[int, int]] = ((256, 128), (192, 64), (96, 32))
    for inputs, group_size in sizes:
        matrix = Int4Matrix(2, inputs, dtype=torch.float16, device=CPU)
        matrix.copy_(_draw(0, 2, inputs))
        assert matrix.group_size == group_size
        assert bool(unpack_int4(matrix.numbers, matrix.scales, torch.float32).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_rows_of_8_bit_products_change_no_other_row(dtype: torch.dtype) -> None:
    """Rows of zeros, of numbers near the smallest, far apart, and not finite."""
    numbers, scales = quantise_weight_int8(_draw(0, 9, 100))
    x = _draw(1, 6, 100).to(dtype)
    x[0], x[1] = 0, x[1] * 1e-37
    x[2, 5] *= 1e4
    oracle = x.double() @ (numbers.double() * scales.double()[:, None]).T
    with forced("native"):
        plain = int8_linear(x, numbers, scales)
        assert torch.equal(plain[0], torch.zeros_like(plain[0]))
        assert_matches(plain[1:2] * 1e37, oracle[1:2] * 1e37, reduced=100)
        assert_matches(plain[2:3] / 1e4, oracle[2:3] / 1e4, reduced=100)
        assert_matches(plain[3:], oracle[3:], reduced=100)
        x[0, 3], x[4, 7] = torch.inf, torch.nan
        odd = int8_linear(x, numbers, scales)
    assert not odd[[0, 4]].isfinite().any() and torch.equal(odd[[1, 2, 3, 5]], plain[[1, 2, 3, 5]])


@pytest.mark.parametrize("path", WITH_NATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_8_bit_products_do_not_overflow_before_their_scale(dtype: torch.dtype, path: Path) -> None:
    numbers, scales = torch.full((4, 1024), 127, dtype=torch.int8), torch.full((4,), 1e-3)
    with forced(path):
        actual = int8_linear(torch.ones(2, 1024, dtype=dtype), numbers, scales)
    assert_matches(actual, torch.full((2, 4), 1024 * 0.127, dtype=torch.float64), reduced=1024)


@pytest.mark.parametrize("outstanding", [1e2, 1e3, 1e5, 1e8])
def test_a_number_that_stands_out_costs_the_others_nothing(outstanding: float) -> None:
    """Its own weights are zeros, so that its row's result is the others'."""
    numbers, scales = quantise_weight_int8(_draw(0, 9, 300))
    numbers[:, 7] = 0
    x = 0.1 * _draw(1, 3, 300)
    x[1, 7] = outstanding
    with forced("native"):
        assert_matches(
            int8_linear(x, numbers, scales), x.double() @ (numbers.double() * scales.double()[:, None]).T, reduced=300
        )
