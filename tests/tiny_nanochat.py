"""Random tiny nanochat checkpoints in both layouts, and a plain restatement of every generation to judge them by.

The restatement is dense float64 torch, one position's keys at a time where that matters, straight from the description
of each generation: no pages, no chunks, no code of the engine.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import pickle
import sys
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny_tokenizer import NUM_TOKENS, TOKEN_IDS, save_tokenizer

HF_DEFAULTS: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "vocab_size": NUM_TOKENS + 10,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 15.0,
    "hidden_act": "relu2",
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
}


def make_hf_nanochat(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A random generation-0 checkpoint as transformers publishes it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**HF_DEFAULTS, **overrides, "architectures": ["NanoChatForCausalLM"], "model_type": "nanochat"}
    config |= {"bos_token_id": TOKEN_IDS["<|endoftext|>"], "eos_token_id": TOKEN_IDS["<|im_end|>"]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_tokenizer(folder)
    matrix = _matrices(seed)
    width, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    rows, kv_rows = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    tensors = {"model.embed_tokens.weight": matrix(vocab, width), "lm_head.weight": matrix(vocab, width, gain=8.0)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, size in (("q", rows), ("k", kv_rows), ("v", kv_rows)):
            tensors[f"{layer}.self_attn.{name}_proj.weight"] = matrix(size, width)
        tensors[f"{layer}.self_attn.o_proj.weight"] = matrix(width, rows)
        tensors[f"{layer}.mlp.fc1.weight"] = matrix(inner, width)
        tensors[f"{layer}.mlp.fc2.weight"] = matrix(width, inner)
    dtype = getattr(torch, config["torch_dtype"])
    save_file(
        {name: t.to(dtype) for name, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


def _matrices(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))

    return matrix


SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
CHAT_SPECIALS = (
    "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>", "<|python_start|>",
    "<|python_end|>", "<|output_start|>", "<|output_end|>",
)  # fmt: skip
_CORPUS = (
    "The calculator counts: 12+30=42, 'strawberry'.count('r') is 3. How many letters are in the word? Hello there, "
    "hello world; the answer is 1234.5 and the other one is not. I'm sure they'll say that we've been there.\n"
) * 2
NUM_RANKS = 256 + 70
NANO_IDS = {token: NUM_RANKS + i for i, token in enumerate(CHAT_SPECIALS)}
NANO_VOCAB = NUM_RANKS + len(CHAT_SPECIALS)


@functools.cache
def nano_ranks() -> dict[bytes, int]:
    """Ranks as byte-pair training gives them: the bytes, then the most frequent pair again and again."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([byte]) for byte in word.encode()] for word in _CORPUS.replace(" ", "\0 ").split("\0")]
    while len(ranks) < NUM_RANKS:
        counts = Counter(pair for word in words for pair in itertools.pairwise(word))
        pair = min(counts, key=lambda p: (-counts[p], p))
        ranks[pair[0] + pair[1]] = len(ranks)
        for word in words:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == pair:
                    word[i : i + 2] = [pair[0] + pair[1]]
                i += 1
    return ranks


def pickled_encoding(**state: Any) -> bytes:
    """What `pickle.dump` writes of a tiktoken.Encoding with this state; the package itself is not needed."""
    core = types.ModuleType("tiktoken.core")
    encoding = type("Encoding", (), {"__module__": "tiktoken.core", "__getstate__": lambda self: self.state})
    core.Encoding = encoding  # type: ignore[attr-defined]
    made = encoding()
    made.state = {  # type: ignore[attr-defined]
        "name": "rustbpe",
        "pat_str": SPLIT_PATTERN,
        "mergeable_ranks": nano_ranks(),
        "special_tokens": NANO_IDS,
        **state,
    }
    saved = {name: sys.modules.get(name) for name in ("tiktoken", "tiktoken.core")}
    sys.modules["tiktoken"], sys.modules["tiktoken.core"] = types.ModuleType("tiktoken"), core
    try:
        return pickle.dumps(made)
    finally:
        for name, module in saved.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


GATES = {2: 32, 3: 12, 4: 12}
SIZES: dict[str, Any] = {
    "sequence_len": 48, "vocab_size": NANO_VOCAB, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 48
}  # fmt: skip


def make_native_nanochat(
    base: Path, generation: int, *, seed: int = 0, prefix: str = "", step: int = 7, padded: bool = True, **sizes: Any
) -> Path:
    """A random checkpoint as nanochat writes it, in BASE/chatsft_checkpoints/d4, the tokenizer in BASE/tokenizer."""
    folder = base / "chatsft_checkpoints" / "d4"
    folder.mkdir(parents=True, exist_ok=True)
    (base / "tokenizer").mkdir(exist_ok=True)
    (base / "tokenizer" / "tokenizer.pkl").write_bytes(pickled_encoding())
    config = {**SIZES, **sizes}
    tensors = native_tensors(generation, config, seed=seed, padded=padded)
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"step": step, "model_config": config}), encoding="utf-8")
    torch.save({prefix + name: tensor for name, tensor in tensors.items()}, folder / f"model_{step:06d}.pt")
    torch.save({"state": {}}, folder / f"optim_{step:06d}_rank0.pt")
    return folder


