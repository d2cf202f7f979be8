"""Linear layers whose weights are 8 or 4 bits wide, for batches so small that reading the weights is all the time.

int8: weight [N, K] int8, one float32 scale per output row. int4: groups of `group_size` neighbouring inputs share a
scale; a byte of packed [N, K / 2] holds two numbers, each stored with the group's zero added, which is 8 unless there
are zeros [N, K / group_size] uint8: inside group g, byte b holds input `g * group_size + b` in its low half and the
input half a group further in its high half. Activations stay in their dtype but for `int8_dynamic_linear`, sums are
float32, no bias is quantised.

On the CPU torch brings operations for bfloat16 activations and for 8-bit ones that read the weights at the speed of
memory; float32 takes a C twin for few rows. The rest widens a part of the weight at a time. `PackedInt8` and
`PackedInt4` hold weights in the layouts that torch's operations read.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F

from kernels._native.limits import MAX_GROUP, MAX_ROWS, MIN_COLUMNS
from kernels.dispatch import native, twin
from kernels.quantise import quantise_rows

GROUP_SIZE = 128
SMALLEST_GROUP = 32
CHUNK_ELEMENTS = 1 << 21  # of the weight, widened at one time on the torch path
PACKED_ROWS = 10  # of bfloat16 activations, up to which torch's own product with 8-bit weights is the quicker one
PACKED_INPUTS = 16  # of which that product takes a multiple: it reads past the ends of others
INT4_COLUMNS = 16  # of which torch's layout for 4 bits takes a multiple


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
    return pack_int4(numbers.view(rows, columns), group_size), largest[..., 0] / 7.0


def pack_int4(numbers: torch.Tensor, group_size: int) -> torch.Tensor:
    """Whole numbers [N, K] uint8 below 16, K a multiple of group_size, as packed [N, K / 2]."""
    rows, columns = numbers.shape
    low, high = numbers.reshape(rows, columns // group_size, group_size).chunk(2, dim=-1)
    return (low | (high << 4)).reshape(rows, columns // 2)


def unpack_int4(
    packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, zeros: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight [N, K] that these stand for, rounded to `dtype` once."""
    rows, num_groups = scales.shape
    halves = packed.view(rows, num_groups, -1)
    numbers = torch.empty(rows, num_groups, 2, halves.shape[2], device=packed.device)
    numbers[:, :, 0] = halves & 15
    numbers[:, :, 1] = halves >> 4
    numbers.sub_(8 if zeros is None else zeros[..., None, None].float())
    return numbers.mul_(scales[..., None, None]).view(rows, -1).to(dtype)


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
    flat = x.reshape(-1, x.shape[-1])
    if _takes_native(flat, weight):
        small = native("linear", flat, flat.numel())
        if small is not None:
            few: torch.Tensor = small.int8_linear(flat, weight, scales, bias)
            return few.view(*x.shape[:-1], len(weight))
    if _takes_packed(flat, weight):
        ones = torch.ones(len(weight), dtype=x.dtype)  # scales in bfloat16 would lose a part of their precision
        total = torch._weight_int8pack_mm(flat.contiguous(), weight, ones)
        return _finish([total], x, weight.shape[0], scales, bias).view(*x.shape[:-1], len(weight))
    rows = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    wide = x.float() if x.dtype == torch.float16 else x  # sums before their scale are too large for float16
    parts = [F.linear(wide, weight[start : start + rows].to(wide.dtype)) for start in range(0, len(weight), rows)]
    return _finish(parts, x, weight.shape[0], scales, bias)


