"""What follows attention in a block: one gated MLP, or a mixture of experts of which each token takes a few.

    dense     down(silu(gate x) * up x)
    experts   sum over the token's top k of weight * expert(x), and with shared experts + shared(x) for every token

Knows tensors and sizes; which family routes how is said by `ExpertShape`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.activation import swiglu
from kernels.experts import combine_experts, group_by_expert, grouped_matmul, route, route_grouped
from kernels.linear import Weight, linear
from language_worker.models.matrices import Storage, finish, quantise

MATRICES = ("gate_up", "down")


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedRouting:
    """Router weights by a sigmoid each, experts chosen within the best groups with a learned bias; see
    `kernels.experts.route_grouped`."""

    num_groups: int
    groups_kept: int
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertShape:
    """Sizes of a mixture. A token's router weights are a softmax over all experts (or as `grouped` says), of which
    `top_k` are kept, and with `normalise` made to add up to 1.

    num_shared, shared_size: experts that every token takes; shared_gated: weighted by a sigmoid of their own.
    dense_layers: layers that have one gated MLP instead. is_stacked: the checkpoint holds all experts in one tensor.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    normalise: bool
    num_shared: int = 0
    shared_size: int = 0
    shared_gated: bool = False
    dense_layers: frozenset[int] = frozenset()
    is_stacked: bool = False
    grouped: GroupedRouting | None = None


class GatedMLP:
    """Weights [out, in]; gate_up stacks gate and up."""

    __slots__ = ("down", "gate_up")

    def __init__(self, hidden_size: int, inner: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.gate_up: Weight = torch.empty((2 * inner, hidden_size), dtype=dtype, device=device)
        self.down: Weight = torch.empty((hidden_size, inner), dtype=dtype, device=device)

    def quantise(self, method: Storage, device: torch.device) -> None:
        """Before it is filled; ValueError where the format cannot hold the matrices."""
        quantise(self, MATRICES, method, device)

    def finish(self) -> None:
        """It is filled."""
        finish(self, MATRICES)

    def parameters(self, prefix: str) -> dict[str, Weight]:
        """Tensors to fill, by name under `prefix`."""
        return {f"{prefix}.gate_up.weight": self.gate_up, f"{prefix}.down.weight": self.down}

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]."""
        return linear(swiglu(linear(normed, self.gate_up)), self.down)


class ExpertMLP:
    """Weights of all experts stacked: gate_up [E, 2 * inner, hidden], down [E, hidden, inner]; router [E, hidden]."""

    __slots__ = ("down", "gate_up", "router", "router_bias", "shape", "shared", "shared_gate")

    def __init__(self, hidden_size: int, shape: ExpertShape, *, dtype: torch.dtype, device: torch.device) -> None:
        def empty(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device)

        experts, inner = shape.num_experts, shape.intermediate_size
        self.shape = shape
        self.router = empty(experts, hidden_size)
        self.router_bias = None if shape.grouped is None else torch.empty(experts, device=device)  # float32 always
        self.gate_up = empty(experts, 2 * inner, hidden_size)
        self.down = empty(experts, hidden_size, inner)
        self.shared = [
            GatedMLP(hidden_size, shape.shared_size, dtype=dtype, device=device) for _ in range(shape.num_shared)
        ]
        self.shared_gate = empty(1, hidden_size) if shape.shared_gated else None

    def quantise(self, method: Storage, device: torch.device) -> None:
        """Before it is filled, with full precision whatever the checkpoint stores; ValueError for other formats."""
        if method != "stored":
            count = self.shape.num_experts
            raise ValueError(f"a mixture of {count} experts is not stored in another format than its own")
        quantise(self, (), method, device)
        for shared in self.shared:
            shared.quantise(method, device)

    def finish(self) -> None:
        """It is filled."""
        for shared in self.shared:
            shared.finish()

    def parameters(self, prefix: str) -> dict[str, Weight]:
        """Tensors to fill, by name under `prefix`; those of each expert by themselves, unless they come stacked."""
        named: dict[str, Weight] = {f"{prefix}.router.weight": self.router}
        if self.router_bias is not None:
            named[f"{prefix}.router.bias"] = self.router_bias
        if self.shape.is_stacked:
            named |= {f"{prefix}.experts.gate_up.weight": self.gate_up, f"{prefix}.experts.down.weight": self.down}
        else:
            for i in range(self.shape.num_experts):
                named[f"{prefix}.experts.{i}.gate_up.weight"] = self.gate_up[i]
                named[f"{prefix}.experts.{i}.down.weight"] = self.down[i]
        for i, shared in enumerate(self.shared):
            named |= shared.parameters(f"{prefix}.shared.{i}")
        if self.shared_gate is not None:
            named[f"{prefix}.shared_gate.weight"] = self.shared_gate
        return named

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, hidden]."""
        shape = self.shape
        weights, experts = self._route(normed)
        groups = group_by_expert(experts, shape.num_experts)
        inner = swiglu(grouped_matmul(normed, self.gate_up, groups.offsets, groups.tokens))
        mixed = combine_experts(grouped_matmul(inner, self.down, groups.offsets), groups.places, weights)
        for shared in self.shared:
            added = shared.forward(normed)
            if self.shared_gate is not None:
                added = added * torch.sigmoid(linear(normed, self.shared_gate))
            mixed = mixed + added
        return mixed

    def _route(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights [T, k] float32, experts [T, k] int64)."""
        shape, grouped = self.shape, self.shape.grouped
        if grouped is None or self.router_bias is None:
            return route(linear(normed, self.router), shape.top_k, normalise=shape.normalise)
        return route_grouped(
            linear(normed.float(), self.router.float()),
            self.router_bias,
            shape.top_k,
            normalise=shape.normalise,
            num_groups=grouped.num_groups,
            groups_kept=grouped.groups_kept,
            scale=grouped.scale,
        )
