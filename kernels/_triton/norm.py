"""RMSNorm (with the residual added first) and LayerNorm: one pass over memory, statistics in float32.

A program owns a few whole rows: rows of a narrow tensor (query and key norms) share a program, a wide row has its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels._triton.launch import ceil_div, misfit, next_power_of_2

ELEMENTS = 4096  # of one program's tile: wide enough to fill a memory transaction queue, small enough not to spill


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, x_stride, residual_stride, num_rows, width, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows) & (columns < width)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        places = residual_ptr + rows * residual_stride + columns
        total = x.to(tl.float32) + tl.load(places, mask=inside, other=0.0).to(tl.float32)
        x = total.to(x.dtype)  # what later layers see is the rounded sum, so it is what is normalised
        tl.store(places, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1)[:, None] / width + eps)
    normed = wide * scale
    if ROUND:
        normed = normed.to(x.dtype).to(tl.float32)
    if HAS_WEIGHT:
        normed *= tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * width + columns, normed.to(x.dtype), mask=inside)


@triton.jit
def layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, x_stride, num_rows, width, eps,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows) & (columns < width)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    mean = tl.sum(wide, axis=1)[:, None] / width
    centred = tl.where(inside, wide - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / width + eps)
    result = centred * scale * tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    if HAS_BIAS:
        result += tl.load(bias_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * width + columns, result.to(x.dtype), mask=inside)


@triton.jit
def rms_norm_heads_kernel(
    x_ptr, weight_ptr, out_ptr, token_stride, head_stride, num_rows, num_heads, width, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < num_rows) & (columns < width)
    head = rows % num_heads
    start = x_ptr + rows // num_heads * token_stride + head * head_stride
    x = tl.load(start + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1)[:, None] / width + eps)
    weight = tl.load(weight_ptr + head * width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * width + columns, (wide * scale * weight).to(x.dtype), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, round_before_weight: bool) -> torch.Tensor:
    """See kernels.norm.rms_norm."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if weight is not None:
        weight = _factors("rms_norm", x, weight)
    _launch_rms(_rows(x), None, weight, out, eps, round_before_weight)
    return out


def rms_norm_heads(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See kernels.norm.rms_norm_heads. ValueError when the weight has not a row for each head."""
    if weight.shape != x.shape[1:]:
        raise misfit("rms_norm_heads", x=x, weight=weight)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        x = x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
        num_tokens, num_heads, width = x.shape
        num_rows = num_tokens * num_heads
        tile_rows, block, warps = tile(width)
        rms_norm_heads_kernel[(ceil_div(num_rows, tile_rows),)](
            x, weight.contiguous(), out, x.stride(0), x.stride(1), num_rows, num_heads, width, eps, ROWS=tile_rows,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See kernels.norm.add_rms_norm. ValueError when the residual's rows cannot be written in place."""
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise misfit("add_rms_norm", x=x, residual=residual)
    weight = _factors("add_rms_norm", x, weight)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stream = _rows(residual)
    if stream.data_ptr() != residual.data_ptr():
        raise ValueError(f"the residual {tuple(residual.shape)} with strides {residual.stride()} has no plain rows")
    _launch_rms(_rows(x), stream, weight, out, eps, False)
    return out, residual


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """See kernels.norm.layer_norm."""
    has_bias = bias is not None
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, weight = _rows(x), _factors("layer_norm", x, weight)
    bias = weight if bias is None else _factors("layer_norm", x, bias)
    num_rows, width = rows.shape
    if num_rows and width:
        tile_rows, block, warps = tile(width)
        layer_norm_kernel[(ceil_div(num_rows, tile_rows),)](
            rows, weight, bias, out, rows.stride(0), num_rows, width, eps,
            HAS_BIAS=has_bias, ROWS=tile_rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return out


def tile(width: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of one program for rows of `width` elements."""
    block = next_power_of_2(width)
    rows = max(1, min(16, ELEMENTS // block))
    return rows, block, min(16, max(1, rows * block // 1024))


def _launch_rms(
    rows: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
    round_before_weight: bool,
) -> None:
    num_rows, width = rows.shape
    if not num_rows or not width:
        return
    tile_rows, block, warps = tile(width)
    stream = rows if residual is None else residual
    rms_norm_kernel[(ceil_div(num_rows, tile_rows),)](
        rows, stream, rows if weight is None else weight, out, rows.stride(0), stream.stride(0), num_rows, width, eps,
        HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, ROUND=round_before_weight,
        ROWS=tile_rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def _factors(op: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A weight or bias [D] of x [..., D], its numbers neighbours."""
    if weight.shape != x.shape[-1:]:
        raise misfit(op, x=x, weight=weight)
    return weight.contiguous()


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, width] with neighbouring columns; a view where the strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()