def int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias` for a packed 4-bit weight: x [..., K] -> [..., N] of x's dtype.

    packed: [N, K / 2] uint8, scales: [N, K / group_size] float32, zeros: of the same shape, uint8. Raises ValueError on
    other shapes.
    """
    columns = x.shape[-1]
    if packed.dim() != 2 or 2 * packed.shape[1] != columns or scales.shape[0] != packed.shape[0]:
        raise ValueError(
            f"int4_linear: inputs {tuple(x.shape)}, packed {tuple(packed.shape)} and scales {tuple(scales.shape)} "
            "do not fit"
        )
    if zeros is not None and zeros.shape != scales.shape:
        raise ValueError(f"int4_linear: zeros {tuple(zeros.shape)} and scales {tuple(scales.shape)} do not fit")
    _check_group(columns, columns // max(1, scales.shape[1]))
    triton = twin("quantised_linear", x)
    if triton is not None:
        return triton.int4_linear(x, packed, scales, bias, zeros)  # type: ignore[no-any-return]
    flat = x.reshape(-1, columns)
    if _takes_native(flat, packed) and columns // scales.shape[1] <= MAX_GROUP:
        wide = flat.float()  # the C path knows no other; in few rows that is quickly done
        small = native("linear", wide, wide.numel())
        if small is not None:
            own = None if bias is None else bias.float()
            total: torch.Tensor = small.int4_linear(wide, packed, scales, own, zeros)
            return total.to(x.dtype).view(*x.shape[:-1], len(packed))
    rows = max(1, CHUNK_ELEMENTS // columns)
    chunks = (slice(start, start + rows) for start in range(0, len(packed), rows))
    weights = (unpack_int4(packed[c], scales[c], x.dtype, None if zeros is None else zeros[c]) for c in chunks)
    return _finish([F.linear(x, weight) for weight in weights], x, packed.shape[0], None, bias)


def int8_dynamic_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`int8_linear` of x [T, K] whose rows are rounded to 8 bits first, each by its own largest number: [T, N].

    The sums are exact, so no row's result depends on the others. Raises ValueError on other shapes.
    """
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[1] != x.shape[1] or scales.shape != weight.shape[:1]:
        raise ValueError(
            f"int8_dynamic_linear: inputs {tuple(x.shape)}, weight {tuple(weight.shape)} and scales "
            f"{tuple(scales.shape)} do not fit"
        )
    values, row_scales = quantise_rows(x)
    if x.is_cuda:  # the product takes more than 16 rows, and eights of everything
        lacking = max(17 - len(x), 0) + -max(17, len(x)) % 8
        values = torch.cat((values, values.new_zeros(lacking, x.shape[1])))
    sums = torch._int_mm(values, weight.T)[: len(x)].float()
    return _scaled(sums * scales, row_scales, bias, x.dtype)


@functools.cache
def sums_bytes_exactly() -> bool:
    """Whether products of 8-bit numbers add up right on the CPU: x86 without VNNI adds pairs of them in 16 bits, which
    overflow, and neither of torch's operations says so."""
    largest = torch.full((16, 256), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.T) == 127 * 127 * 256).all())


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackedInt8:
    """An int8 weight in the layout of oneDNN's products of 8-bit numbers, with its scales."""

    numbers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @staticmethod
    def is_served(device: torch.device) -> bool:
        """Whether there is such a layout for weights on `device`."""
        return device.type == "cpu" and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, weight: torch.Tensor, scales: torch.Tensor) -> PackedInt8:
        packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
        return cls(numbers=packed, scales=scales, zeros=torch.zeros(len(scales), dtype=torch.int64))


def packed_int8_dynamic_linear(x: torch.Tensor, weight: PackedInt8, bias: torch.Tensor | None) -> torch.Tensor:
    """`int8_dynamic_linear` on a packed weight."""
    values, row_scales = quantise_rows(x)
    shifted = values.view(torch.uint8) ^ 128  # 128 more, as bytes without a sign: the product is quickest so
    sums = torch.ops.onednn.qlinear_pointwise(
        shifted, 1.0, 128, weight.numbers, weight.scales, weight.zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return _scaled(sums, row_scales, bias, x.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackedInt4:
    """An int4 weight in the layout of torch's product on the CPU: scales [groups, N, 2], each beside a zero."""

    numbers: torch.Tensor
    scales: torch.Tensor
    group_size: int

    @staticmethod
    def is_served(columns: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the layout serves a weight of so many rows for activations of `dtype` on `device`."""
        return device.type == "cpu" and dtype == torch.bfloat16 and columns % INT4_COLUMNS == 0

    @classmethod
    def of(cls, packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> PackedInt4:
        """From what `quantise_weight_int4` returns."""
        rows, num_groups = scales.shape
        halves = packed.view(rows, num_groups, -1)
        numbers = torch.cat((halves & 15, halves >> 4), dim=-1).view(rows, -1).to(torch.int32)
        columns = scales.T.to(dtype)
        return cls(
            numbers=torch._convert_weight_to_int4pack_for_cpu(numbers, 1),
            scales=torch.stack((columns, torch.zeros_like(columns)), dim=-1).contiguous(),
            group_size=numbers.shape[1] // num_groups,
        )


def packed_int4_linear(x: torch.Tensor, weight: PackedInt4, bias: torch.Tensor | None) -> torch.Tensor:
    """`int4_linear` on a packed weight: x [T, K] bfloat16."""
    total = torch._weight_int4pack_mm_for_cpu(x.contiguous(), weight.numbers, weight.group_size, weight.scales)
    return total if bias is None else total + bias


def _takes_native(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return 0 < len(x) <= MAX_ROWS and len(weight) >= MIN_COLUMNS and weight.numel() > 0 and weight.is_contiguous()


def _takes_packed(x: torch.Tensor, weight: torch.Tensor) -> bool:
    fits = 0 < len(x) <= PACKED_ROWS and x.shape[1] % PACKED_INPUTS == 0 and weight.numel() > 0
    return fits and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def _scaled(
    sums: torch.Tensor, row_scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    total = sums * row_scales[:, None]
    return (total if bias is None else total + bias).to(dtype)


def _finish(
    parts: list[torch.Tensor], x: torch.Tensor, width: int, scales: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    if not width:
        return x.new_empty(*x.shape[:-1], 0)
    total = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
    if scales is not None:
        total = total.float().mul_(scales).to(x.dtype)
    return total if bias is None else total + bias


def _check_group(columns: int, group_size: int) -> None:
    if group_size < SMALLEST_GROUP or group_size & (group_size - 1) or columns % group_size:
        raise ValueError(
            f"groups of {group_size}: a group is a power of two from {SMALLEST_GROUP} up, and {columns} inputs must "
            "be whole groups"
        )
