"""MambaMixer: one branch of selective state space, as Mamba-1 has it, over packed sequences with carried state.

    u, z    = in_proj(x)
    u       = silu(causal convolution of u)           its last inputs are carried: "conv_tail" [inner, width - 1]
    d, b, c = x_proj(u)
    h       = exp(dt a) h + dt u b                    carried: "ssm" [inner, state], float32; dt = softplus(dt_proj(d))
    y       = out_proj((<h, c> + skip u) silu(z))

A sequence with one token of a step takes the ops of a single step, all such together; longer ones are scanned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.causal_conv import causal_conv, causal_conv_update
from kernels.linear import linear
from kernels.selective_scan import ScanWeights, selective_scan, selective_update
from language_worker.models.affine import Affine
from language_worker.models.base import StateSpec, StateStep, StateTensor


@dataclass(frozen=True, kw_only=True, slots=True)
class MambaShape:
    """hidden_size: of what comes in and goes out; inner_size: channels of the scan, each with a state of state_size;
    dt_rank: of the projection of step sizes; width: inputs that the convolution sees."""

    hidden_size: int
    inner_size: int
    state_size: int
    dt_rank: int
    width: int

    def state(self, num_layers: int) -> StateSpec:
        """What a sequence keeps, in the order in which `MambaMixer` takes it."""
        tail = StateTensor(name="conv_tail", shape=(self.inner_size, self.width - 1))
        ssm = StateTensor(name="ssm", shape=(self.inner_size, self.state_size), dtype=torch.float32)
        return StateSpec(num_layers=num_layers, tensors=(tail, ssm))


class MambaMixer:
    """See the module. a: [inner, state], negative; dt_bias: what is added to dt_proj's output before softplus. Both are
    kept in float32, as the state is."""

    __slots__ = ("conv", "conv_bias", "dt_proj", "in_proj", "out_proj", "shape", "weights", "x_proj")

    def __init__(self, shape: MambaShape, *, dtype: torch.dtype, device: torch.device) -> None:
        def exact(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.float32, device=device)

        inner, size = shape.inner_size, shape.state_size
        self.shape = shape
        self.in_proj = Affine(2 * inner, shape.hidden_size, dtype=dtype, device=device)
        self.conv = torch.empty((inner, shape.width), dtype=dtype, device=device)
        self.conv_bias = torch.empty(inner, dtype=dtype, device=device)
        self.x_proj = Affine(shape.dt_rank + 2 * size, inner, has_bias=False, dtype=dtype, device=device)
        self.dt_proj = torch.empty((inner, shape.dt_rank), dtype=dtype, device=device)
        skip = torch.empty(inner, dtype=dtype, device=device)
        self.weights = ScanWeights(a=exact(inner, size), skip=skip, dt_bias=exact(inner))
        self.out_proj = Affine(shape.hidden_size, inner, dtype=dtype, device=device)

    def parameters(self, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors to fill, by name under `prefix`."""
        assert self.weights.dt_bias is not None
        return {
            **self.in_proj.parameters(f"{prefix}.in_proj"),
            f"{prefix}.conv.weight": self.conv,
            f"{prefix}.conv.bias": self.conv_bias,
            **self.x_proj.parameters(f"{prefix}.x_proj"),
            f"{prefix}.dt_proj.weight": self.dt_proj,
            f"{prefix}.dt_proj.bias": self.weights.dt_bias,
            f"{prefix}.a": self.weights.a,
            f"{prefix}.skip": self.weights.skip,
            **self.out_proj.parameters(f"{prefix}.out_proj"),
        }

    def forward(self, x: torch.Tensor, state: tuple[torch.Tensor, ...], step: StateStep) -> torch.Tensor:
        """x [T, hidden] -> [T, hidden]; the state of every sequence of the step goes forward in place."""
        tails, ssm = state
        u, z = self.in_proj(x).chunk(2, dim=1)
        u = self._convolved(u, tails, step)
        size = self.shape.state_size
        low, b, c = torch.split(self.x_proj(u), [self.shape.dt_rank, size, size], dim=1)
        dt = linear(low.contiguous(), self.dt_proj)
        return self.out_proj(self._scanned((u, dt, b, c), z, ssm, step))

    def _convolved(self, u: torch.Tensor, tails: torch.Tensor, step: StateStep) -> torch.Tensor:
        num_single = step.single.shape[0]
        parts = []
        if num_single:
            parts.append(causal_conv_update(u[:num_single], self.conv, self.conv_bias, tails, step.single))
        if num_single < u.shape[0]:
            parts.append(causal_conv(u[num_single:], self.conv, self.conv_bias, tails, step.batch))
        return _joined(parts)

    def _scanned(
        self, inputs: tuple[torch.Tensor, ...], gate: torch.Tensor, states: torch.Tensor, step: StateStep
    ) -> torch.Tensor:
        num_single = step.single.shape[0]
        parts = []
        if num_single:
            u, dt, b, c = (part[:num_single] for part in inputs)
            parts.append(selective_update(u, dt, b, c, self.weights, states, step.single, gate[:num_single]))
        if num_single < gate.shape[0]:
            u, dt, b, c = (part[num_single:] for part in inputs)
            parts.append(selective_scan(u, dt, b, c, self.weights, states, step.batch, gate[num_single:]))
        return _joined(parts)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
