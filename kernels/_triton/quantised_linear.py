"""Weight-only 8-bit and 4-bit products: numbers are widened in registers on their way into the tensor cores.

Few output tiles cannot fill a device, so the inputs of a tile are split among programs whose float32 partial sums a
second kernel adds up in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels._triton.launch import IS_INTERPRETED, ceil_div, next_power_of_2

COLUMNS, INPUTS = 32, 64  # of a tile: outputs, and inputs per step
MAX_SPLITS = 16


@triton.jit
def int8_kernel(
    x_ptr, weight_ptr, scales_ptr, bias_ptr, out_ptr, x_stride, num_rows, num_columns, num_inputs, split_inputs,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.program_id(2) * split_inputs
    end = tl.minimum(num_inputs, begin + split_inputs)
    is_row = (rows < num_rows)[:, None]
    is_column = columns < num_columns
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(begin, end, INPUTS):
        inputs = start + tl.arange(0, INPUTS)
        inside = inputs < end
        x = tl.load(x_ptr + rows[:, None] * x_stride + inputs[None, :], mask=is_row & inside[None, :], other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
        place = weight_ptr + columns[None, :] * num_inputs + inputs[:, None]
        numbers = tl.load(place, mask=is_column[None, :] & inside[:, None], other=0)
        acc += tl.dot(x, numbers.to(x.dtype), input_precision="tf32x3")
    _store(
        acc * tl.load(scales_ptr + columns, mask=is_column, other=0.0)[None, :], bias_ptr, out_ptr, rows, columns,
        num_rows, num_columns, BIAS, SPLIT,
    )  # fmt: skip


@triton.jit
def int4_kernel(
    x_ptr, packed_ptr, scales_ptr, bias_ptr, out_ptr, x_stride, num_rows, num_columns, num_groups, split_groups,
    zeros_ptr, BIAS: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, HALF: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.program_id(2) * split_groups
    end = tl.minimum(num_groups, begin + split_groups)
    is_row = (rows < num_rows)[:, None]
    is_column = columns < num_columns
    places = tl.arange(0, HALF)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for group in range(begin, end):
        source = x_ptr + rows[:, None] * x_stride + (group * (2 * HALF) + places)[None, :]
        low_x = tl.load(source, mask=is_row, other=0.0)
        high_x = tl.load(source + HALF, mask=is_row, other=0.0)
        if UPCAST:
            low_x = low_x.to(tl.float32)
            high_x = high_x.to(tl.float32)
        place = packed_ptr + columns[None, :] * (num_groups * HALF) + (group * HALF + places)[:, None]
        pairs = tl.load(place, mask=is_column[None, :], other=0)
        zero = 8
        if ZEROS:
            zero = tl.load(zeros_ptr + columns * num_groups + group, mask=is_column, other=0).to(tl.int32)[None, :]
        low = ((pairs & 15).to(tl.int32) - zero).to(low_x.dtype)
        high = ((pairs >> 4).to(tl.int32) - zero).to(low_x.dtype)
        part = tl.dot(low_x, low, input_precision="tf32x3")
        part = tl.dot(high_x, high, part, input_precision="tf32x3")
        acc += part * tl.load(scales_ptr + columns * num_groups + group, mask=is_column, other=0.0)[None, :]
    _store(acc, bias_ptr, out_ptr, rows, columns, num_rows, num_columns, BIAS, SPLIT)


@triton.jit
def _store(acc, bias_ptr, out_ptr, rows, columns, num_rows, num_columns, BIAS: tl.constexpr, SPLIT: tl.constexpr):
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    place = rows[:, None] * num_columns + columns[None, :]
    if SPLIT:  # a partial sum; the bias comes when they are added up
        place += tl.program_id(2).to(tl.int64) * num_rows * num_columns
    elif BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_up_kernel(
    partial_ptr, bias_ptr, out_ptr, num_elements, num_columns, num_splits, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_elements
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        total += tl.load(partial_ptr + split * num_elements + places, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + places % num_columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=inside)


def int8_linear(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See kernels.quantised_linear.int8_linear."""
    num_columns, num_inputs = weight.shape
    return _launch(
        int8_kernel, x, weight.contiguous(), scales, bias, num_columns, num_inputs, INPUTS, {"INPUTS": INPUTS}
    )


def int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    zeros: torch.Tensor | None = None,
) -> torch.Tensor:
    """See kernels.quantised_linear.int4_linear."""
    num_columns, num_groups = scales.shape
    zeros_ptr = packed if zeros is None else zeros.contiguous()  # read only where there are zeros
    own = {"HALF": packed.shape[1] // num_groups, "ZEROS": zeros is not None, "zeros_ptr": zeros_ptr}
    return _launch(int4_kernel, x, packed.contiguous(), scales.contiguous(), bias, num_columns, num_groups, 1, own)


def _launch(kernel, x, weight, scales, bias, num_columns, num_units, step, own) -> torch.Tensor:
    """`num_units`: what the input dimension is counted in (inputs or groups); a split is whole steps of it. `own`: the
    kernel's further arguments."""
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    num_rows = flat.shape[0]
    out = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    if out.numel():
        rows = rows_of(num_rows, x.dtype)
        grid = ceil_div(num_columns, COLUMNS), ceil_div(num_rows, rows)
        steps = ceil_div(num_units, step)
        split = max(1, ceil_div(steps, _num_splits(grid[0] * grid[1], steps, x))) * step
        splits = max(1, ceil_div(num_units, split))
        target = out
        if splits > 1:
            target = torch.empty(splits, num_rows, num_columns, dtype=torch.float32, device=x.device)
        kernel[(*grid, splits)](
            flat, weight, scales, out if bias is None else bias, target, flat.stride(0), num_rows, num_columns,
            num_units, split, BIAS=bias is not None, SPLIT=splits > 1,
            UPCAST=IS_INTERPRETED and x.dtype == torch.bfloat16, ROWS=rows, COLUMNS=COLUMNS, **own,
            num_warps=warps_of(rows),
        )  # fmt: skip
        if splits > 1:
            add_up_kernel[(ceil_div(out.numel(), 256),)](
                target, out if bias is None else bias, out, out.numel(), num_columns, splits, BIAS=bias is not None,
                BLOCK=256, num_warps=2,
            )  # fmt: skip
    return out.view(*x.shape[:-1], num_columns)


def rows_of(num_rows: int, dtype: torch.dtype) -> int:
    """Rows of a tile: at least what a tensor-core product takes, at most what the registers hold."""
    return min(16 if dtype == torch.float32 else 32, max(16, next_power_of_2(num_rows)))


def warps_of(rows: int) -> int:
    """Warps of a tile of so many rows: more where four would spill."""
    return 4 if rows == 16 else 8


def _num_splits(num_tiles: int, steps: int, x: torch.Tensor) -> int:
    """As many as fill the device twice, none shorter than two steps."""
    processors = 2 if not x.is_cuda else torch.cuda.get_device_properties(x.device).multi_processor_count
    return max(1, min(MAX_SPLITS, ceil_div(2 * processors, num_tiles), steps // 2))
