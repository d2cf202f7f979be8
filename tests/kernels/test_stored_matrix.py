"""Matrices kept as a checkpoint stores them: products with the very numbers, in groups of any size and order."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dispatch import Path, forced
from kernels.linear import linear
from kernels.stored_matrix import StoredMatrix
from tests.kernels.paths import WITH_NATIVE
from tests.tolerances import assert_matches

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Drawn rows, and what they stand for in float64, input by input."""

    bits: int
    numbers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    groups: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        weight = torch.empty(self.numbers.shape, dtype=torch.float64)
        for i, group in enumerate(self.groups.tolist()):
            number, zero = self.numbers[:, i].int(), self.zeros[:, group].int()
            weight[:, i] = (number - zero).double() * self.scales[:, group].double()
        return weight

    def dequantised(self) -> torch.Tensor:
        return self.weight.float()


def _rows(seed: int, out: int, groups: torch.Tensor, *, bits: int = 4, zero: int | None = None) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    count, largest = int(groups.max()) + 1, 2**bits - 1

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(0, largest + 1, shape, generator=generator, dtype=torch.uint8)

    scales = ((torch.rand(out, count, generator=generator) + 0.1) / (2 * largest)).half().float()
    zeros = whole(out, count) if zero is None else torch.full((out, count), zero, dtype=torch.uint8)
    return Rows(bits=bits, numbers=whole(out, len(groups)), scales=scales, zeros=zeros, groups=groups)


def _order(inputs: int, size: int, seed: int | None) -> torch.Tensor:
    groups = torch.arange(inputs) // size
    return groups if seed is None else groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))]


def _filled(parts: list[Rows | torch.Tensor], inputs: int, dtype: torch.dtype) -> StoredMatrix:
    """Put together in another order than that of its rows."""
    sizes = [len(part) if isinstance(part, torch.Tensor) else len(part.numbers) for part in parts]
    matrix = StoredMatrix(sum(sizes), inputs, dtype=dtype, device=CPU)
    for i in reversed(range(len(parts))):
        place, source = matrix[sum(sizes[:i]) : sum(sizes[: i + 1])], parts[i]
        assert place.shape == (sizes[i], inputs)
        place.copy_(source) if isinstance(source, torch.Tensor) else place.take_groups(source)
    return matrix


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([4, 8]),
    inputs=st.sampled_from([64, 96, 256]),
    group_size=st.sampled_from([32, 64, 96, 128, 256]),
    seed=st.sampled_from([None, 0, 1]),
    is_centred=st.booleans(),
    num_rows=st.sampled_from([1, 3, 70]),
    has_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    path=st.sampled_from(WITH_NATIVE),
)
def test_products_are_those_of_the_stored_numbers(
    bits: int, inputs: int, group_size: int, seed: int | None, is_centred: bool, num_rows: int, has_bias: bool,
    dtype: torch.dtype, path: Path,
) -> None:  # fmt: skip
    groups, zero = _order(inputs, group_size, seed), 1 << (bits - 1) if is_centred else None
    parts = [_rows(i, out, groups, bits=bits, zero=zero) for i, out in enumerate((6, 3, 32))]
    matrix = _filled([*parts], inputs, dtype)
    finished = matrix.finish()
    assert finished is matrix and matrix.num_parts == 3
    assert (matrix.zeros is None) == (is_centred and bits == 4)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(num_rows, inputs, generator=generator).to(dtype)
    bias = torch.randn(41, generator=generator).to(dtype) if has_bias else None
    with forced(path):
        actual = linear(x, matrix, bias)
    assert actual.dtype == dtype
    oracle = x.double() @ torch.cat([part.weight for part in parts]).T + (0 if bias is None else bias.double())
    assert_matches(actual, oracle, reduced=2 * inputs)


@pytest.mark.parametrize(("bits", "most"), [(4, 0.55), (8, 1.12)])
def test_the_numbers_take_their_bits(bits: int, most: float) -> None:
    matrix = _filled([_rows(0, 512, _order(1024, 128, None), bits=bits)], 1024, torch.bfloat16)
    assert matrix.finish() is matrix and bits / 8 < matrix.num_bytes / (512 * 1024) < most


WIDE: dict[str, list[Rows | torch.Tensor]] = {
    "orders that differ": [_rows(0, 4, _order(64, 32, 0)), _rows(1, 5, _order(64, 32, 1))],
    "one in order, one not": [_rows(0, 4, _order(64, 32, None)), _rows(1, 5, _order(64, 32, 1), bits=8)],
    "bits that differ": [_rows(0, 4, _order(64, 32, None)), _rows(1, 5, _order(64, 32, None), bits=8)],
    "groups of sixteen": [_rows(0, 4, _order(64, 16, None))],
    "full precision among them": [_rows(0, 4, _order(64, 32, 3), bits=8), torch.randn(3, 64)],
    "full precision alone": [torch.randn(3, 64)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", WIDE)
def test_what_products_of_4_bits_cannot_read_is_widened(case: str, dtype: torch.dtype) -> None:
    wide = _filled(WIDE[case], 64, dtype).finish()
    assert isinstance(wide, torch.Tensor)
    exact = torch.cat([part if isinstance(part, torch.Tensor) else part.weight.float() for part in WIDE[case]])
    assert torch.equal(wide, exact.to(dtype)), "rounded once"


def test_a_part_is_not_the_callers_tensor() -> None:
    """What a file's mapping holds may go once it was read."""
    own = torch.ones(3, 64)
    matrix = _filled([own], 64, torch.float32)
    own.zero_()
    assert bool((matrix.finish() == 1).all())  # type: ignore[union-attr]
