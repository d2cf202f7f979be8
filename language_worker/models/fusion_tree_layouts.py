"""What FusionTree's training leaves, as the model needs it: sizes from wherever they are said, tensors by their names.

A training state (`best_model.pt`, `final_model.pt`, `checkpoint_step_{n}.pt`) holds its configuration beside the
weights; a folder of DeepSpeed's (`step_{n}/`) holds it in config.json, under "model"; a bare map of tensors holds none,
and then a config.json beside it, or `config_overrides`, says what shapes cannot: the window and the global heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch

from language_worker.errors import ModelNotSupported
from language_worker.models.base import ModelSpec
from language_worker.models.config_values import read_size
from language_worker.models.fusion_tree import CodeKind, FusionTree, FusionTreeShape
from transfer.checkpoint import Checkpoint
from transfer.checkpoint_rules import Rule
from transfer.checkpoint_torch import load_entry

ARCHITECTURE = "HybridLanguageModel"  # its class
SMALLEST_PYRAMID_WINDOW = 512  # of the first layer; the last one's is window_size
DEFAULTS = {
    "max_position_embeddings": 65536,
    "layer_norm_eps": 1e-5,
    "attention_type": "local_global",
    "srte_encoding": "learnable",
    "srte_share_across_layers": True,
    "srte_factorized_rank": 0,
    "use_alignment": True,
    "tie_word_embeddings": False,
}
_LAYER_NUMBER = re.compile(r"layers\.(\d+)\.")
# Where tensors go whose names differ: the checkpoint's of a layer, the model's.
RENAMED = {
    "ln_input": "input_norm",
    "ln_output": "output_norm",
    "attention.out_proj": "attention_out",
    "alignment.net.2": "align_out",
    "gate.u": "gate_down",
    "gate.d": "gate_up",
    "fusion_proj": "fusion",
    "small_mlp.0": "mlp_up",
    "small_mlp.2": "mlp_down",
    "mamba.in_proj": "mamba.in_proj",
    "mamba.x_proj": "mamba.x_proj",
    "mamba.out_proj": "mamba.out_proj",
}
WITHOUT_BIAS = frozenset({"gate.u", "gate.d", "mamba.x_proj"})


class FusionTreeModel(FusionTree):
    """As it is trained."""

    @classmethod
    def read_spec(cls, config: Mapping[str, Any]) -> ModelSpec:
        return read_shape(config).spec()

    @classmethod
    def empty(
        cls, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device
    ) -> tuple[Self, list[Rule], tuple[str, ...]]:
        shape = read_shape(checkpoint.config())
        foreign: tuple[str, ...] = (r"shared_rope\.inv_freq", r"layers\.\d+\.attention\.rope\.inv_freq")
        if shape.is_shared:  # every layer repeats it
            foreign += (r"layers\.\d+\.srte\..*",)
        if shape.tied:
            foreign += (r"lm_head\.weight",)
        return cls(shape, dtype=dtype, device=device), list(_rules(shape)), foreign


def infer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json that a checkpoint of FusionTree's would have; {} for any other checkpoint."""
    stored = checkpoint.tensors.get("layers.0.mamba.A_log")
    if stored is None or "layers.0.attention.q_proj.weight" not in checkpoint.tensors:
        return {}
    beside = checkpoint.read_json("config.json") if (checkpoint.folder / "config.json").is_file() else {}
    said = (load_entry(stored.file, "config"), beside)
    sections = [config["model"] for config in said if isinstance(config, Mapping) and _is_map(config.get("model"))]
    sizes = _sizes(checkpoint)
    for section in sections:
        sizes |= section
    return {**sizes, "architectures": [ARCHITECTURE], "model_type": "fusion_tree"}


def _is_map(value: object) -> bool:
    return isinstance(value, Mapping)


