"""Depthwise causal convolution along packed sequences, with the last inputs carried from call to call.

    y[t] = bias + sum_j weight[:, j] input[t - (W - 1) + j]       (then silu)

Inputs before a sequence's first token of the call are its *tail*: the W - 1 inputs that came before, in order of time
(zeros for a new sequence). Splitting a sequence between calls changes nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import twin
from kernels.state_batch import StateBatch


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tails: torch.Tensor,
    batch: StateBatch,
    *,
    silu: bool = True,
) -> torch.Tensor:
    """Convolve every sequence: x [T, D] -> y [T, D] of the same dtype; each tail goes forward in place.

    weight: [D, W], W >= 2; bias: [D] or None; tails: [num_slots, D, W - 1] contiguous, of x's dtype. Other slots are
    not touched. Raises ValueError when shapes do not fit.
    """
    _check("causal_conv", x, weight, tails)
    batch.check("causal_conv", x.shape[0], tails.shape[0])
    triton = twin("causal_conv", x)
    if triton is not None:
        return triton.causal_conv(x, weight, bias, tails, batch, silu=silu)  # type: ignore[no-any-return]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    taps = weight.float().T.contiguous()
    for tokens, slot in batch.spans():
        inputs = torch.cat((tails[slot].T, x[tokens]))
        length = tokens.stop - tokens.start
        total = inputs[:length].float() * taps[0]
        for j in range(1, len(taps)):
            total.addcmul_(inputs[j : j + length].float(), taps[j])
        total = total if bias is None else total.add_(bias.float())
        y[tokens] = F.silu(total, inplace=True) if silu else total
        tails[slot] = inputs[length:].T
    return y


def causal_conv_update(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tails: torch.Tensor,
    slots: torch.Tensor,
    *,
    silu: bool = True,
) -> torch.Tensor:
    """One token of S sequences: as `causal_conv` with x [S, D]; slots: [S] int64, distinct, on x's device."""
    _check("causal_conv_update", x, weight, tails)
    if slots.shape != x.shape[:1]:
        raise ValueError(f"causal_conv_update: {x.shape[0]} sequences, {slots.shape[0]} slots")
    triton = twin("causal_conv", x)
    if triton is not None:
        return triton.causal_conv_update(x, weight, bias, tails, slots, silu=silu)  # type: ignore[no-any-return]
    inputs = torch.cat((tails.index_select(0, slots), x[:, :, None]), dim=2)
    tails.index_copy_(0, slots, inputs[:, :, 1:])
    total = (inputs.float() * weight.float()).sum(2)
    y = (total if bias is None else total + bias.float()).to(x.dtype)
    return F.silu(y, inplace=True) if silu else y


def _check(op: str, x: torch.Tensor, weight: torch.Tensor, tails: torch.Tensor) -> None:
    channels, width = weight.shape
    if width < 2 or x.dim() != 2 or x.shape[1] != channels or tails.shape[1:] != (channels, width - 1):
        raise ValueError(
            f"{op}: x {tuple(x.shape)}, weight {tuple(weight.shape)} and tails {tuple(tails.shape)} do not fit"
        )
    if tails.dtype != x.dtype or not tails.is_contiguous():
        raise ValueError(f"{op}: tails must be contiguous {x.dtype}, got {tails.dtype}, strides {tails.stride()}")
