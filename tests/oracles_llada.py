"""LLaDA slow and obvious: the published forward in float64, and its generate loops with and without cached keys.

Written from the published description, one sequence at a time, sharing nothing with the engine. The loops take plain
numbers and return every token of the canvas and what was forwarded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

Cache = list[tuple[Tensor, Tensor]]
Choose = Callable[[Tensor, Tensor, int], Tensor]  # (confidence, entropy, step) of the open positions -> bool


class LladaOracle:
    """Reads a checkpoint with LLaDA's own tensor names."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float64) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.dtype = dtype
        with safe_open(folder / "model.safetensors", "pt") as file:
            self.weights = {name: file.get_tensor(name).to(dtype) for name in file.keys()}  # noqa: SIM118

    def __call__(self, tokens: Tensor, start: int = 0, cache: Cache | None = None) -> Tensor:
        """Logits [T, V] of tokens [T] at positions start, start + 1, ...; with a cache (keys and values of every
        position, per layer) theirs replace what it has there, and all of it is seen."""
        config, count = self.config, tokens.shape[0]
        heads = config["n_heads"]
        head = config["d_model"] // heads
        frequencies = config["rope_theta"] ** (-torch.arange(0, head, 2, dtype=self.dtype) / head)
        angles = torch.arange(start, start + count, dtype=self.dtype)[:, None] * frequencies
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
        x = self._weight("wte")[tokens]
        for i in range(config["n_layers"]):
            normed = self._norm(x, f"blocks.{i}.attn_norm")
            q, k, v = (
                (normed @ self._weight(f"blocks.{i}.{name}").T).view(count, -1, head).transpose(0, 1)
                for name in ("q_proj", "k_proj", "v_proj")
            )
            q, k = (y * cos + torch.cat([-y[..., head // 2 :], y[..., : head // 2]], -1) * sin for y in (q, k))
            if cache is not None:
                cache[i][0][:, start : start + count], cache[i][1][:, start : start + count] = k, v
                k, v = cache[i]
            k, v = (y.repeat_interleave(heads // y.shape[0], 0) for y in (k, v))
            weights = (q @ k.transpose(1, 2) / math.sqrt(head)).softmax(-1)
            x = x + (weights @ v).transpose(0, 1).reshape(count, -1) @ self._weight(f"blocks.{i}.attn_out").T
            normed = self._norm(x, f"blocks.{i}.ff_norm")
            gate, up = (normed @ self._weight(f"blocks.{i}.{name}").T for name in ("ff_proj", "up_proj"))
            x = x + (torch.nn.functional.silu(gate) * up) @ self._weight(f"blocks.{i}.ff_out").T
        head_name = "wte" if config["weight_tying"] else "ff_out"
        return self._norm(x, "ln_f") @ self._weight(head_name).T

    def new_cache(self, length: int) -> Cache:
        config = self.config
        shape = (config.get("n_kv_heads") or config["n_heads"], length, config["d_model"] // config["n_heads"])
        return [
            (torch.zeros(shape, dtype=self.dtype), torch.zeros(shape, dtype=self.dtype))
            for _ in range(config["n_layers"])
        ]

    def _weight(self, name: str) -> Tensor:
        return self.weights[f"model.transformer.{name}.weight"]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return x * scale * self._weight(name)


@dataclass
class Generated:
    """tokens: the whole answer. forwards: query positions of each forward."""

    tokens: list[int]
    forwards: list[int] = field(default_factory=list)


def static_counts(num_masks: int, steps: int) -> list[int]:
    """How many masks each step replaces, as published."""
    base, rest = num_masks // steps, num_masks % steps
    return [base + 1 if step < rest else base for step in range(steps)]


def generate(
    oracle: LladaOracle,
    prompt: Sequence[int],
    length: int,
    *,
    block_length: int,
    choose: Callable[[int], Choose],
    never: Sequence[int] = (),
    suppress: Sequence[int] = (),
    defer: Sequence[int] = (),
    cfg_scale: float = 0.0,
    kv_policy: str = "none",
    refresh_interval: int = 0,
    vicinity: int = 0,
    sees_future: bool = True,
) -> Generated:
    """The published loop at temperature 0, one block after the other until it has no masks.

    never: ids that are not chosen, the mask among them (its own id comes first). choose(masks in the block): its rule.
    """
    mask_id = never[0]
    canvas = torch.tensor([*prompt, *[mask_id] * length])
    caches = [oracle.new_cache(len(canvas)) for _ in range(2)]
    out = Generated([])
    for start in range(len(prompt), len(canvas), block_length):
        end = min(start + block_length, len(canvas))
        seen = len(canvas) if sees_future else end
        rule, step = choose(end - start), 0
        while bool((canvas[start:end] == mask_id).any()):
            refresh = step == 0 or kv_policy == "none" or (refresh_interval and step % refresh_interval == 0)
            low, high = (0, seen) if refresh else (start, seen)
            if kv_policy == "dual" and not refresh:
                low, high = max(0, start - vicinity), min(seen, end + vicinity)

            def forward(tokens: Tensor, cache: Cache, low: int = low, high: int = high, seen: int = seen) -> Tensor:
                view = [(k[:, :seen], v[:, :seen]) for k, v in cache]
                return oracle(tokens[low:high], low, view)

            logits = forward(canvas, caches[0])
            out.forwards.append((high - low) * (2 if cfg_scale else 1))
            if cfg_scale:
                hidden = canvas.clone()
                hidden[: len(prompt)] = mask_id
                without = forward(hidden, caches[1])
                logits = without + (cfg_scale + 1) * (logits - without)
            logits = logits[start - low : end - low]
            logits[:, list(never)] = -math.inf
            if suppress:
                logits[:, list(suppress)] = -math.inf
            token = logits.argmax(-1)
            confidence, entropy = judged(logits, token, defer)
            is_open = canvas[start:end] == mask_id
            where = is_open.nonzero()[:, 0]
            taken = where[rule(confidence[where], entropy[where], step)]
            canvas[start + taken] = token[taken]
            step += 1
    out.tokens = canvas[len(prompt) :].tolist()
    return out


def judged(logits: Tensor, token: Tensor, defer: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(probability of the chosen token, entropy) of each row, as if the deferred ids did not exist."""
    logits = logits.clone()
    logits[:, list(defer)] = -math.inf
    probability = logits.softmax(-1)
    entropy = -(probability * probability.clamp_min(1e-300).log()).sum(-1)
    entropy[torch.isin(token, torch.tensor([-1, *defer]))] = math.inf
    return probability.gather(1, token[:, None])[:, 0], entropy


def by_count(num_masks: int, steps: int) -> Choose:
    """Static: the most confident, as many as this step's turn."""
    counts = static_counts(num_masks, steps)

    def choose(confidence: Tensor, entropy: Tensor, step: int) -> Tensor:
        taken = torch.zeros_like(confidence, dtype=torch.bool)
        order = sorted(range(len(confidence)), key=lambda i: (-float(confidence[i]), i))
        taken[order[: counts[step]]] = True
        return taken

    return choose


def by_threshold(threshold: float) -> Choose:
    def choose(confidence: Tensor, entropy: Tensor, step: int) -> Tensor:
        taken = confidence >= threshold
        taken[confidence.argmax()] = True
        return taken

    return choose


def by_factor(factor: float) -> Choose:
    """The largest n such that the i-th most confident has at least 1 - factor / (i + 1) for every i up to n."""

    def choose(confidence: Tensor, entropy: Tensor, step: int) -> Tensor:
        order = confidence.argsort(descending=True)
        ranked = confidence[order].tolist()
        best = 1
        for n in range(2, len(ranked) + 1):
            if all(ranked[i - 1] >= 1 - factor / (i + 1) for i in range(1, n + 1)):
                best = n
        taken = torch.zeros_like(confidence, dtype=torch.bool)
        taken[order[:best]] = True
        return taken

    return choose


def by_entropy(bound: float) -> Choose:
    """The longest list of the most certain whose entropies add up to at most the bound."""

    def choose(confidence: Tensor, entropy: Tensor, step: int) -> Tensor:
        order = entropy.argsort()
        best = max([n for n in range(1, len(order) + 1) if float(entropy[order[:n]].sum()) <= bound], default=1)
        taken = torch.zeros_like(confidence, dtype=torch.bool)
        taken[order[:best]] = True
        return taken

    return choose
