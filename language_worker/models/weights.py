"""Name maps: which checkpoint tensor fills which fused parameter of a decoder.

q_proj, k_proj, v_proj -> qkv       rows  0 .. heads*D .. (heads+kv)*D .. (heads+2*kv)*D
gate_proj, up_proj     -> gate_up   rows  0 .. intermediate .. 2*intermediate
q_norm, k_norm         -> qk_norm   rows  0 .. heads .. heads+kv, each row the same
"""

from functools import partial

import torch

from language_worker.models.layers import BlockShape
from transfer.checkpoint_rules import Rule


def decoder_rules(shape: BlockShape, *, prefix: str, tied: bool) -> list[Rule]:
    """Rules for Hugging Face decoder names (`<prefix>layers.N.self_attn.q_proj.weight`, ...). prefix: a regular
    expression without capturing groups."""
    layer = prefix + r"layers\.(\d+)\."
    q_end = shape.num_heads * shape.head_dim
    k_end = q_end + shape.num_kv_heads * shape.head_dim
    inner = shape.intermediate_size
    rules = [
        Rule(pattern=prefix + r"embed_tokens\.weight", target="embedding.weight"),
        Rule(pattern=prefix + r"norm\.weight", target="final_norm.weight"),
        Rule(pattern=layer + r"input_layernorm\.weight", target=r"layers.\1.input_norm.weight"),
        Rule(pattern=layer + r"post_attention_layernorm\.weight", target=r"layers.\1.post_norm.weight"),
        Rule(pattern=layer + r"self_attn\.o_proj\.weight", target=r"layers.\1.o.weight"),
        Rule(pattern=layer + r"mlp\.gate_proj\.weight", target=r"layers.\1.gate_up.weight", rows=(0, inner)),
        Rule(pattern=layer + r"mlp\.up_proj\.weight", target=r"layers.\1.gate_up.weight", rows=(inner, 2 * inner)),
        Rule(pattern=layer + r"mlp\.down_proj\.weight", target=r"layers.\1.down.weight"),
    ]
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
