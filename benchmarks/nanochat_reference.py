"""nanochat of generation 4 in plain torch, as the project's own engine computes it: batches of equal length, keys and
values carried from call to call.

Knows nothing of Tandem's engine; `tests/tiny_nanochat.py` has the same by definition, in float64 and all at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

Past = dict[str, Any]
BASE, SCALE, CAP, NUM_GATED, NUM_SMEARED = 100_000.0, 1.2, 15.0, 12, 24


class PlainNanochat:
    """config: `model_config` of the meta file; tensors: the weights under their names."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self.config = config
        self.weights = {name: tensor.float() for name, tensor in tensors.items()}

    @classmethod
    def read(cls, folder: Path) -> PlainNanochat:
        (meta,), (weights,) = folder.glob("meta_*.json"), folder.glob("model_*.pt")
        config = json.loads(meta.read_text(encoding="utf-8"))["model_config"]
        return cls(config, torch.load(weights, weights_only=True))

    @torch.inference_mode()
    def step(self, ids: torch.Tensor, past: Past | None) -> tuple[torch.Tensor, Past]:
        """ids [B, T] behind what `past` stands for -> (logits [B, vocab] of the last one, what stands for all)."""
        w, layers = self.weights, self.config["n_layer"]
        past = past or {"length": 0, "last": None, "layers": [{} for _ in range(layers)]}
        x = _norm(F.embedding(ids, w["transformer.wte.weight"]))
        before = x[:, :-1] if past["last"] is None else torch.cat([past["last"], x[:, :-1]], 1)
        past["last"] = x[:, -1:]
        gated = x[:, x.shape[1] - before.shape[1] :]
        share = w["smear_lambda"] * torch.sigmoid(F.linear(gated[..., :NUM_SMEARED], w["smear_gate.weight"]))
        x = torch.cat([x[:, : x.shape[1] - before.shape[1]], gated + share * before], 1)
        first, middle = x, x
        for i, own in enumerate(past["layers"]):
            x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * first
            x = x + self._attention(_norm(x), ids, i, own, past["length"])
            inner = F.linear(_norm(x), w[f"transformer.h.{i}.mlp.c_fc.weight"])
            x = x + F.linear(F.relu(inner).square(), w[f"transformer.h.{i}.mlp.c_proj.weight"])
            middle = x if i == layers // 2 else middle
        past["length"] += ids.shape[1]
        logits = F.linear(_norm((x - w["backout_lambda"] * middle)[:, -1]), w["lm_head.weight"])
        return CAP * torch.tanh(logits / CAP), past

    def _attention(self, h: torch.Tensor, ids: torch.Tensor, layer: int, own: dict, first: int) -> torch.Tensor:
        w, name = self.weights, f"transformer.h.{layer}.attn"
        batch, length, width = h.shape
        head = width // self.config["n_head"]
        q, k, v = (F.linear(h, w[f"{name}.c_{part}.weight"]).view(batch, length, -1, head) for part in "qkv")
        if f"value_embeds.{layer}.weight" in w:
            gate = 3.0 * torch.sigmoid(F.linear(h[..., :NUM_GATED], w[f"{name}.ve_gate.weight"]))
            v = v + gate[..., None] * F.embedding(ids, w[f"value_embeds.{layer}.weight"]).view(v.shape)
        q, k = (SCALE * _norm(_turned(part, first)) for part in (q, k))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if own:
            k, v = torch.cat([own["k"], k], 2), torch.cat([own["v"], v], 2)
        own["k"], own["v"] = k, v
        mask = self._mask(layer, first, length)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return F.linear(mixed.transpose(1, 2).reshape(h.shape), w[f"{name}.c_proj.weight"])

    def _mask(self, layer: int, first: int, length: int) -> torch.Tensor:
        whole, pattern = self.config["sequence_len"], self.config.get("window_pattern") or "L"
        is_long = layer == self.config["n_layer"] - 1 or pattern[layer % len(pattern)] == "L"
        window = whole if is_long else -(-whole // 4 // 128) * 128
        distance = torch.arange(first, first + length)[:, None] - torch.arange(first + length)
        return (distance >= 0) & (distance <= window)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:])


def _turned(x: torch.Tensor, first: int) -> torch.Tensor:
    """x [B, T, heads, D] turned by minus the angle of each position."""
    half = x.shape[-1] // 2
    angles = torch.arange(first, first + x.shape[1])[:, None] / BASE ** (torch.arange(half) / half)
    cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
    return torch.cat([x[..., :half] * cos + x[..., half:] * sin, x[..., half:] * cos - x[..., :half] * sin], -1)
