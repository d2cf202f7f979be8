"""Rotary position embeddings in the half-split layout: one-dimensional, multimodal (M-RoPE) and two-dimensional.

Element `i` of a head pairs with element `i + D/2`. Angles, cosines and sines are float32 whatever the model's dtype,
and so is the rotation; the result has the input's dtype. A `RotaryTable` holds what all layers of one step share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from kernels.dispatch import ANY_SIZE, fused


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RotaryTable:
    """Cosines and signed sines, ready for `rotate`: both [T, 1, R] float32 for heads of R elements, or for the first R
    of larger ones.

    The first half of `signed_sin` is negated, so that `x * cos + roll(x, R/2) * signed_sin` is the rotation.
    """

    cos: torch.Tensor
    signed_sin: torch.Tensor


def inverse_frequencies(head_dim: int, theta: float) -> torch.Tensor:
    """`theta ** -(2i / head_dim)` for `i < head_dim / 2`: [head_dim / 2] float32. Raises ValueError on an odd head."""
    if head_dim % 2:
        raise ValueError(f"rotary: head_dim must be even, got {head_dim}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (theta**exponents)


def rotary_cos_sin(positions: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles of one position per token. positions: [T] integer, inv_freq: [D/2]. Returns cos, sin [T, D/2] float32."""
    angles = positions.to(torch.float32)[:, None] * inv_freq
    return angles.cos(), angles.sin()


def mrope_cos_sin(
    positions: torch.Tensor, inv_freq: torch.Tensor, sections: Sequence[int], *, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles of three positions (temporal, height, width) per token.

    positions: [3, T] integer; inv_freq: [D/2]; `sections` share the D/2 frequencies among the three positions in turn
    (section `i` follows row `i % 3`), or `interleaved`: three sections, of which the second and third take every third
    frequency from their own place on, and the first what is left. Returns cos, sin: [T, D/2] float32.
    Raises ValueError when the sections do not sum up to D/2.
    """
    if sum(sections) != inv_freq.shape[0]:
        raise ValueError(f"mrope: sections {list(sections)} must sum up to {inv_freq.shape[0]} frequencies")
    by_row = positions.to(torch.float32)
    if interleaved:
        axes = torch.zeros(inv_freq.shape[0], dtype=torch.int64)
        for axis in (1, 2):
            axes[axis : 3 * sections[axis] : 3] = axis
        angles = by_row[axes.to(positions.device)].T * inv_freq
        return angles.cos(), angles.sin()
    parts = [
        by_row[i % 3][:, None] * frequencies for i, frequencies in enumerate(torch.split(inv_freq, list(sections)))
    ]
    angles = torch.cat(parts, dim=-1)
    return angles.cos(), angles.sin()


def rotary_2d_cos_sin(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles of a (row, column) position per token: the first half of the frequencies follows the row, the other the
    column. positions: [T, 2] integer. Returns cos, sin: [T, head_dim / 2] float32.
    Raises ValueError unless head_dim is a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"rotary: a two-dimensional head must be a multiple of 4, got {head_dim}")
    inv_freq = inverse_frequencies(head_dim // 2, theta).to(positions.device)
    angles = (positions.to(torch.float32)[:, :, None] * inv_freq).flatten(1)
    return angles.cos(), angles.sin()


def rotary_table(cos: torch.Tensor, sin: torch.Tensor) -> RotaryTable:
    """Widen cos, sin [T, D/2] to a table for `rotate`."""
    return RotaryTable(cos=torch.cat((cos, cos), dim=-1)[:, None], signed_sin=torch.cat((-sin, sin), dim=-1)[:, None])


def rotate(x: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Rotate every head of x [T, H, D] by the angles of its token, or its first elements, where the table is of fewer;
    the others stay as they are. Returns a new tensor like `x`.

    Query and key heads that sit side by side in one tensor are rotated in one call.
    """
    rotated = table.cos.shape[-1]
    if rotated < x.shape[-1]:
        return torch.cat((rotate(x[..., :rotated], table), x[..., rotated:]), dim=-1)
    quick = fused("rotary", x, ANY_SIZE)
    if quick is not None:
        return quick.rotate(x, table.cos, table.signed_sin)  # type: ignore[no-any-return]
    wide = x.to(torch.float32)
    turned = torch.addcmul(wide * table.cos, wide.roll(x.shape[-1] // 2, -1), table.signed_sin)
    return turned.to(x.dtype)
