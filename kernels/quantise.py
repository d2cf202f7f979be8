"""Rows of 8-bit numbers with one scale each: quantise and dequantise, also straight into and out of KV pages.

A row is the last dimension. Its scale is its largest magnitude divided by the largest number of the 8-bit type, so
`row = values * scale` to within half a step. int8 is uniform in [-127, 127]; float8 (e4m3, up to 448) has three bits
of mantissa. A cache of quantised pages is [num_pages, page_size, Hk, D] beside its scales [num_pages, page_size, Hk].
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch

from kernels.dispatch import twin
from kernels.put_rows import put_rows

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST = 2.0**-117  # largest number of a row that is told from zero; as kernels/_triton/quantise.py has it
BELOW_SMALLEST = SMALLEST * (1 - 2.0**-24)  # the float32 before it
FEW_NUMBERS = 1 << 13  # up to which calls take longer than the work
FLOAT8_CAPABILITY = (8, 9)  # older devices have no float8: they take the torch path


def quantise_rows(x: torch.Tensor, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [..., D] float. Returns (values [..., D] of `dtype`, scales [...] float32); a row of zeros has scale 0, and so
    has one whose numbers are all below 2**-117, whose scale's reciprocal is no float32.

    dtype: int8 or float8_e4m3fn, ValueError for another. Rounds to nearest. NaN and infinities are not supported.
    """
    _check_dtype(dtype)
    triton = _twin(x, dtype)
    if triton is not None:
        return triton.quantise_rows(x, dtype, LARGEST[dtype])  # type: ignore[no-any-return]
    num_numbers = x.numel()
    if not num_numbers:
        return x.to(dtype), torch.zeros(x.shape[:-1], device=x.device)
    wide = x.float()
    if dtype == torch.int8 and num_numbers <= FEW_NUMBERS and x.is_cpu:
        return _quantise_few(wide)
    largest = wide.abs().amax(-1, keepdim=True)
    steps = largest.clamp_min(SMALLEST).reciprocal_().mul_(LARGEST[dtype])  # of rows without a scale whatever number
    scaled = wide * steps  # rounding takes it past the largest number by less than half a step
    values = scaled.round_() if dtype == torch.int8 else scaled
    scales = torch.threshold_(largest, BELOW_SMALLEST, 0.0).squeeze(-1).div_(LARGEST[dtype])
    return values.to(dtype), scales


def _quantise_few(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 to int8 with the same bits, by numpy, whose calls take less."""
    wide = x.numpy(force=True)
    largest = np.maximum.reduce(np.abs(wide), axis=-1, keepdims=True)
    steps = np.reciprocal(np.maximum(largest, SMALLEST)) * LARGEST[torch.int8]
    values = np.rint(wide * steps).astype(np.int8)
    largest[largest < SMALLEST] = 0
    return torch.from_numpy(values), torch.from_numpy(largest[..., 0] / LARGEST[torch.int8])


def dequantise_rows(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values * scales` in float32, rounded once to `dtype`. values: [..., D] int8 or float8_e4m3fn, scales: [...]."""
    _check_dtype(values.dtype)
    triton = _twin(scales, values.dtype)
    if triton is not None:
        return triton.dequantise_rows(values, scales, None, dtype)  # type: ignore[no-any-return]
    return values.float().mul_(scales.unsqueeze(-1)).to(dtype)


def write_quantised_pages(cache: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, slots: torch.Tensor) -> None:
    """Quantise keys or values x [T, Hk, D] into `slots` [T] int64 of a cache and its scales, in place.

    cache, scales: as above, contiguous; slots: distinct. Other slots stay as they are.
    """
    _check_dtype(cache.dtype)
    _check_pages("write_quantised_pages", cache, scales)
    triton = _twin(x, cache.dtype)
    if triton is not None:
        triton.write_quantised_pages(cache, scales, x, slots, LARGEST[cache.dtype])
        return
    values, row_scales = quantise_rows(x, cache.dtype)
    # as bytes: not every device copies float8 by index
    put_rows(cache.view(torch.uint8).view(-1, *cache.shape[2:]), slots, values.view(torch.uint8))
    scales.view(-1, scales.shape[2]).index_copy_(0, slots, row_scales)


def read_quantised_pages(
    cache: torch.Tensor, scales: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Keys or values at `slots` [L] int64, dequantised: [L, Hk, D] of `dtype`. Other slots are not read."""
    _check_dtype(cache.dtype)
    _check_pages("read_quantised_pages", cache, scales)
    triton = _twin(scales, cache.dtype)
    if triton is not None:
        flat = cache.view(-1, *cache.shape[2:])
        return triton.dequantise_rows(flat, scales.view(-1, scales.shape[2]), slots, dtype)  # type: ignore[no-any-return]
    values = cache.view(torch.uint8).view(-1, *cache.shape[2:]).index_select(0, slots).view(cache.dtype)
    return dequantise_rows(values, scales.view(-1, scales.shape[2]).index_select(0, slots), dtype)


def _twin(x: torch.Tensor, dtype: torch.dtype) -> ModuleType | None:
    if dtype != torch.int8 and x.is_cuda and torch.cuda.get_device_capability(x.device) < FLOAT8_CAPABILITY:
        return None
    return twin("quantise", x)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in LARGEST:
        raise ValueError(f"rows are quantised to {' or '.join(map(str, LARGEST))}, not {dtype}")


def _check_pages(op: str, cache: torch.Tensor, scales: torch.Tensor) -> None:
    if scales.shape != cache.shape[:-1]:
        raise ValueError(f"{op}: a cache {tuple(cache.shape)} needs one scale per row, got {tuple(scales.shape)}")
    if not cache.is_contiguous() or not scales.is_contiguous():
        raise ValueError(f"{op}: not contiguous: cache strides {cache.stride()}, scales strides {scales.stride()}")
