"""Random tiny FusionTree checkpoints as its training writes them, and a plain restatement to judge them by.

The restatement is dense float64 torch over a whole text: one token of the state space recurrence after the other, every
mask written out, no pages, chunks, carried state or code of the engine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.tiny_tokenizer import NUM_TOKENS, save_tokenizer

VOCAB = NUM_TOKENS + 6
STATE, WIDTH = 64, 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "window_size": 16,
    "global_heads": 1,
    "gate_rank": 12,
    "max_position_embeddings": 400,
    "layer_norm_eps": 1e-5,
    "attention_type": "local_global",
    "srte_encoding": "learnable",
    "srte_share_across_layers": True,
    "srte_factorized_rank": 0,
    "use_alignment": True,
    "tie_word_embeddings": False,
}
# One for every option of the architecture, each differing from SIZES in what it names.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "all local": {"global_heads": 0, "window_size": 7},
    "all global": {"global_heads": 9},
    "odd window": {"window_size": 5, "num_heads": 8, "global_heads": 3},
    "one key": {"window_size": 1},
    "lowrank": {"srte_factorized_rank": 6},
    "sincos": {"srte_encoding": "sincos"},
    "own codes": {"srte_share_across_layers": False},
    "own lowrank": {"srte_share_across_layers": False, "srte_factorized_rank": 5},
    "mean": {"use_alignment": False, "hidden_size": 24, "num_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "deep": {"num_layers": 4, "gate_rank": 99, "layer_norm_eps": 1e-3},
    "pyramid": {"attention_type": "pyramidal", "window_size": 1024, "max_position_embeddings": 700},
}


def make_fusion_tree(
    folder: Path, *, seed: int = 0, layout: str = "training", file_name: str = "checkpoint_step_40.pt", **sizes: Any
) -> Path:
    """layout: "training" (a training state), "bare" (a map of tensors, config.json beside it), "deepspeed"."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder)
    config = {**SIZES, **sizes}
    tensors = tensors_of(config, seed=seed)
    whole = {"model": {**config, "gradient_checkpointing": True}, "training": {"learning_rate": "3e-4", "bf16": True}}
    if layout == "bare":
        torch.save(tensors, folder / file_name)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    elif layout == "deepspeed":
        (folder / "config.json").write_text(json.dumps(whole), encoding="utf-8")
        torch.save({"module": tensors, "step": 40, "config": whole}, folder / "mp_rank_00_model_states.pt")
        torch.save({"optimizer_state_dict": {}}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    else:
        state = {"step": 40, "model_state_dict": tensors, "optimizer_state_dict": {"state": {}}, "config": whole}
        torch.save(state, folder / file_name)
    return folder


def tensors_of(config: Mapping[str, Any], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names that training gives them, those that layers share repeated under each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * (gain / math.sqrt(shape[-1]))

    tensors: dict[str, torch.Tensor] = {}

    def linear(name: str, rows: int, columns: int, bias: bool = True, gain: float = 1.0) -> None:
        tensors[f"{name}.weight"] = draw(rows, columns, gain=gain)
        if bias:
            tensors[f"{name}.bias"] = 0.3 * torch.randn(rows, generator=generator)

    def norm(name: str, size: int) -> None:
        tensors[f"{name}.weight"] = 1 + 0.2 * torch.randn(size, generator=generator)
        tensors[f"{name}.bias"] = 0.2 * torch.randn(size, generator=generator)

    def code(name: str) -> None:
        rank = config["srte_factorized_rank"]
        if config["srte_encoding"] == "sincos":
            exponents = torch.arange(0, hidden, 2) / hidden
            tensors[f"{name}.inv_freq"] = torch.exp(-math.log(10000.0) * exponents)
        elif 0 < rank < hidden:
            tensors[f"{name}.lowrank"] = torch.randn(1, config["max_position_embeddings"], rank, generator=generator)
            tensors[f"{name}.proj.weight"] = draw(hidden, rank, gain=0.5)
        else:
            shape = (1, config["max_position_embeddings"], hidden)
            tensors[f"{name}.freqs"] = 0.5 * torch.randn(*shape, generator=generator)

    hidden, heads = config["hidden_size"], config["num_heads"]
    low, inner = math.ceil(hidden / 16), 2 * hidden
    tensors["embed_tokens.weight"] = draw(config["vocab_size"], hidden, gain=1.5)
    if config["srte_share_across_layers"]:
        code("shared_srte")
    for i in range(config["num_layers"]):
        layer = f"layers.{i}"
        norm(f"{layer}.ln_input", hidden)
        mamba = f"{layer}.mamba"
        tensors[f"{mamba}.A_log"] = torch.log(torch.arange(1.0, STATE + 1)).repeat(inner, 1) + 0.1 * draw(inner, STATE)
        tensors[f"{mamba}.D"] = 1 + 0.2 * torch.randn(inner, generator=generator)
        linear(f"{mamba}.in_proj", 2 * inner, hidden)
        tensors[f"{mamba}.conv1d.weight"] = draw(inner, 1, WIDTH, gain=1.5)
        tensors[f"{mamba}.conv1d.bias"] = 0.2 * torch.randn(inner, generator=generator)
        linear(f"{mamba}.x_proj", low + 2 * STATE, inner, bias=False)
        linear(f"{mamba}.dt_proj", inner, low)
        tensors[f"{mamba}.dt_proj.bias"] -= 1.0
        linear(f"{mamba}.out_proj", hidden, inner)
        for name in "qkv":
            linear(f"{layer}.attention.{name}_proj", hidden, hidden, bias=False)
        linear(f"{layer}.attention.out_proj", hidden, hidden)
        half = hidden // heads // 2
        tensors[f"{layer}.attention.rope.inv_freq"] = 1 / 10000 ** (torch.arange(half) / half)
        if config["srte_share_across_layers"]:
            repeated = {n: t for n, t in tensors.items() if n.startswith("shared_srte.")}
            tensors |= {n.replace("shared_srte", f"{layer}.srte"): t for n, t in repeated.items()}
        else:
            code(f"{layer}.srte")
        if config["use_alignment"]:
            linear(f"{layer}.alignment.net.0", hidden, 2 * hidden)
            linear(f"{layer}.alignment.net.2", hidden, hidden)
            linear(f"{layer}.alignment.residual_proj", hidden, 2 * hidden)
        rank = min(config["gate_rank"], hidden // 2)
        linear(f"{layer}.gate.u", rank, hidden, bias=False)
        linear(f"{layer}.gate.d", hidden, rank, bias=False, gain=2.0)
        linear(f"{layer}.fusion_proj", hidden, hidden)
        linear(f"{layer}.small_mlp.0", 2 * hidden, hidden)
        linear(f"{layer}.small_mlp.2", hidden, 2 * hidden)
        norm(f"{layer}.ln_output", hidden)
    norm("norm", hidden)
    tied = config["tie_word_embeddings"]
    tensors["lm_head.weight"] = tensors["embed_tokens.weight"] if tied else draw(config["vocab_size"], hidden, gain=1.5)
    return tensors


def logits_of(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], ids: Sequence[int]) -> torch.Tensor:
    """Logits [T, vocab] of a whole text by definition, in float64."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    x = w["embed_tokens.weight"][list(ids)]
    for i in range(config["num_layers"]):
        layer = f"layers.{i}"
        window = config["window_size"]
        if config["attention_type"] == "pyramidal":
            window = int(512 + (window - 512) * (i / max(1, config["num_layers"] - 1)))
        xn = _norm(x, w, f"{layer}.ln_input", 1e-5)
        m = _mamba(xn + _code(w, f"{layer}.srte", len(ids)), w, f"{layer}.mamba")
        a = _attention(xn, w, f"{layer}.attention", config["num_heads"], config["global_heads"], window)
        both = torch.cat([m, a], -1)
        if config["use_alignment"]:
            net = f"{layer}.alignment.net"
            aligned = _linear(_gelu(_linear(both, w, f"{net}.0")), w, f"{net}.2")
            aligned = aligned + _linear(both, w, f"{layer}.alignment.residual_proj")
        else:
            aligned = (m + a) / 2
        g = torch.sigmoid(_linear(torch.tanh(_linear(aligned, w, f"{layer}.gate.u")), w, f"{layer}.gate.d"))
        mlp = _linear(_gelu(_linear(aligned, w, f"{layer}.small_mlp.0")), w, f"{layer}.small_mlp.2")
        x = _norm(x + _linear(g * m + (1 - g) * a, w, f"{layer}.fusion_proj") + mlp, w, f"{layer}.ln_output", 1e-5)
    return _norm(x, w, "norm", float(config["layer_norm_eps"])) @ w["lm_head.weight"].T


Weights = Mapping[str, torch.Tensor]


def _linear(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _norm(x: torch.Tensor, w: Weights, name: str, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def _code(w: Weights, name: str, length: int) -> torch.Tensor:
    if f"{name}.freqs" in w:
        return w[f"{name}.freqs"][0, :length]
    if f"{name}.lowrank" in w:
        return w[f"{name}.lowrank"][0, :length] @ w[f"{name}.proj.weight"].T
    angles = torch.arange(length)[:, None] * w[f"{name}.inv_freq"]
    code = torch.zeros(length, 2 * angles.shape[1], dtype=torch.float64)
    code[:, 0::2], code[:, 1::2] = torch.sin(angles), torch.cos(angles)
    return code


def _mamba(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    inner = w[f"{name}.D"].shape[0]
    u, z = _linear(x, w, f"{name}.in_proj").split(inner, -1)
    padded = torch.cat([torch.zeros(WIDTH - 1, inner, dtype=torch.float64), u])
    taps = w[f"{name}.conv1d.weight"][:, 0]
    u = sum(padded[j : j + len(x)] * taps[:, j] for j in range(WIDTH)) + w[f"{name}.conv1d.bias"]
    u = _silu(u)
    low, b, c = _linear(u, w, f"{name}.x_proj").split([w[f"{name}.dt_proj.weight"].shape[1], STATE, STATE], -1)
    dt = torch.log1p(torch.exp(_linear(low, w, f"{name}.dt_proj") + w[f"{name}.dt_proj.bias"]))
    a = -torch.exp(w[f"{name}.A_log"])
    h, rows = torch.zeros_like(a), []
    for t in range(len(x)):
        h = torch.exp(dt[t][:, None] * a) * h + (dt[t] * u[t])[:, None] * b[t]
        rows.append(h @ c[t] + w[f"{name}.D"] * u[t])
    return _linear(torch.stack(rows) * _silu(z), w, f"{name}.out_proj")


def _attention(x: torch.Tensor, w: Weights, name: str, heads: int, global_heads: int, window: int) -> torch.Tensor:
    length, hidden = x.shape
    q, k, v = (_linear(x, w, f"{name}.{n}_proj").view(length, heads, -1).transpose(0, 1) for n in "qkv")
    half = hidden // heads // 2
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones_like(angles), angles)
    q, k = (torch.complex(part[..., :half], part[..., half:]) * turn for part in (q, k))
    q, k = (torch.cat([part.real, part.imag], -1) for part in (q, k))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden_keys = (distance < 0).repeat(heads, 1, 1)
    hidden_keys[: max(0, heads - global_heads)] |= distance > window // 2
    scores = (q @ k.transpose(1, 2) / math.sqrt(2 * half)).masked_fill(hidden_keys, -math.inf)
    return _linear((scores.softmax(-1) @ v).transpose(0, 1).reshape(length, hidden), w, f"{name}.out_proj")
