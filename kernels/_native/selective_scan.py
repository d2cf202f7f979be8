"""The selective scan on the CPU, channels shared out among torch's threads. See kernels.selective_scan."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels._native.checks import is_like, misfit
from kernels._native.library import POINTER, SIZE, functions
from kernels._native.limits import MAX_STATE

_SCAN = functions(
    "selective_scan", POINTER, SIZE, POINTER, POINTER, SIZE, POINTER, SIZE, POINTER, POINTER, POINTER, POINTER, POINTER,
    SIZE, SIZE, SIZE, SIZE, SIZE, SIZE, returns=SIZE, takes_long=True,
)  # fmt: skip
SHARED_WORK = 1 << 19  # state numbers times tokens, from where on another thread is worth waking


def selective_scan(
    x: torch.Tensor,
    steps: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    a: torch.Tensor,
    skip: torch.Tensor,
    states: torch.Tensor,
    spans: torch.Tensor,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, D], b and c [T, N], of one dtype, their tokens any distance apart; steps [T, D], skip [D], a [D, N], states
    [num_slots, D, N] in place, all float32; spans [S, 3] int64: first token, tokens, slot. Returns y [T, D], times
    silu(gate) where there is one.

    Raises ValueError on other shapes and dtypes, and for tokens or a slot that are not there; nothing is written then.
    """
    tokens, channels = x.shape
    num_slots, width = states.shape[0], a.shape[-1]
    x, b, c = (part if part.stride(1) == 1 else part.contiguous() for part in (x, b, c))
    fits = is_like(steps, torch.float32, tokens, channels) and is_like(a, torch.float32, channels, width)
    fits = fits and is_like(skip, torch.float32, channels) and is_like(spans, torch.int64, len(spans), 3)
    fits = fits and is_like(states, torch.float32, num_slots, channels, width) and width <= MAX_STATE
    fits = fits and all(part.dtype == x.dtype and part.shape == (tokens, width) for part in (b, c))
    if not fits or x.dtype not in _SCAN:
        raise misfit("selective_scan", x=x, steps=steps, b=b, c=c, a=a, skip=skip, states=states, spans=spans)
    y = torch.empty((tokens, channels), dtype=x.dtype)
    threads = torch.get_num_threads() if tokens * channels * width >= SHARED_WORK else 1
    refused = _SCAN[x.dtype](
        x.data_ptr(), x.stride(0), steps.data_ptr(), b.data_ptr(), b.stride(0), c.data_ptr(), c.stride(0), a.data_ptr(),
        skip.data_ptr(), states.data_ptr(), y.data_ptr(), spans.data_ptr(), len(spans), num_slots, tokens, channels,
        width, threads,
    )  # fmt: skip
    if refused >= 0:
        raise ValueError(
            f"selective_scan: spans hold {spans[refused].tolist()} (first token, tokens, slot), and there are {tokens} "
            f"tokens and {num_slots} slots"
        )
    return y if gate is None else y.mul_(F.silu(gate))
