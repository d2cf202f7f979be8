"""Name maps: which checkpoint tensor fills which fused parameter of a decoder.

q_proj, k_proj, v_proj -> qkv       rows  0 .. heads*D .. (heads+kv)*D .. (heads+2*kv)*D
gate_proj, up_proj     -> gate_up   rows  0 .. intermediate .. 2*intermediate
q_norm, k_norm         -> qk_norm   rows  0 .. heads .. heads+kv, each row the same

Experts have a gate_up and a down each, under the names of the family (`ExpertNames`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from language_worker.models.feed_forward import ExpertShape
from language_worker.models.layers import BlockShape
from transfer.checkpoint import Checkpoint, CheckpointError
from transfer.checkpoint_rules import Rule

MLP_BIASES = r"(?:.*\.)?layers\.\d+\.(?:.*\.)?(?:gate|up|down)_proj\.bias"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertNames:
    """What a family calls the parts of a mixture; regular expressions without capturing groups but in `shared`, which
    has one: the shared expert's number, or nothing where there is only one."""

    mixture: str = r"mlp"
    router: str = r"gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = r"shared_experts\.(\d+)"
    shared_gate: str = r"shared_expert_gate"


HF_EXPERTS = ExpertNames()


def decoder_rules(shape: BlockShape, *, prefix: str, tied: bool, experts: ExpertNames = HF_EXPERTS) -> list[Rule]:
    """Rules for Hugging Face decoder names (`<prefix>layers.N.self_attn.q_proj.weight`, ...). prefix: a regular
    expression without capturing groups. experts: names of a mixture's parts, where there is one."""
    layer = prefix + r"layers\.(\d+)\."
    q_end = shape.num_heads * shape.head_dim
    k_end = q_end + shape.num_kv_heads * shape.head_dim
    rules = [
        Rule(pattern=prefix + r"embed_tokens\.weight", target="embedding.weight"),
        Rule(pattern=prefix + r"norm\.weight", target="final_norm.weight"),
        Rule(pattern=layer + r"input_layernorm\.weight", target=r"layers.\1.input_norm.weight"),
        Rule(pattern=layer + r"post_attention_layernorm\.weight", target=r"layers.\1.post_norm.weight"),
        Rule(pattern=layer + r"self_attn\.o_proj\.weight", target=r"layers.\1.o.weight"),
    ]
    if shape.experts is not None:
        rules += _expert_rules(layer, shape.experts, experts)
    if shape.experts is None or shape.experts.dense_layers:
        rules += _mlp_rules(layer + r"mlp\.", r"layers.\1", shape.intermediate_size, HF_EXPERTS)
    if shape.has_o_bias:
        rules.append(Rule(pattern=layer + r"self_attn\.o_proj\.bias", target=r"layers.\1.o.bias"))
    if shape.has_qk_norm:
        rules += _head_norms(layer, shape)
    for kind in ("weight", "bias") if shape.has_qkv_bias else ("weight",):
        for name, rows in (("q", (0, q_end)), ("k", (q_end, k_end)), ("v", (k_end, shape.qkv_rows))):
            pattern = layer + rf"self_attn\.{name}_proj\.{kind}"
            rules.append(Rule(pattern=pattern, target=rf"layers.\1.qkv.{kind}", rows=rows))
    if not tied:
        rules.append(Rule(pattern=r"lm_head\.weight", target="head.weight"))
    return rules


def spare_biases(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Patterns of the biases that writers of quantised matrices give to those of an MLP, which has none: zeros."""
    return (MLP_BIASES,) if checkpoint.grouped else ()


def require_zero_biases(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for spare biases that are not zero."""
    spare = [name for name in checkpoint.tensors if checkpoint.grouped and re.fullmatch(MLP_BIASES, name)]
    read = checkpoint.read(spare)
    if wrong := tuple(f"{name} is not zero, and the MLP has no biases" for name in spare if read[name].any()):
        raise CheckpointError(str(checkpoint.folder), wrong)


def _mlp_rules(source: str, target: str, inner: int, names: ExpertNames) -> Iterator[Rule]:
    """Of one gated MLP, its name in front of its parts being `source`."""
    gate_up = target + ".gate_up.weight"
    yield Rule(pattern=source + names.gate + r"\.weight", target=gate_up, rows=(0, inner))
    yield Rule(pattern=source + names.up + r"\.weight", target=gate_up, rows=(inner, 2 * inner))
    yield Rule(pattern=source + names.down + r"\.weight", target=target + ".down.weight")


def _expert_rules(layer: str, shape: ExpertShape, names: ExpertNames) -> Iterator[Rule]:
    mixture = layer + names.mixture + r"\."
    yield Rule(pattern=mixture + names.router + r"\.weight", target=r"layers.\1.router.weight")
    if shape.grouped is not None:
        pattern = mixture + names.router + r"\.e_score_correction_bias"
        yield Rule(pattern=pattern, target=r"layers.\1.router.bias")
    if shape.is_stacked:
        yield Rule(pattern=mixture + r"experts\.gate_up_proj", target=r"layers.\1.experts.gate_up.weight")
        yield Rule(pattern=mixture + r"experts\.down_proj", target=r"layers.\1.experts.down.weight")
    else:
        yield from _mlp_rules(mixture + r"experts\.(\d+)\.", r"layers.\1.experts.\2", shape.intermediate_size, names)
    if shape.num_shared:
        has_number = "(" in names.shared
        target = r"layers.\1.shared.\2" if has_number else r"layers.\1.shared.0"
        yield from _mlp_rules(mixture + names.shared + r"\.", target, shape.shared_size, HF_EXPERTS)
    if shape.shared_gated:
        yield Rule(pattern=mixture + names.shared_gate + r"\.weight", target=r"layers.\1.shared_gate.weight")


def _head_norms(layer: str, shape: BlockShape) -> list[Rule]:
    """One weight for all query heads and one for all key heads, repeated for each."""
    ranges = {"q": (0, shape.num_heads), "k": (shape.num_heads, shape.num_heads + shape.num_kv_heads)}
    return [
        Rule(
            pattern=layer + rf"self_attn\.{name}_norm\.weight",
            target=r"layers.\1.qk_norm.weight",
            rows=(first, end),
            transform=partial(_repeated, count=end - first),
        )
        for name, (first, end) in ranges.items()
    ]


def _repeated(weight: torch.Tensor, count: int) -> torch.Tensor:
    return weight.expand(count, *weight.shape)
