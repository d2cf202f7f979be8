"""Rows to 8 bits and back: a program takes a few whole rows (of one head each), with or without slots to scatter to."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels._triton.launch import ceil_div, next_power_of_2

ELEMENTS = 2048  # of one program
SMALLEST_NORMAL = tl.constexpr(0.015625)  # of float8 e4m3; below it steps are 2^-9
SUBNORMAL_ROUNDING = tl.constexpr(24576.0)  # 1.5 * 2^14: its own steps are 2^-9
SMALLEST = tl.constexpr(2.0**-117)  # as kernels/quantise.py has it
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds to the nearest even integer


@triton.jit
def _round_to_float8(x):
    """The nearest number that e4m3 has, ties to even, so that the conversion itself is exact: the interpreter's own
    rounding loses the carry into the exponent."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
    small = (x + SUBNORMAL_ROUNDING) - SUBNORMAL_ROUNDING
    return tl.where(tl.abs(x) < SMALLEST_NORMAL, small, bits.to(tl.float32, bitcast=True))


@triton.jit
def quantise_kernel(
    x_ptr, values_ptr, scales_ptr, slots_ptr, token_stride, head_stride, num_rows, num_heads, width, largest,
    SLOTS: tl.constexpr, INTEGER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    is_row = rows < num_rows
    inside = is_row[:, None] & (columns < width)[None, :]
    token = rows // num_heads
    head = rows % num_heads
    start = x_ptr + (token * token_stride + head * head_stride)[:, None]
    x = tl.load(start + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    magnitude = tl.max(tl.abs(x), axis=1)
    magnitude = tl.where(magnitude < SMALLEST, 0.0, magnitude)
    steps = tl.where(magnitude > 0, largest / tl.where(magnitude > 0, magnitude, 1.0), 0.0)
    scaled = tl.minimum(tl.maximum(x * steps[:, None], -largest), largest)
    scaled = (scaled + ROUNDING) - ROUNDING if INTEGER else _round_to_float8(scaled)
    if SLOTS:
        token = tl.load(slots_ptr + token, mask=is_row, other=0)
    target = token * num_heads + head
    place = values_ptr + target[:, None] * width + columns[None, :]
    tl.store(place, scaled.to(values_ptr.dtype.element_ty), mask=inside)
    tl.store(scales_ptr + target, magnitude / largest, mask=is_row)


@triton.jit
def dequantise_kernel(
    values_ptr, scales_ptr, slots_ptr, out_ptr, num_rows, num_heads, width,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    is_row = rows < num_rows
    inside = is_row[:, None] & (columns < width)
    source = rows
    if SLOTS:
        source = tl.load(slots_ptr + rows // num_heads, mask=is_row, other=0) * num_heads + rows % num_heads
    scales = tl.load(scales_ptr + source, mask=is_row, other=0.0)
    values = tl.load(values_ptr + source[:, None] * width + columns, mask=inside, other=0.0).to(tl.float32)
    result = values * scales[:, None]
    tl.store(out_ptr + rows[:, None] * width + columns, result.to(out_ptr.dtype.element_ty), mask=inside)


def quantise_rows(x: torch.Tensor, dtype: torch.dtype, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See kernels.quantise.quantise_rows."""
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if not x.shape[-1]:
        return values, scales.zero_()
    _quantise(x.reshape(-1, 1, x.shape[-1]), values, scales, None, largest)
    return values, scales


def write_quantised_pages(
    cache: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, largest: float
) -> None:
    """See kernels.quantise.write_quantised_pages."""
    _quantise(x, cache, scales, slots.contiguous(), largest)


def dequantise_rows(
    values: torch.Tensor, scales: torch.Tensor, slots: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """See kernels.quantise.dequantise_rows; with `slots`, only those of values [num_slots, Hk, D]."""
    values = values.contiguous()
    shape = values.shape if slots is None else (len(slots), *values.shape[1:])
    out = torch.empty(shape, dtype=dtype, device=values.device)
    if out.numel():
        width = values.shape[-1]
        num_rows = out.numel() // width
        rows, block = tile(width)
        dequantise_kernel[(ceil_div(num_rows, rows),)](
            values, scales.contiguous(), scales if slots is None else slots.contiguous(), out, num_rows,
            values.shape[1] if slots is not None else 1, width, SLOTS=slots is not None, ROWS=rows, BLOCK=block,
        )  # fmt: skip
    return out


def tile(width: int) -> tuple[int, int]:
    """(rows, columns) of one program for rows of `width` elements."""
    block = next_power_of_2(width)
    return max(1, min(32, ELEMENTS // block)), block


def _quantise(
    x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, slots: torch.Tensor | None, largest: float
) -> None:
    num_tokens, num_heads, width = x.shape
    if not x.numel():
        return
    x = x if x.stride(2) == 1 else x.contiguous()
    rows, block = tile(width)
    quantise_kernel[(ceil_div(num_tokens * num_heads, rows),)](
        x, values, scales, scales if slots is None else slots, x.stride(0), x.stride(1), num_tokens * num_heads,
        num_heads, width, largest, SLOTS=slots is not None, INTEGER=values.dtype == torch.int8, ROWS=rows, BLOCK=block,
    )  # fmt: skip
