"""FusionTree in plain torch with its scan as a Python loop over tokens: what a server without a scan kernel does.

Batches of equal length, keys, values and states carried from call to call, so that decode is right and as cheap as this
way allows. The project's own `generate` is not compared: what it decodes is wrong. Knows nothing of the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

Past = list[dict[str, torch.Tensor]]
WIDTH, STATE = 4, 64


class LoopingFusionTree:
    """config: as the training has it, codes learnt in full and shared; tensors: its weights. loops_twice: as the
    training repository does, once for the outputs and once more for the last state."""

    def __init__(
        self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, loops_twice: bool = False
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.loops_twice = loops_twice

    @torch.inference_mode()
    def step(self, ids: torch.Tensor, past: Past | None) -> tuple[torch.Tensor, Past]:
        """ids [B, T] behind what `past` stands for -> (logits [B, vocab] of the last one, what stands for all)."""
        w = self.tensors
        past = past or [{} for _ in range(self.config["num_layers"])]
        first = past[0]["k"].shape[2] if past[0] else 0
        x = F.embedding(ids, w["embed_tokens.weight"])
        code = w["shared_srte.freqs"][:, first : first + ids.shape[1]]
        for i, own in enumerate(past):
            layer = f"layers.{i}"
            xn = self._norm(x, f"{layer}.ln_input")
            m = self._mamba(xn + code, f"{layer}.mamba", own)
            a = self._attention(xn, f"{layer}.attention", own, first)
            both = torch.cat([m, a], -1)
            aligned = self._linear(F.gelu(self._linear(both, f"{layer}.alignment.net.0")), f"{layer}.alignment.net.2")
            aligned = aligned + self._linear(both, f"{layer}.alignment.residual_proj")
            gate = self._linear(torch.tanh(self._linear(aligned, f"{layer}.gate.u")), f"{layer}.gate.d").sigmoid()
            mlp = self._linear(F.gelu(self._linear(aligned, f"{layer}.small_mlp.0")), f"{layer}.small_mlp.2")
            fused = self._linear(gate * m + (1 - gate) * a, f"{layer}.fusion_proj")
            x = self._norm(x + fused + mlp, f"{layer}.ln_output")
        return F.linear(self._norm(x[:, -1], "norm"), w["lm_head.weight"]), past

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], 1e-5)

    def _mamba(self, x: torch.Tensor, name: str, own: dict[str, torch.Tensor]) -> torch.Tensor:
        w = self.tensors
        u, z = self._linear(x, f"{name}.in_proj").chunk(2, -1)
        inner = u.shape[-1]
        tail = own.get("tail", u.new_zeros(len(u), WIDTH - 1, inner))
        joined = torch.cat([tail, u], 1)
        own["tail"] = joined[:, -(WIDTH - 1) :]
        taps = w[f"{name}.conv1d.weight"]
        u = F.silu(F.conv1d(joined.transpose(1, 2), taps, w[f"{name}.conv1d.bias"], groups=inner).transpose(1, 2))
        rank = w[f"{name}.dt_proj.weight"].shape[1]
        low, b, c = self._linear(u, f"{name}.x_proj").split([rank, STATE, STATE], -1)
        dt = F.softplus(self._linear(low, f"{name}.dt_proj") + w[f"{name}.dt_proj.bias"])
        h = own.get("ssm", u.new_zeros(len(u), inner, STATE))
        a = -torch.exp(w[f"{name}.A_log"])
        y, own["ssm"] = looped_scan(u, dt, a, b, c, w[f"{name}.D"], h)
        if self.loops_twice:
            own["ssm"] = looped_state(u, dt, a, b, h)
        return self._linear(y * F.silu(z), f"{name}.out_proj")

    def _attention(self, x: torch.Tensor, name: str, own: dict[str, torch.Tensor], first: int) -> torch.Tensor:
        heads, batch, length = self.config["num_heads"], x.shape[0], x.shape[1]
        q, k, v = (self._linear(x, f"{name}.{n}_proj").view(batch, length, heads, -1).transpose(1, 2) for n in "qkv")
        angles = torch.arange(first, first + length)[:, None] * self.tensors[f"{name}.rope.inv_freq"]
        cos, sin = (torch.cat([part, part], -1) for part in (angles.cos(), angles.sin()))
        q, k = (part * cos + _half_turned(part) * sin for part in (q, k))
        if "k" in own:
            k, v = torch.cat([own["k"], k], 2), torch.cat([own["v"], v], 2)
        own["k"], own["v"] = k, v
        distance = torch.arange(first, first + length)[:, None] - torch.arange(k.shape[2])
        local = heads - self.config["global_heads"]
        near = (distance >= 0) & (distance <= self.config["window_size"] // 2)
        parts = [F.scaled_dot_product_attention(q[:, :local], k[:, :local], v[:, :local], attn_mask=near)]
        parts.append(F.scaled_dot_product_attention(q[:, local:], k[:, local:], v[:, local:], attn_mask=distance >= 0))
        return self._linear(torch.cat(parts, 1).transpose(1, 2).reshape(x.shape), f"{name}.out_proj")


def looped_scan(
    x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, skip: torch.Tensor,
    h: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(y [B, T, D], last state [B, D, N]) of x, dt [B, T, D], b, c [B, T, N], a [D, N], skip [D], from `h` on."""
    rows = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        h = torch.exp(step * a) * h + step * b[:, t, None] * x[:, t, :, None]
        rows.append(torch.einsum("bdn,bn->bd", h, c[:, t]) + skip * x[:, t])
    return torch.stack(rows, 1), h


def looped_state(x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The last state alone, for which the training repository loops once more."""
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        h = torch.exp(step * a) * h + step * b[:, t, None] * x[:, t, :, None]
    return h


def _half_turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
