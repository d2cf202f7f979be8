"""The selective scan: a program walks the tokens of one piece of a sequence with its channels' states in registers.

Few long sequences leave a device idle, so they are cut into pieces: one kernel finds what each piece adds to a state
of zeros and by how much it shrinks any other, a second carries states over the pieces, a third walks again from the
right state and writes the outputs. Otherwise a piece is a whole sequence and only the third runs.

    pieces [n, 4] int32: first token · tokens · slot · offset of the first token in its sequence
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels._triton.launch import ceil_div, next_power_of_2
from kernels.selective_scan import ScanWeights
from kernels.state_batch import StateBatch

PIECE = 256
CHANNELS = 16  # of one program; times the state size: its registers
WARPS = 4


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to 3e-6; of small powers by the first terms of the series: 1 + power would lose their digits."""
    power = tl.exp(-tl.abs(x))
    series = power * (1.0 - power * (0.5 - power * 0.33333333))
    return tl.maximum(x, 0.0) + tl.where(power < 0.02, series, tl.log(1.0 + power))


@triton.jit
def scan_kernel(
    x_ptr, dt_ptr, b_ptr, c_ptr, gate_ptr, a_ptr, skip_ptr, bias_ptr, out_ptr, states_ptr, carry_ptr, sums_ptr,
    pieces_ptr, slots_ptr, x_stride, dt_stride, b_stride, c_stride, gate_stride, num_channels, size,
    SINGLE: tl.constexpr, FINAL: tl.constexpr, CARRIED: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    places = tl.arange(0, SIZE)
    is_channel = channels < num_channels
    is_place = places < size
    inside = is_channel[:, None] & is_place[None, :]
    within = channels[:, None] * size + places[None, :]
    if SINGLE:
        first = piece
        length = 1
        slot = tl.load(slots_ptr + piece)
    else:
        first = tl.load(pieces_ptr + piece * 4).to(tl.int64)
        length = tl.load(pieces_ptr + piece * 4 + 1)
        slot = tl.load(pieces_ptr + piece * 4 + 2).to(tl.int64)
    state_place = states_ptr + slot * num_channels * size + within
    carry_place = carry_ptr + piece * num_channels * size + within
    a = tl.load(a_ptr + within, mask=inside, other=0.0)
    skip = tl.load(skip_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + channels, mask=is_channel, other=0.0).to(tl.float32)
    if FINAL:
        h = tl.zeros([CHANNELS, SIZE], tl.float32)
    elif CARRIED:
        h = tl.load(carry_place, mask=inside, other=0.0)
    else:
        h = tl.load(state_place, mask=inside, other=0.0)
    total = tl.zeros([CHANNELS], tl.float32)
    for i in range(length):
        token = first + i
        x = tl.load(x_ptr + token * x_stride + channels, mask=is_channel, other=0.0)
        wide = x.to(tl.float32)
        dt = tl.load(dt_ptr + token * dt_stride + channels, mask=is_channel, other=0.0).to(tl.float32)
        if BIAS:
            dt += bias
        dt = _softplus(dt)
        b = tl.load(b_ptr + token * b_stride + places, mask=is_place, other=0.0).to(tl.float32)
        h = h * tl.exp(dt[:, None] * a) + (dt * wide)[:, None] * b[None, :]
        if FINAL:
            total += dt
        else:
            c = tl.load(c_ptr + token * c_stride + places, mask=is_place, other=0.0).to(tl.float32)
            y = tl.sum(h * c[None, :], axis=1) + skip * wide
            if GATE:
                gate = tl.load(gate_ptr + token * gate_stride + channels, mask=is_channel, other=0.0).to(tl.float32)
                y = y * gate / (1.0 + tl.exp(-gate))
            tl.store(out_ptr + token * num_channels + channels, y.to(x.dtype), mask=is_channel)
    if FINAL:
        tl.store(carry_place, h, mask=inside)
        tl.store(sums_ptr + piece * num_channels + channels, total, mask=is_channel)
    elif CARRIED:  # another piece of the sequence may not have begun: `carry_kernel` wrote the last state
        pass
    else:
        tl.store(state_place, h, mask=inside)


@triton.jit
def carry_kernel(
    a_ptr, states_ptr, carry_ptr, sums_ptr, sequences_ptr, num_channels, size,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """sequences [n, 3] int32: first piece · pieces · slot. What each piece adds becomes the state before it."""
    sequence = tl.program_id(0)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    places = tl.arange(0, SIZE)
    is_channel = channels < num_channels
    inside = is_channel[:, None] & (places < size)[None, :]
    within = channels[:, None] * size + places[None, :]
    first = tl.load(sequences_ptr + sequence * 3).to(tl.int64)
    count = tl.load(sequences_ptr + sequence * 3 + 1)
    slot = tl.load(sequences_ptr + sequence * 3 + 2).to(tl.int64)
    a = tl.load(a_ptr + within, mask=inside, other=0.0)
    state_place = states_ptr + slot * num_channels * size + within
    h = tl.load(state_place, mask=inside, other=0.0)
    for i in range(count):
        carry_place = carry_ptr + (first + i) * num_channels * size + within
        added = tl.load(carry_place, mask=inside, other=0.0)
        total = tl.load(sums_ptr + (first + i) * num_channels + channels, mask=is_channel, other=0.0)
        tl.store(carry_place, h, mask=inside)
        h = h * tl.exp(total[:, None] * a) + added
    tl.store(state_place, h, mask=inside)


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    weights: ScanWeights,
    states: torch.Tensor,
    batch: StateBatch,
    gate: torch.Tensor | None,
) -> torch.Tensor:
    """See kernels.selective_scan.selective_scan."""
    num_tokens, num_channels = x.shape
    size = weights.a.shape[1]
    out = torch.empty(num_tokens, num_channels, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    blocks = ceil_div(num_channels, CHANNELS)
    length = piece_length(batch, blocks, x.device)
    pieces = batch.table(("scan", length), lambda: list(batch.pieces(length)), x.device)
    if len(pieces) == len(batch.lengths):
        _scan(x, dt, b, c, weights, states, out, gate, pieces=pieces)
        return out
    carry = torch.empty(len(pieces), num_channels, size, dtype=torch.float32, device=x.device)
    sums = torch.empty(len(pieces), num_channels, dtype=torch.float32, device=x.device)
    sequences = batch.table(("carry", length), lambda: _sequences(batch, length), x.device)
    _scan(x, dt, b, c, weights, states, out, gate, pieces=pieces, carry=carry, sums=sums)
    carry_kernel[(len(sequences), blocks)](
        weights.a.contiguous(), states, carry, sums, sequences, num_channels, size, CHANNELS=CHANNELS,
        SIZE=next_power_of_2(size), num_warps=WARPS,
    )  # fmt: skip
    _scan(x, dt, b, c, weights, states, out, gate, pieces=pieces, carry=carry)
    return out


def selective_update(
    x: torch.Tensor,
    dt: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    weights: ScanWeights,
    states: torch.Tensor,
    slots: torch.Tensor,
    gate: torch.Tensor | None,
) -> torch.Tensor:
    """See kernels.selective_scan.selective_update."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        _scan(x, dt, b, c, weights, states, out, gate, slots=slots.contiguous())
    return out


def piece_length(batch: StateBatch, blocks: int, device: torch.device) -> int:
    """PIECE where whole sequences would leave most of the device idle, else the longest sequence."""
    longest = max(batch.lengths)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return PIECE if longest > PIECE and len(batch.lengths) * blocks < 8 * processors else longest


def _sequences(batch: StateBatch, length: int) -> list[tuple[int, ...]]:
    rows: list[tuple[int, ...]] = []
    first = 0
    for tokens, slot in zip(batch.lengths, batch.slots, strict=True):
        count = ceil_div(tokens, length)
        rows.append((first, count, slot))
        first += count
    return rows


def _scan(x, dt, b, c, weights, states, out, gate, *, pieces=None, slots=None, carry=None, sums=None):
    """One launch: with `sums` what pieces add, with `carry` alone outputs from carried states, else the whole."""
    num_channels, size = weights.a.shape
    x, dt, b, c, rows = (t if t.stride(1) == 1 else t.contiguous() for t in (x, dt, b, c, x if gate is None else gate))
    table = slots if pieces is None else pieces
    scan_kernel[(len(table), ceil_div(num_channels, CHANNELS))](
        x, dt, b, c, rows, weights.a.contiguous(), weights.skip, weights.skip if weights.dt_bias is None
        else weights.dt_bias, out, states, states if carry is None else carry, states if sums is None else sums,
        table, table, x.stride(0), dt.stride(0), b.stride(0), c.stride(0), rows.stride(0), num_channels, size,
        SINGLE=pieces is None, FINAL=sums is not None, CARRIED=carry is not None, GATE=gate is not None,
        BIAS=weights.dt_bias is not None, CHANNELS=CHANNELS, SIZE=next_power_of_2(size), num_warps=WARPS,
    )  # fmt: skip
