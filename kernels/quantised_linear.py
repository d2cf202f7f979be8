"""Linear layers whose weights are 8 or 4 bits wide, for batches so small that reading the weights is all the time.

int8: weight [N, K] int8, one float32 scale per output row. int4: groups of `group_size` neighbouring inputs share a
scale; a byte of packed [N, K / 2] holds two numbers, each stored with 8 added: inside group g, byte b holds input
`g * group_size + b` in its low half and the input half a group further in its high half. Activations stay in their
dtype, sums are float32, no bias is quantised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import twin
from kernels.quantise import quantise_rows

GROUP_SIZE = 128
SMALLEST_GROUP = 32
CHUNK_ELEMENTS = 1 << 20  # of the weight, widened at one time on the torch path


def quantise_weight_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] float -> (int8 [N, K], scales [N] float32)."""
    return quantise_rows(weight, torch.int8)


def quantise_weight_int4(weight: torch.Tensor, group_size: int = GROUP_SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] float -> (packed uint8 [N, K / 2], scales [N, K / group_size] float32), numbers in [-7, 7].

    Raises ValueError when group_size is no power of two from 32 up, or K is no multiple of it.
    """
    rows, columns = weight.shape
    _check_group(columns, group_size)
    groups = weight.float().view(rows, columns // group_size, group_size)
    largest = groups.abs().amax(-1, keepdim=True)
    steps = torch.where(largest > 0, 7.0 / largest, 0.0)
    numbers = ((groups * steps).round_().clamp_(-7, 7) + 8).to(torch.uint8)
    low, high = numbers.chunk(2, dim=-1)
    return (low | (high << 4)).reshape(rows, columns // 2), largest[..., 0] / 7.0


def unpack_int4(packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] that (packed, scales) stand for."""
    rows, num_groups = scales.shape
    halves = packed.view(rows, num_groups, -1)
    numbers = torch.cat((halves & 15, halves >> 4), dim=-1).to(dtype) - 8
    return (numbers * scales[..., None].to(dtype)).view(rows, -1)


def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ (weight * scales).T + bias`: x [..., K] -> [..., N] of x's dtype. Raises ValueError on other shapes."""
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or scales.shape != weight.shape[:1]:
        raise ValueError(
            f"int8_linear: inputs {tuple(x.shape)}, weight {tuple(weight.shape)} and scales {tuple(scales.shape)} "
            "do not fit"
        )
    triton = twin("quantised_linear", x)
    if triton is not None:
        return triton.int8_linear(x, weight, scales, bias)  # type: ignore[no-any-return]
    rows = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    parts = [F.linear(x, weight[start : start + rows].to(x.dtype)) for start in range(0, len(weight), rows)]
    return _finish(parts, x, weight.shape[0], scales, bias)


def int4_linear(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ weight.T + bias` for a packed 4-bit weight: x [..., K] -> [..., N] of x's dtype.

    packed: [N, K / 2] uint8, scales: [N, K / group_size] float32. Raises ValueError on other shapes.
    """
    columns = x.shape[-1]
    if packed.dim() != 2 or 2 * packed.shape[1] != columns or scales.shape[0] != packed.shape[0]:
        raise ValueError(
            f"int4_linear: inputs {tuple(x.shape)}, packed {tuple(packed.shape)} and scales {tuple(scales.shape)} "
            "do not fit"
        )
    _check_group(columns, columns // max(1, scales.shape[1]))
    triton = twin("quantised_linear", x)
    if triton is not None:
        return triton.int4_linear(x, packed, scales, bias)  # type: ignore[no-any-return]
    rows = max(1, CHUNK_ELEMENTS // columns)
    chunks = (slice(start, start + rows) for start in range(0, len(packed), rows))
    parts = [F.linear(x, unpack_int4(packed[chunk], scales[chunk], x.dtype)) for chunk in chunks]
    return _finish(parts, x, packed.shape[0], None, bias)


def _finish(
    parts: list[torch.Tensor], x: torch.Tensor, width: int, scales: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    if not width:
        return x.new_empty(*x.shape[:-1], 0)
    total = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
    if scales is not None:
        total = (total.float() * scales).to(x.dtype)
    return total if bias is None else total + bias


def _check_group(columns: int, group_size: int) -> None:
    if group_size < SMALLEST_GROUP or group_size & (group_size - 1) or columns % group_size:
        raise ValueError(
            f"groups of {group_size}: a group is a power of two from {SMALLEST_GROUP} up, and {columns} inputs must "
            "be whole groups"
        )
