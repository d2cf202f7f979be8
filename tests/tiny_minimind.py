"""Random tiny MiniMind checkpoints in every published layout, and the reference model on the same weights.

Layouts: "pth" (a flat state dict of torch.save and nothing that describes it), "bin" (the project's own Hugging Face
folder: config.json of model_type minimind, pytorch_model.bin), "converted" (as Llama, Qwen3 or Qwen3-MoE safetensors).
References are transformers' models of the same arithmetic; MiniMind 2's mixture, which none has, is written out here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny_text_models import ARCHITECTURES, text_weights
from tests.tiny_tokenizer import NUM_TOKENS, TOKEN_IDS, save_tokenizer

VARIANTS = ("2", "2-moe", "3", "3-moe")
LAYOUTS = ("pth", "bin", "converted")
YARN = {
    "type": "yarn", "factor": 16, "original_max_position_embeddings": 2048, "beta_fast": 32, "beta_slow": 1,
    "attention_factor": 1.0,
}  # fmt: skip
FAMILIES = {"2": "llama", "2-moe": "llama", "3": "qwen3", "3-moe": "qwen3_moe"}


def minimind_config(variant: str, **overrides: Any) -> dict[str, Any]:
    """The project's config.json of a variant at tiny sizes."""
    config: dict[str, Any] = {
        "architectures": ["MiniMindForCausalLM"],
        "model_type": "minimind",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2 if variant.startswith("2") else 4,
        "intermediate_size": 96,
        "vocab_size": NUM_TOKENS,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5 if variant.startswith("2") else 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "use_moe": variant.endswith("moe"),
        "inference_rope_scaling": False,
        "bos_token_id": 1,
        "eos_token_id": TOKEN_IDS["<|im_end|>"],
    }
    if variant == "2-moe":
        config |= {"num_experts_per_tok": 2, "n_shared_experts": 1, "n_routed_experts": 4, "norm_topk_prob": True}
        config |= {"scoring_func": "softmax", "aux_loss_alpha": 0.1, "seq_aux": True}
    if variant == "3-moe":
        config |= {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 96, "norm_topk_prob": True}
    if variant.startswith("3"):
        config["head_dim"] = 8
    config |= overrides
    if config["inference_rope_scaling"]:
        config.setdefault("rope_scaling", YARN)
    return config


def minimind_weights(variant: str, config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """The published tensors; the head is there, also where it is the embedding."""
    sizes = dict(config)
    if not config["use_moe"]:
        sizes = {name: value for name, value in sizes.items() if "expert" not in name}
    tensors = dict(text_weights(FAMILIES[variant], sizes, seed))
    return {**tensors, "lm_head.weight": tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])}


def make_minimind(
    folder: Path, variant: str, layout: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> dict[str, Any]:
    """Write a checkpoint of one of VARIANTS in one of LAYOUTS; returns the project's config.json of it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = minimind_config(variant, **overrides)
    tensors = {name: tensor.to(dtype) for name, tensor in minimind_weights(variant, config, seed).items()}
    save_tokenizer(folder)
    if layout == "pth":
        torch.save(tensors, folder / f"full_sft_{config['hidden_size']}{'_moe' * config['use_moe']}.pth")
        return config
    written = config if layout == "bin" else converted_config(variant, config)
    (folder / "config.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
    if layout == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
        return config
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return config


def converted_config(variant: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the same model in the family that it is converted to."""
    family = FAMILIES[variant]
    written = {**config, "architectures": [ARCHITECTURES[family]], "model_type": family}
    for name in ("inference_rope_scaling", "use_moe"):
        del written[name]
    return written


def minimind_reference(variant: str, config: dict[str, Any], seed: int) -> Any:
    """transformers' model of the same arithmetic with the same weights, in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    written = converted_config(variant, config)
    del written["architectures"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(written.pop("model_type"), **written)).eval()
    tensors = minimind_weights(variant, config, seed)
    if variant == "2-moe":
        for i, layer in enumerate(model.model.layers):
            prefix = f"model.layers.{i}.mlp."
            parts = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            layer.mlp = SharedMixture(parts, config)
        tensors = {name: t for name, t in tensors.items() if ".mlp." not in name}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        assert not unexpected and not missing, (missing, unexpected)
        return model
    if variant == "3-moe":
        tensors = _stacked(tensors, config)
    model.load_state_dict(tensors, strict=True)
    return model


def _stacked(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Experts as transformers keeps them in memory: one tensor of all, gate before up."""
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for i in range(config["num_hidden_layers"]):
        mlp = f"model.layers.{i}.mlp.experts."
        each = [
            [tensors[f"{mlp}{e}.{part}_proj.weight"] for part in ("gate", "up", "down")]
            for e in range(config["num_experts"])
        ]
        kept[f"{mlp}gate_up_proj"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in each])
        kept[f"{mlp}down_proj"] = torch.stack([down for _, _, down in each])
    return kept


class SharedMixture(torch.nn.Module):
    """MiniMind 2's mixture, token by token: the top k of a softmax, their weights made to add up to 1 if they are
    several, and every shared expert on top."""

    def __init__(self, parts: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        super().__init__()
        self._parts = parts
        self._top_k = config["num_experts_per_tok"]
        self._num_shared = config["n_shared_experts"]

    def _expert(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self._parts[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        inner = gate @ x
        return down @ (inner * torch.sigmoid(inner) * (up @ x))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = []
        for x in hidden.reshape(-1, hidden.shape[-1]):
            scores = (self._parts["gate.weight"] @ x).tolist()
            total = sum(math.exp(score) for score in scores)
            probabilities = [math.exp(score) / total for score in scores]
            chosen = sorted(range(len(scores)), key=lambda e: -probabilities[e])[: self._top_k]
            scale = sum(probabilities[e] for e in chosen) if self._top_k > 1 else 1.0
            mixed = torch.zeros_like(x)
            for e in chosen:
                mixed = mixed + probabilities[e] / scale * self._expert(f"experts.{e}", x)
            for i in range(self._num_shared):
                mixed = mixed + self._expert(f"shared_experts.{i}", x)
            rows.append(mixed)
        return torch.stack(rows).view(hidden.shape)
