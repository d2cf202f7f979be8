"""The config.json that a MiniMind `.pth` would have: read off the names and shapes of its tensors.

What shapes do not say is what the project fixes: 8 query heads where no head is normalised (MiniMind 2), two experts a
token there and one in MiniMind 3. A config.json beside the file, without `architectures`, overrules all of it.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from language_worker.errors import ModelNotSupported
from language_worker.models.config_values import read_size
from transfer.checkpoint import Checkpoint, CheckpointError
from transfer.checkpoint_rules import StoredTensor

HEADS = 8
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "model.layers.0."
_LAYER_NUMBER = re.compile(r"model\.layers\.(\d+)\.")
_SHARED_NUMBER = re.compile(r"model\.layers\.0\.mlp\.shared_experts\.(\d+)\.")


def infer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """{} when the checkpoint is none of MiniMind's. Raises ModelNotSupported where its shapes fit no count of heads,
    CheckpointError where a tensor is missing that says what it is."""
    query = LAYER + "self_attn.q_proj.weight"
    if not {EMBEDDING, query} <= checkpoint.tensors.keys():
        return {}
    vocab_size, hidden_size = _shape(checkpoint, EMBEDDING)
    given = checkpoint.read_json("config.json") if (checkpoint.folder / "config.json").is_file() else {}
    numbers = [int(match[1]) for name in checkpoint.tensors if (match := _LAYER_NUMBER.match(name))]
    config: dict[str, Any] = {
        "architectures": ["MiniMindForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": max(numbers) + 1,
        "tie_word_embeddings": _is_tied(checkpoint),
        **_heads(checkpoint, read_size(given, "num_attention_heads", HEADS)),
    }
    return {**config, **_mlp(checkpoint), **_vision(checkpoint)}


def _shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    stored = checkpoint.tensors.get(name)
    if stored is None:
        raise CheckpointError(str(checkpoint.folder), (f"missing: {name}",))
    shape = stored.shape
    if len(shape) != 2:
        raise CheckpointError(str(checkpoint.folder), (f"wrong shape: {name} is {shape}, the model wants a matrix",))
    return shape[0], shape[1]


def _heads(checkpoint: Checkpoint, heads: int) -> dict[str, Any]:
    """Numbers of heads, and the norms' epsilon, which came with the norms of heads."""
    rows = {name: _shape(checkpoint, f"{LAYER}self_attn.{name}_proj.weight")[0] for name in "qk"}
    norm = _head_norm(checkpoint)
    head_dim = rows["q"] // heads if norm is None else norm.shape[0]
    if not head_dim or rows["q"] % head_dim or rows["k"] % head_dim:
        raise ModelNotSupported(
            f"{rows['q']} query and {rows['k']} key rows are no whole number of heads of {head_dim}; put a config.json "
            'with "num_attention_heads" beside the weights'
        )
    return {
        "num_attention_heads": rows["q"] // head_dim,
        "num_key_value_heads": rows["k"] // head_dim,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-5 if norm is None else 1e-6,
    }


def _head_norm(checkpoint: Checkpoint) -> StoredTensor | None:
    """The norm of query (or key) heads, which MiniMind 2 has not."""
    names = (LAYER + "self_attn.q_norm.weight", LAYER + "self_attn.k_norm.weight")
    return next((checkpoint.tensors[name] for name in names if name in checkpoint.tensors), None)


def _mlp(checkpoint: Checkpoint) -> dict[str, Any]:
    router = LAYER + "mlp.gate.weight"
    if router not in checkpoint.tensors:
        return {"intermediate_size": _shape(checkpoint, LAYER + "mlp.gate_proj.weight")[0]}
    num_experts = _shape(checkpoint, router)[0]
    inner = _shape(checkpoint, LAYER + "mlp.experts.0.gate_proj.weight")[0]
    sizes = {"use_moe": True, "intermediate_size": inner, "moe_intermediate_size": inner}
    shared = {match[1] for name in checkpoint.tensors if (match := _SHARED_NUMBER.match(name))}
    if _head_norm(checkpoint) is not None:
        return {**sizes, "num_experts": num_experts, "num_experts_per_tok": 1}
    return {**sizes, "n_routed_experts": num_experts, "n_shared_experts": len(shared), "num_experts_per_tok": 2}


def _vision(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of MiniMind-V: the version with one linear projector marks images by a run of text tokens."""
    if not any(name.startswith("vision_proj.") for name in checkpoint.tensors):
        return {}
    is_first = "vision_proj.vision_proj.0.weight" in checkpoint.tensors
    return {"architectures": ["MiniMindVLM"], "model_type": "minimind-v", "image_ids": [34] * 196 if is_first else [12]}


def _is_tied(checkpoint: Checkpoint) -> bool:
    """Whether head and embedding are one matrix: files hold both."""
    if HEAD not in checkpoint.tensors:
        return True
    if checkpoint.tensors[HEAD].shape != checkpoint.tensors[EMBEDDING].shape:
        return False
    stored = checkpoint.read([HEAD, EMBEDDING])
    return torch.equal(stored[HEAD], stored[EMBEDDING])
