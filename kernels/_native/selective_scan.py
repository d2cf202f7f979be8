"""The selective scan on the CPU, channels shared out among torch's threads. See kernels.selective_scan."""

from __future__ import annotations

import torch

from kernels._native.checks import is_like, misfit
from kernels._native.library import POINTER, SIZE, functions
from kernels._native.limits import MAX_STATE

_ROWS = (POINTER, SIZE)  # where they begin, how far they lie apart
_SCAN = functions(
    "selective_scan", *_ROWS, *_ROWS, POINTER, *_ROWS, *_ROWS, POINTER, POINTER, POINTER, *_ROWS, POINTER, POINTER,
    POINTER, SIZE, SIZE, SIZE, SIZE, SIZE, SIZE, returns=SIZE, takes_long=True,
)  # fmt: skip
SHARED_WORK = 1 << 19  # state numbers times tokens, from where on another thread is worth waking


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    a: torch.Tensor,
    skip: torch.Tensor,
    states: torch.Tensor,
    spans: torch.Tensor,
    dt_bias: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """x, dt and gate [T, D], b and c [T, N], of one dtype, their tokens any distance apart; skip and dt_bias [D], a
    [D, N], states [num_slots, D, N] in place, all float32; spans [S, 3] int64: first token, tokens, slot. Steps are
    softplus(dt + dt_bias). Returns y [T, D], times silu(gate) where there is one.

    Raises ValueError on other shapes and dtypes, and for tokens or a slot that are not there; nothing is written then.
    """
    tokens, channels = x.shape
    num_slots, width = states.shape[0], a.shape[-1]
    x, dt, b, c = (_with_whole_rows(part) for part in (x, dt, b, c))
    gate = None if gate is None else _with_whole_rows(gate)
    fits = is_like(a, torch.float32, channels, width) and width <= MAX_STATE
    fits = fits and is_like(skip, torch.float32, channels) and is_like(spans, torch.int64, len(spans), 3)
    fits = fits and (dt_bias is None or is_like(dt_bias, torch.float32, channels))
    fits = fits and is_like(states, torch.float32, num_slots, channels, width)
    fits = fits and all(part.dtype == x.dtype and part.shape == (tokens, width) for part in (b, c))
    wide = (dt,) if gate is None else (dt, gate)
    fits = fits and all(part.dtype == x.dtype and part.shape == x.shape for part in wide)
    if not fits or x.dtype not in _SCAN:
        raise misfit(
            "selective_scan", x=x, dt=dt, b=b, c=c, a=a, skip=skip, states=states, spans=spans, dt_bias=dt_bias,
            gate=gate,
        )  # fmt: skip
    y = torch.empty((tokens, channels), dtype=x.dtype)
    steps = torch.empty((tokens, channels), dtype=torch.float32)
    threads = torch.get_num_threads() if tokens * channels * width >= SHARED_WORK else 1
    bias = None if dt_bias is None else dt_bias.data_ptr()
    gates = (None, 0) if gate is None else (gate.data_ptr(), gate.stride(0))
    refused = _SCAN[x.dtype](
        x.data_ptr(), x.stride(0), dt.data_ptr(), dt.stride(0), bias, b.data_ptr(), b.stride(0), c.data_ptr(),
        c.stride(0), a.data_ptr(), skip.data_ptr(), states.data_ptr(), *gates, steps.data_ptr(), y.data_ptr(),
        spans.data_ptr(), len(spans), num_slots, tokens, channels, width, threads,
    )  # fmt: skip
    if refused >= 0:
        raise ValueError(
            f"selective_scan: spans hold {spans[refused].tolist()} (first token, tokens, slot), and there are {tokens} "
            f"tokens and {num_slots} slots"
        )
    return y


def _with_whole_rows(part: torch.Tensor) -> torch.Tensor:
    return part if part.stride(-1) == 1 else part.contiguous()
