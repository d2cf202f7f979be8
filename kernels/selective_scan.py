"""The selective state space recurrence of Mamba, for packed sequences and for single steps, state kept in float32.

    dt = softplus(dt + dt_bias)       h = exp(dt a) h + dt x b       y = <h, c> + skip x       (then y silu(gate))

per channel d (of D) with a state of N numbers; b and c are shared by all channels. Splitting a sequence between calls
changes nothing: the state at its slot is read first and written last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels._native.limits import MAX_STATE
from kernels.dispatch import ANY_SIZE, native, twin
from kernels.state_batch import StateBatch

CHUNK_ELEMENTS = 1 << 20  # decays held at one time on the torch path


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScanWeights:
    """a: [D, N] float32, negative (`-exp(A_log)`); skip: [D]; dt_bias: [D] or None."""

    a: torch.Tensor
    skip: torch.Tensor
    dt_bias: torch.Tensor | None = None


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    weights: ScanWeights,
    states: torch.Tensor,
    batch: StateBatch,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every sequence of the batch from its state on: returns y [T, D] like x and leaves the last state at its slot.

    x, dt, gate: [T, D]; b, c: [T, N]; one floating dtype. states: [num_slots, D, N] float32 contiguous, in place; a
    new sequence needs zeros there. Other slots are not touched. Raises ValueError when shapes do not fit.
    """
    _check("selective_scan", x, dt, b, c, weights, states, gate)
    batch.check("selective_scan", x.shape[0], states.shape[0])
    triton = twin("selective_scan", x)
    if triton is not None:
        return triton.selective_scan(x, dt, b, c, weights, states, batch, gate)  # type: ignore[no-any-return]
    quick = _quick(x, weights)
    if quick is not None:
        rows = [(tokens.start, tokens.stop - tokens.start, slot) for tokens, slot in batch.spans()]
        spans = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
        return quick(x, dt, b, c, weights.a, weights.skip.float(), states, spans, _exact(weights.dt_bias), gate)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    step = max(1, CHUNK_ELEMENTS // max(1, weights.a.numel()))
    for tokens, slot in batch.spans():
        for start in range(tokens.start, tokens.stop, step):
            span = slice(start, min(start + step, tokens.stop))
            y[span] = _scan_chunk(x[span], dt[span], b[span], c[span], weights, states[slot])
    return y if gate is None else y.mul_(F.silu(gate))


def selective_update(
    x: torch.Tensor,
    dt: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    weights: ScanWeights,
    states: torch.Tensor,
    slots: torch.Tensor,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """One step of S sequences: as `selective_scan` with x, dt, gate [S, D] and b, c [S, N]; slots: [S] int64, distinct,
    on x's device. Fixed launches for fixed shapes."""
    _check("selective_update", x, dt, b, c, weights, states, gate)
    if slots.shape != x.shape[:1]:
        raise ValueError(f"selective_update: {x.shape[0]} sequences, {slots.shape[0]} slots")
    triton = twin("selective_scan", x)
    if triton is not None:
        return triton.selective_update(x, dt, b, c, weights, states, slots, gate)  # type: ignore[no-any-return]
    quick = _quick(x, weights)
    if quick is not None:
        spans = torch.stack((torch.arange(len(slots)), torch.ones_like(slots), slots), dim=1)
        return quick(x, dt, b, c, weights.a, weights.skip.float(), states, spans, _exact(weights.dt_bias), gate)
    wide, steps = x.float(), _steps(dt, weights)
    h = states.index_select(0, slots)
    h.mul_((steps[:, :, None] * weights.a).exp_()).addcmul_((steps * wide)[:, :, None], b.float()[:, None])
    states.index_copy_(0, slots, h)
    y = torch.bmm(h, c.float()[:, :, None])[:, :, 0].addcmul_(wide, weights.skip.float()).to(x.dtype)
    return y if gate is None else y.mul_(F.silu(gate))


def _quick(x: torch.Tensor, weights: ScanWeights) -> Callable[..., torch.Tensor] | None:
    """The C twin, which is the quicker one at every size."""
    module = native("selective_scan", x, ANY_SIZE) if weights.a.shape[1] <= MAX_STATE else None
    return None if module is None else module.selective_scan


def _scan_chunk(
    x: torch.Tensor, dt: torch.Tensor, b: torch.Tensor, c: torch.Tensor, weights: ScanWeights, state: torch.Tensor
) -> torch.Tensor:
    """y [L, D] float32 of some tokens; `state` [D, N] goes forward in place."""
    wide, steps = x.float(), _steps(dt, weights)
    decay = torch.exp(steps[:, :, None] * weights.a)
    h = (steps * wide)[:, :, None] * b.float()[:, None]
    before = state
    for now, shrink in zip(h, decay, strict=True):
        before = now.addcmul_(before, shrink)
    state.copy_(before)
    y = torch.bmm(h, c.float()[:, :, None])[:, :, 0]
    return y.addcmul_(wide, weights.skip.float())


def _exact(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float()


def _steps(dt: torch.Tensor, weights: ScanWeights) -> torch.Tensor:
    bias = _exact(weights.dt_bias)
    return F.softplus(dt.float() if bias is None else dt.float() + bias)


def _check(
    op: str,
    x: torch.Tensor,
    dt: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    weights: ScanWeights,
    states: torch.Tensor,
    gate: torch.Tensor | None,
) -> None:
    channels, size = weights.a.shape
    tokens = x.shape[0]
    fits = x.shape == dt.shape == (tokens, channels) and b.shape == c.shape == (tokens, size)
    fits = fits and states.shape[1:] == weights.a.shape and weights.skip.shape == (channels,)
    if not fits or (gate is not None and gate.shape != x.shape):
        raise ValueError(
            f"{op}: x {tuple(x.shape)}, dt {tuple(dt.shape)}, b {tuple(b.shape)}, c {tuple(c.shape)}, "
            f"a {tuple(weights.a.shape)} and states {tuple(states.shape)} do not fit"
        )
    if states.dtype != torch.float32 or not states.is_contiguous():
        raise ValueError(f"{op}: states must be contiguous float32, got {states.dtype}, strides {states.stride()}")
