"""Linear layers for few rows: plain, and with weights of 8 or 4 bits. See kernels.linear.

A large matrix is read by as many threads as torch has at the time of the call, from torch's own pool.
"""

from __future__ import annotations

import torch

from kernels._native.checks import is_like, misfit
from kernels._native.library import POINTER, SIZE, Function, functions
from kernels._native.limits import MAX_GROUP, MAX_ROWS, MIN_COLUMNS, SMALL_WEIGHTS

_SIZES = (SIZE, SIZE, SIZE, SIZE)  # rows, inputs, columns, threads
_LINEAR = functions("linear", POINTER, POINTER, POINTER, POINTER, *_SIZES, takes_long=True)
_MIXED_LINEAR = functions("mixed_linear", POINTER, POINTER, POINTER, POINTER, *_SIZES, takes_long=True)
_INT8_LINEAR = functions("int8_linear", POINTER, POINTER, POINTER, POINTER, POINTER, *_SIZES, takes_long=True)
_INT4_LINEAR = functions(
    "int4_linear", POINTER, POINTER, POINTER, POINTER, POINTER, *_SIZES, SIZE, POINTER, takes_long=True
)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [R, K] bfloat16 or float32 with R <= MAX_ROWS; weight [N, K] and bias [N] of x's dtype, contiguous,
    N >= MIN_COLUMNS. Raises ValueError on others, as all of these do.
    """
    if x.dtype not in _LINEAR or not _fits(x, weight, x.dtype, bias):
        raise misfit("linear", x=x, weight=weight, bias=bias)
    return _plain(_LINEAR, x, weight, bias)


def mixed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x and bias float32, weight bfloat16; otherwise as `linear`."""
    if x.dtype != torch.float32 or not _fits(x, weight, torch.bfloat16, bias):
        raise misfit("mixed_linear", x=x, weight=weight, bias=bias)
    return _plain(_MIXED_LINEAR, x, weight, bias)


def _fits(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None) -> bool:
    shape, columns = x.shape, weight.shape[0]
    if len(shape) != 2 or shape[0] > MAX_ROWS or columns < MIN_COLUMNS:
        return False
    return is_like(weight, dtype, columns, shape[1]) and (bias is None or is_like(bias, x.dtype, columns))


def _plain(
    functions: dict[torch.dtype, Function], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    x = x.contiguous()
    rows, inputs = x.shape
    columns = weight.shape[0]
    out = torch.empty((rows, columns), dtype=x.dtype)
    functions[x.dtype](
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(), rows, inputs,
        columns, _threads(weight),
    )  # fmt: skip
    return out


def _threads(weight: torch.Tensor) -> int:
    return torch.get_num_threads() if weight.numel() > SMALL_WEIGHTS else 1


def int8_linear(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [R, K] bfloat16 or float32 with R <= MAX_ROWS; weight [N, K] contiguous, N >= MIN_COLUMNS."""
    is_scaled = x.dtype in _INT8_LINEAR and is_like(scales, torch.float32, len(weight))
    if not is_scaled or not _fits_numbers(x, weight, torch.int8, x.shape[-1], bias):
        raise misfit("int8_linear", x=x, weight=weight, scales=scales, bias=bias)
    return _quantised(_INT8_LINEAR, x, weight, scales, bias)


def int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    zeros: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same for x float32, packed [N, K / 2] contiguous, scales and zeros [N, groups], of MAX_GROUP inputs at
    most."""
    groups, inputs = scales.shape[-1], x.shape[-1]
    is_cut = groups > 0 and inputs % (2 * groups) == 0 and inputs // groups <= MAX_GROUP
    is_scaled = x.dtype in _INT4_LINEAR and is_cut and is_like(scales, torch.float32, len(packed), groups)
    has_zeros = zeros is None or is_like(zeros, torch.uint8, len(packed), groups)
    if not is_scaled or not has_zeros or not _fits_numbers(x, packed, torch.uint8, inputs // 2, bias):
        raise misfit("int4_linear", x=x, packed=packed, scales=scales, bias=bias, zeros=zeros)
    return _quantised(_INT4_LINEAR, x, packed, scales, bias, groups, None if zeros is None else zeros.data_ptr())


def _fits_numbers(
    x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, width: int, bias: torch.Tensor | None
) -> bool:
    if x.dim() != 2 or len(x) > MAX_ROWS or len(weight) < MIN_COLUMNS:
        return False
    return is_like(weight, dtype, len(weight), width) and (bias is None or is_like(bias, x.dtype, len(weight)))


def _quantised(
    functions: dict[torch.dtype, Function], x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor,
    bias: torch.Tensor | None, *further: int | None,
) -> torch.Tensor:  # fmt: skip
    x = x.contiguous()
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    functions[x.dtype](
        x.data_ptr(), weight.data_ptr(), scales.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
        *x.shape, weight.shape[0], _threads(weight), *further,
    )  # fmt: skip
    return out
