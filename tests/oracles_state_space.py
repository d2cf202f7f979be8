"""Slow, obvious float64 references for recurrent layers: one token after the other."""

from __future__ import annotations

import torch


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + (-x).exp())


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    a: torch.Tensor,
    skip: torch.Tensor,
    dt_bias: torch.Tensor | None,
    state: torch.Tensor,
    gate: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [T, D], last state [D, N]) of one sequence from `state` on."""
    h, rows = state.double().clone(), []
    for t in range(x.shape[0]):
        step = dt[t].double() if dt_bias is None else dt[t].double() + dt_bias.double()
        step = (1 + step.exp()).log()
        h = (step[:, None] * a.double()).exp() * h + (step * x[t].double())[:, None] * b[t].double()
        y = h @ c[t].double() + skip.double() * x[t].double()
        rows.append(y if gate is None else y * _silu(gate[t].double()))
    return torch.stack(rows), h


def causal_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tail: torch.Tensor, silu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [T, D], the last W - 1 inputs [D, W - 1]) of one sequence whose earlier inputs are `tail`."""
    width = weight.shape[1]
    history = [tail[:, k].double() for k in range(width - 1)] + [row.double() for row in x]
    rows = []
    for t in range(x.shape[0]):
        y = sum((weight[:, j].double() * history[t + j] for j in range(width)), torch.zeros(1, dtype=torch.float64))
        y = y if bias is None else y + bias.double()
        rows.append(_silu(y) if silu else y)
    return torch.stack(rows), torch.stack(history[len(history) - (width - 1) :], dim=1)
