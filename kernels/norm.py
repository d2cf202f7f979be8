"""Normalisation over the last dimension.

Statistics are always taken in float32; the result has the input's dtype. Weights have the input's dtype.
Knows tensors only; which norm a model uses is the model's business.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import ANY_SIZE, deciding, fused, native, twin


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, *, round_before_weight: bool = False
) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension; without weight the factor is 1.

    x: [..., D], weight: [D] or None, same floating dtype. Returns a new tensor like `x`. round_before_weight: the
    normalised row is rounded to x's dtype before the product, as the first Llama code had it (which differs in
    float16 and bfloat16 only).
    """
    lead = deciding(x, weight)
    triton = twin("norm", lead)
    if triton is not None:
        return triton.rms_norm(x, weight, eps, round_before_weight)  # type: ignore[no-any-return]
    quick = None if round_before_weight and weight is not None else native("norm", lead, ANY_SIZE)
    if quick is not None:
        return quick.rms_norm(x, weight, eps)  # type: ignore[no-any-return]
    if round_before_weight and weight is not None:
        return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rms_norm_heads(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` of every head of x [T, H, D] with its own row of weight [H, D], same floating dtype; any strides.

    Returns a new tensor like `x`.
    """
    lead = deciding(x, weight)
    triton = twin("norm", lead)
    if triton is not None:
        return triton.rms_norm_heads(x, weight, eps)  # type: ignore[no-any-return]
    quick = native("norm", lead, ANY_SIZE)
    if quick is not None:
        return quick.rms_norm(x, weight, eps)  # type: ignore[no-any-return]
    return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x` onto the residual stream, then normalise it: returns `(rms_norm(residual + x), residual + x)`.

    x, residual: [..., D] of equal dtype. The sum is written into `residual`, which is also what comes back second.
    """
    lead = deciding(x, weight, residual)
    quick = fused("norm", lead, ANY_SIZE) if residual.is_contiguous() else twin("norm", lead)
    if quick is not None:
        return quick.add_rms_norm(x, residual, weight, eps)  # type: ignore[no-any-return]
    residual.add_(x)
    return F.rms_norm(residual, weight.shape, weight, eps), residual


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension, biased variance.

    x: [..., D], weight and bias: [D]. Returns a new tensor like `x`.
    """
    triton = twin("norm", deciding(x, weight, bias))
    if triton is not None:
        return triton.layer_norm(x, weight, bias, eps)  # type: ignore[no-any-return]
    return torch.layer_norm(x, weight.shape, weight, bias, eps)