def _sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    """What names and shapes tell."""
    tensors = checkpoint.tensors
    numbers = [int(match[1]) for name in tensors if (match := _LAYER_NUMBER.match(name))]
    found: dict[str, Any] = {"num_layers": max(numbers) + 1}
    owner = "shared_srte" if any(name.startswith("shared_srte.") for name in tensors) else "layers.0.srte"
    found["srte_share_across_layers"] = owner == "shared_srte"
    found["use_alignment"] = "layers.0.alignment.net.0.weight" in tensors
    found["srte_encoding"] = "sincos" if f"{owner}.inv_freq" in tensors else "learnable"
    for name, entries in (
        ("embed_tokens.weight", {"vocab_size": 0, "hidden_size": 1}),
        ("layers.0.gate.u.weight", {"gate_rank": 0}),
        (f"{owner}.freqs", {"max_position_embeddings": 1}),
        (f"{owner}.lowrank", {"max_position_embeddings": 1, "srte_factorized_rank": 2}),
    ):
        shape = tensors[name].shape if name in tensors else ()
        found |= {entry: shape[axis] for entry, axis in entries.items() if axis < len(shape)}
    turns = tensors.get("layers.0.attention.rope.inv_freq") or tensors.get("shared_rope.inv_freq")
    if turns is not None and len(turns.shape) == 1 and turns.shape[0] and "hidden_size" in found:
        found["num_heads"] = found["hidden_size"] // (2 * turns.shape[0])
    return found