def native_tensors(generation: int, config: Mapping[str, Any], *, seed: int, padded: bool) -> dict[str, torch.Tensor]:
    """Random weights under nanochat's names; embeddings in bfloat16, as they are trained."""
    matrix = _matrices(seed)
    width, layers, vocab = config["n_embd"], config["n_layer"], config["vocab_size"]
    rows = -(-vocab // 64) * 64 if padded else vocab
    kv_rows = config["n_kv_head"] * (width // config["n_head"])
    tensors = {
        "transformer.wte.weight": matrix(rows, width).bfloat16(),
        "lm_head.weight": matrix(rows, width, gain=6.0),
    }
    for i in range(layers):
        layer = f"transformer.h.{i}"
        for name, size in (("q", width), ("k", kv_rows), ("v", kv_rows), ("proj", width)):
            tensors[f"{layer}.attn.c_{name}.weight"] = matrix(size, width)
        tensors[f"{layer}.mlp.c_fc.weight"] = matrix(4 * width, width)
        tensors[f"{layer}.mlp.c_proj.weight"] = matrix(width, 4 * width)
        if generation >= 2 and i % 2 == (layers - 1) % 2:
            tensors[f"{layer}.attn.ve_gate.weight"] = matrix(config["n_kv_head"], GATES[generation])
            tensors[f"value_embeds.{i}.weight"] = matrix(rows, kv_rows, gain=3.0).bfloat16()
    if generation >= 1:
        tensors["resid_lambdas"] = 1 + 0.2 * matrix(1, layers)[0]
        tensors["x0_lambdas"] = 0.5 * matrix(1, layers)[0]
    if generation >= 4:
        tensors["smear_gate.weight"] = matrix(1, 24, gain=3.0)
        tensors["smear_lambda"], tensors["backout_lambda"] = torch.tensor([0.8]), torch.tensor([0.3])
    return tensors


def make_scripted_nanochat(base: Path, followers: Mapping[int, Sequence[int]]) -> Path:
    """A generation-0 checkpoint that has learnt one thing: which tokens may follow each, all equally likely.

    At most 64 tokens have followers; its layers add nothing, so that the head sees the token itself.
    """
    config = {**SIZES, "n_embd": 64, "n_layer": 2, "sequence_len": 512}
    folder = make_native_nanochat(base, 0, **config)
    tensors = {name: torch.zeros_like(t) for name, t in native_tensors(0, config, seed=0, padded=True).items()}
    for place, (token, nexts) in enumerate(followers.items()):
        tensors["transformer.wte.weight"][token, place] = 1.0
        for follower in nexts:
            tensors["lm_head.weight"][follower, place] = 20.0
    torch.save(tensors, folder / "model_000007.pt")
    (folder / "meta_000007.json").write_text(json.dumps({"model_config": config}), encoding="utf-8")
    return folder


def native_logits(
    generation: int,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    ids: Sequence[int],
    *,
    cap: float = 15.0,
) -> torch.Tensor:
    """Logits [T, vocab] of a whole text by definition, in float64."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    tokens = torch.tensor(ids)
    layers, heads, kv_heads = config["n_layer"], config["n_head"], config["n_kv_head"]
    head = config["n_embd"] // heads
    base = 100_000.0 if generation >= 3 else 10_000.0
    scale = {3: 1.15, 4: 1.2}.get(generation, 1.0)
    length = config["sequence_len"]
    short = {3: math.ceil(length / 3 / 128) * 128, 4: math.ceil(length / 4 / 128) * 128}.get(generation, length // 2)
    pattern = config.get("window_pattern") or "L"
    x = _norm(w["transformer.wte.weight"][tokens])
    if generation >= 4:
        share = w["smear_lambda"] * torch.sigmoid(x[1:, :24] @ w["smear_gate.weight"].T)
        x = torch.cat([x[:1], x[1:] + share * x[:-1]])
    first, middle = x, x
    for i in range(layers):
        layer = f"transformer.h.{i}"
        if generation >= 1:
            x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * first
        h = _norm(x)
        q, k, v = (
            (h @ w[f"{layer}.attn.c_{name}.weight"].T).view(len(ids), -1, head).transpose(0, 1) for name in "qkv"
        )
        if f"value_embeds.{i}.weight" in w:
            gate = torch.sigmoid(h[:, : GATES[generation]] @ w[f"{layer}.attn.ve_gate.weight"].T)
            own = w[f"value_embeds.{i}.weight"][tokens].view(len(ids), kv_heads, head)
            v = v + ((2.0 if generation == 2 else 3.0) * gate[:, :, None] * own).transpose(0, 1)
        q, k = (scale * _norm(_turned(each, base)) for each in (q, k))
        k, v = (each.repeat_interleave(heads // kv_heads, dim=0) for each in (k, v))
        window = length if i == layers - 1 or pattern[i % len(pattern)] == "L" else short
        distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))[None, :]
        hidden = (distance < 0) | ((distance > window) & (generation >= 1))
        weights = (q @ k.transpose(1, 2) / math.sqrt(head)).masked_fill(hidden, -math.inf).softmax(-1)
        x = x + (weights @ v).transpose(0, 1).reshape(len(ids), -1) @ w[f"{layer}.attn.c_proj.weight"].T
        x = x + (_norm(x) @ w[f"{layer}.mlp.c_fc.weight"].T).clamp(min=0) ** 2 @ w[f"{layer}.mlp.c_proj.weight"].T
        if i == layers // 2:
            middle = x
    if generation >= 4:
        x = x - w["backout_lambda"] * middle
    logits = (_norm(x) @ w["lm_head.weight"].T)[:, : config["vocab_size"]]
    return cap * torch.tanh(logits / cap)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def _turned(x: torch.Tensor, base: float) -> torch.Tensor:
    """x [heads, T, D] turned by minus the angle of each position, pairs being (i, i + D/2)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] / base ** (torch.arange(half, dtype=torch.float64) / half)
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), -angles)
    return torch.cat([pairs.real, pairs.imag], -1)
