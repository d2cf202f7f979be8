"""Causal convolution: a program takes a tile of tokens and channels of one sequence. Tails move in a second launch,
when nobody reads the old ones any more.

    pieces [n, 4] int32: first token · tokens · slot · offset of the first token in its sequence
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels._triton.launch import ceil_div
from kernels.state_batch import StateBatch

TOKENS, CHANNELS = 16, 128  # of one tile


@triton.jit
def conv_kernel(
    x_ptr, weight_ptr, bias_ptr, tails_ptr, out_ptr, pieces_ptr, x_stride, num_channels,
    BIAS: tl.constexpr, SILU: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0).to(tl.int64)
    first = tl.load(pieces_ptr + piece * 4).to(tl.int64)
    length = tl.load(pieces_ptr + piece * 4 + 1)
    slot = tl.load(pieces_ptr + piece * 4 + 2).to(tl.int64)
    offset = tl.load(pieces_ptr + piece * 4 + 3)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    is_channel = channels < num_channels
    tokens = tl.arange(0, TOKENS)[:, None]
    inside = (tokens < length) & is_channel
    acc = tl.zeros([TOKENS, CHANNELS], tl.float32)
    if BIAS:
        acc += tl.load(bias_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
    for j in tl.static_range(WIDTH):
        back = tokens - (WIDTH - 1) + j
        is_new = offset + back >= 0
        new = tl.load(x_ptr + (first + back) * x_stride + channels, mask=inside & is_new, other=0.0)
        old_place = (slot * num_channels + channels) * (WIDTH - 1) + (offset + back + WIDTH - 1)
        old = tl.load(tails_ptr + old_place, mask=inside & (offset + back < 0), other=0.0)
        weight = tl.load(weight_ptr + channels * WIDTH + j, mask=is_channel, other=0.0).to(tl.float32)
        acc += tl.where(is_new, new, old).to(tl.float32) * weight
    if SILU:
        acc = acc / (1.0 + tl.exp(-acc))
    tl.store(out_ptr + (first + tokens) * num_channels + channels, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def tail_kernel(x_ptr, tails_ptr, sequences_ptr, x_stride, num_channels, WIDTH: tl.constexpr, CHANNELS: tl.constexpr):
    """sequences [n, 4]: pieces that are whole sequences. A thread owns a channel, so it reads ahead of its writes."""
    sequence = tl.program_id(0).to(tl.int64)
    first = tl.load(sequences_ptr + sequence * 4).to(tl.int64)
    length = tl.load(sequences_ptr + sequence * 4 + 1)
    slot = tl.load(sequences_ptr + sequence * 4 + 2).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channels < num_channels
    tail = tails_ptr + (slot * num_channels + channels) * (WIDTH - 1)
    for k in tl.static_range(WIDTH - 1):
        place = tl.zeros_like(channels) + (length - (WIDTH - 1) + k)
        new = tl.load(x_ptr + (first + place) * x_stride + channels, mask=is_channel & (place >= 0), other=0.0)
        old = tl.load(tail + length + k, mask=is_channel & (place < 0), other=0.0)
        tl.store(tail + k, tl.where(place >= 0, new, old), mask=is_channel)


@triton.jit
def update_kernel(
    x_ptr, weight_ptr, bias_ptr, tails_ptr, slots_ptr, out_ptr, x_stride, num_channels,
    BIAS: tl.constexpr, SILU: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + sequence)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channels < num_channels
    tail = tails_ptr + (slot * num_channels + channels) * (WIDTH - 1)
    x = tl.load(x_ptr + sequence * x_stride + channels, mask=is_channel, other=0.0)
    last = tl.load(weight_ptr + channels * WIDTH + WIDTH - 1, mask=is_channel, other=0.0).to(tl.float32)
    acc = x.to(tl.float32) * last
    if BIAS:
        acc += tl.load(bias_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
    for j in tl.static_range(WIDTH - 1):
        old = tl.load(tail + j, mask=is_channel, other=0.0)
        acc += old.to(tl.float32) * tl.load(weight_ptr + channels * WIDTH + j, mask=is_channel, other=0.0).to(
            tl.float32
        )
        if j > 0:
            tl.store(tail + j - 1, old, mask=is_channel)
    tl.store(tail + WIDTH - 2, x, mask=is_channel)
    if SILU:
        acc = acc / (1.0 + tl.exp(-acc))
    tl.store(out_ptr + sequence * num_channels + channels, acc.to(x.dtype), mask=is_channel)


def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tails: torch.Tensor,
    batch: StateBatch,
    *,
    silu: bool,
) -> torch.Tensor:
    """See kernels.causal_conv.causal_conv."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    num_channels, width = weight.shape
    blocks = ceil_div(num_channels, CHANNELS)
    longest = max(batch.lengths)
    pieces = batch.table(("conv", TOKENS), lambda: list(batch.pieces(TOKENS)), x.device)
    sequences = batch.table(("conv", "all"), lambda: list(batch.pieces(longest)), x.device)
    conv_kernel[(len(pieces), blocks)](
        x, weight.contiguous(), out if bias is None else bias, tails, out, pieces, x.stride(0), num_channels,
        BIAS=bias is not None, SILU=silu, WIDTH=width, TOKENS=TOKENS, CHANNELS=CHANNELS, num_warps=4,
    )  # fmt: skip
    tail_kernel[(len(sequences), blocks)](
        x, tails, sequences, x.stride(0), num_channels, WIDTH=width, CHANNELS=CHANNELS, num_warps=1
    )
    return out


def causal_conv_update(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tails: torch.Tensor,
    slots: torch.Tensor,
    *,
    silu: bool,
) -> torch.Tensor:
    """See kernels.causal_conv.causal_conv_update."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        x = x if x.stride(1) == 1 else x.contiguous()
        num_channels, width = weight.shape
        update_kernel[(len(x), ceil_div(num_channels, CHANNELS))](
            x, weight.contiguous(), out if bias is None else bias, tails, slots.contiguous(), out, x.stride(0),
            num_channels, BIAS=bias is not None, SILU=silu, WIDTH=width, CHANNELS=CHANNELS, num_warps=1,
        )  # fmt: skip
    return out