def read_shape(config: Mapping[str, Any]) -> FusionTreeShape:
    """Raises ModelNotSupported naming the entry that is missing or not served."""
    full = {**DEFAULTS, **{name: value for name, value in config.items() if value is not None}}
    missing = [name for name in ("num_heads", "window_size", "global_heads") if name not in full]
    if missing:
        raise ModelNotSupported(
            f"neither the weights nor a config.json say {', '.join(missing)} of this FusionTree model; set them in "
            "config_overrides, or keep the training's config.json beside the weights"
        )
    hidden, heads = read_size(full, "hidden_size"), read_size(full, "num_heads")
    if hidden % heads or hidden // heads % 2:
        raise ModelNotSupported(f"hidden_size {hidden} is not num_heads = {heads} times an even number")
    num_global, rank = (_count(full, name) for name in ("global_heads", "srte_factorized_rank"))
    code: CodeKind = "lowrank" if 0 < rank < hidden else "table"
    if full["srte_encoding"] not in ("learnable", "sincos"):
        raise ModelNotSupported(f"srte_encoding is {full['srte_encoding']!r}; served are 'learnable' and 'sincos'")
    return FusionTreeShape(
        vocab_size=read_size(full, "vocab_size"),
        hidden_size=hidden,
        num_heads=heads,
        num_global=min(num_global, heads),
        windows=tuple(size // 2 for size in _window_sizes(full)),
        gate_rank=min(read_size(full, "gate_rank"), hidden // 2),
        max_positions=read_size(full, "max_position_embeddings"),
        eps=_number(full, "layer_norm_eps"),
        code="sincos" if full["srte_encoding"] == "sincos" else code,
        code_rank=rank if code == "lowrank" else 0,
        is_shared=bool(full["srte_share_across_layers"]),
        has_alignment=bool(full["use_alignment"]),
        tied=bool(full["tie_word_embeddings"]),
    )


def _window_sizes(config: Mapping[str, Any]) -> list[int]:
    """Of every layer: equal, or growing from SMALLEST_PYRAMID_WINDOW to window_size."""
    layers, largest = read_size(config, "num_layers"), read_size(config, "window_size")
    kind = config["attention_type"]
    if kind == "local_global":
        return [largest] * layers
    if kind != "pyramidal":
        raise ModelNotSupported(f"attention_type is {kind!r}; served are 'local_global' and 'pyramidal'")
    shares = [i / max(1, layers - 1) for i in range(layers)]  # in the order of the training's own rounding
    return [int(SMALLEST_PYRAMID_WINDOW + (largest - SMALLEST_PYRAMID_WINDOW) * share) for share in shares]


def _count(config: Mapping[str, Any], name: str) -> int:
    value = config[name]
    if type(value) is not int or value < 0:
        raise ModelNotSupported(f"the configuration has {name} = {value!r}; an integer of at least 0 is needed")
    return value


def _number(config: Mapping[str, Any], name: str) -> float:
    """A positive number; YAML reads 1e-5 as a string."""
    try:
        value = float(config[name])
    except (TypeError, ValueError):
        value = 0.0
    if not 0 < value < 1:
        raise ModelNotSupported(f"the configuration has {name} = {config[name]!r}; a small positive number is needed")
    return value


def _rules(shape: FusionTreeShape) -> Iterator[Rule]:
    """Every layer's tensors where their names say, but for those that are joined or kept in another form."""
    hidden, layer = shape.hidden_size, r"layers\.(\d+)\."
    yield Rule(pattern=r"embed_tokens\.weight", target="embedding")
    for kind in ("weight", "bias"):
        yield Rule(pattern=rf"norm\.{kind}", target=f"final_norm.{kind}")
    if not shape.tied:
        yield Rule(pattern=r"lm_head\.weight", target="head")
    for source, target in RENAMED.items():
        if shape.has_alignment or not source.startswith("alignment."):
            for kind in ("weight",) if source in WITHOUT_BIAS else ("weight", "bias"):
                yield Rule(pattern=layer + re.escape(f"{source}.{kind}"), target=rf"layers.\1.{target}.{kind}")
    for i, name in enumerate("qkv"):
        rows = (i * hidden, (i + 1) * hidden)
        yield Rule(pattern=layer + rf"attention\.{name}_proj\.weight", target=r"layers.\1.qkv.weight", rows=rows)
    if shape.has_alignment:
        for name, rows in ((r"net\.0", (0, hidden)), ("residual_proj", (hidden, 2 * hidden))):
            for kind in ("weight", "bias"):
                pattern = layer + rf"alignment\.{name}\.{kind}"
                yield Rule(pattern=pattern, target=rf"layers.\1.align.{kind}", rows=rows)
    yield from _mamba_rules(layer + r"mamba\.", r"layers.\1.mamba")
    if shape.is_shared:
        yield from _code_rules(r"shared_srte\.", "code")
    else:
        yield from _code_rules(layer + r"srte\.", r"layers.\1.code")


def _mamba_rules(source: str, target: str) -> Iterator[Rule]:
    yield Rule(pattern=source + "A_log", target=f"{target}.a", transform=_decay)
    yield Rule(pattern=source + "D", target=f"{target}.skip")
    yield Rule(pattern=source + r"conv1d\.weight", target=f"{target}.conv.weight", transform=_without_middle)
    yield Rule(pattern=source + r"conv1d\.bias", target=f"{target}.conv.bias")
    yield Rule(pattern=source + r"dt_proj\.weight", target=f"{target}.dt_proj.weight")
    yield Rule(pattern=source + r"dt_proj\.bias", target=f"{target}.dt_proj.bias", transform=_doubled)


def _code_rules(source: str, target: str) -> Iterator[Rule]:
    for name in ("freqs", "lowrank"):
        yield Rule(pattern=source + name, target=f"{target}.table", transform=_without_first)
    yield Rule(pattern=source + r"proj\.weight", target=f"{target}.proj")
    yield Rule(pattern=source + "inv_freq", target=f"{target}.frequencies")


def _decay(logarithms: torch.Tensor) -> torch.Tensor:
    return -torch.exp(logarithms.float())


def _doubled(bias: torch.Tensor) -> torch.Tensor:
    """It was trained to be added twice: by the projection, and again before softplus."""
    return 2 * bias.float()


def _without_middle(weight: torch.Tensor) -> torch.Tensor:
    """[channels, 1, width] -> [channels, width]."""
    return weight[:, 0] if weight.shape[1:2] == (1,) else weight


def _without_first(table: torch.Tensor) -> torch.Tensor:
    """[1, positions, width] -> [positions, width]."""
    return table[0] if table.shape[:1] == (1,) else table
