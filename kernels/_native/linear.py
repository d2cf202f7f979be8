"""Linear layers for few rows: bfloat16, and float32 with weights of 8 or 4 bits. See kernels.linear."""

from __future__ import annotations

import torch

from kernels._native.library import POINTER, SIZE, Function, functions

MAX_ROWS = 16  # as linear.c has it
MIN_COLUMNS = 4

_LINEAR = functions("linear", POINTER, POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, takes_long=True)
_MIXED_LINEAR = functions("mixed_linear", POINTER, POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, takes_long=True)
_INT8_LINEAR = functions("int8_linear", POINTER, POINTER, POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, takes_long=True)
_INT4_LINEAR = functions(
    "int4_linear", POINTER, POINTER, POINTER, POINTER, POINTER, SIZE, SIZE, SIZE, SIZE, takes_long=True
)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [R, K] bfloat16 with R <= MAX_ROWS; weight [N, K] and bias [N] contiguous, N >= MIN_COLUMNS."""
    return _plain(_LINEAR, x, weight, bias)


def mixed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x and bias float32, weight bfloat16; otherwise as `linear`."""
    return _plain(_MIXED_LINEAR, x, weight, bias)


def _plain(
    functions: dict[torch.dtype, Function], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    x = x.contiguous()
    rows, inputs = x.shape
    columns = weight.shape[0]
    out = torch.empty((rows, columns), dtype=x.dtype)
    functions[x.dtype](
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(), rows, inputs,
        columns,
    )  # fmt: skip
    return out


def int8_linear(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [R, K] float32 with 0 < R <= MAX_ROWS; weight [N, K] contiguous."""
    return _quantised(_INT8_LINEAR, x, weight, scales, bias)


def int4_linear(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same for packed [N, K / 2] contiguous and scales [N, groups]."""
    return _quantised(_INT4_LINEAR, x, packed, scales, bias, scales.shape[1])


def _quantised(
    functions: dict[torch.dtype, Function], x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor,
    bias: torch.Tensor | None, *sizes: int,
) -> torch.Tensor:  # fmt: skip
    x, scales = x.contiguous(), scales.contiguous()
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    functions[x.dtype](
        x.data_ptr(), weight.data_ptr(), scales.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
        *x.shape, weight.shape[0], *sizes,
    )  # fmt: skip
    return out
