"""The two layouts of nanochat checkpoints: Hugging Face's (generation 0), and nanochat's own of every generation.

The own layout is `model_{step}.pt` beside `meta_{step}.json`, whose `model_config` holds the sizes; `infer_config`
turns it into the config.json that there is not. Entries that only a user can know (`generation`,
`final_logit_softcapping`) come in through `config_overrides`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Self

import torch

from language_worker.errors import ModelNotSupported
from language_worker.models.base import ModelSpec
from language_worker.models.config_values import read_amount, read_size
from language_worker.models.nanochat import NanoChat, NanoChatShape
from language_worker.models.nanochat_generations import GENERATIONS, detect_generation
from language_worker.models.rope import Rope
from transfer.checkpoint import Checkpoint
from transfer.checkpoint_json import is_kind
from transfer.checkpoint_rules import Rule

ARCHITECTURE = "NanoChat"  # of a checkpoint in nanochat's own layout
SOFTCAP = 15.0
EPS = torch.finfo(torch.float32).eps  # the norms' of nanochat itself, whatever the dtype
ROTARY_REACH = 10  # positions that nanochat's rotary table has, in sequence lengths
VOCAB_MULTIPLE = 64
_LAYER = r"transformer\.h\.(\d+)\."

CAP_WARNING = (
    "the logits' soft cap is taken to be 15; nanochat had 20 from 3 to 9 March 2026: if %s was trained in that week, "
    "set config_overrides: {final_logit_softcapping: 20} (greedy tokens are the same either way)"
)

logger = logging.getLogger(__name__)


class BackwardRope(Rope):
    """Turns by -theta where the others turn by theta."""

    def frequencies(self, head_dim: int, max_len: int) -> torch.Tensor:
        return -super().frequencies(head_dim, max_len)


class NanoChatHuggingFace(NanoChat):
    """Generation 0 as `transformers` publishes it."""

    @classmethod
    def read_spec(cls, config: Mapping[str, Any]) -> ModelSpec:
        return _hf_spec(_hf_shape(config), config)

    @classmethod
    def empty(
        cls, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device
    ) -> tuple[Self, list[Rule], tuple[str, ...]]:
        config = checkpoint.config()
        shape = _hf_shape(config)
        rope = Rope.read(config, GENERATIONS[0].rope_base)
        backward = BackwardRope(**{name: getattr(rope, name) for name in Rope.__slots__})
        model = cls(shape, _hf_spec(shape, config), backward, dtype=dtype, device=device)
        layer = r"model\.layers\.(\d+)\."
        rules = [
            Rule(pattern=r"model\.embed_tokens\.weight", target="embedding"),
            Rule(pattern=r"lm_head\.weight", target="head"),
            *_qkv_rules(shape, layer + r"self_attn\.{}_proj\.weight"),
            Rule(pattern=layer + r"self_attn\.o_proj\.weight", target=r"layers.\1.o"),
            Rule(pattern=layer + r"mlp\.fc1\.weight", target=r"layers.\1.up"),
            Rule(pattern=layer + r"mlp\.fc2\.weight", target=r"layers.\1.down"),
        ]
        return model, rules, (r".*\.rotary_emb\.inv_freq",)


class NanoChatNative(NanoChat):
    """Every generation as nanochat writes it."""

    @classmethod
    def read_spec(cls, config: Mapping[str, Any]) -> ModelSpec:
        return _native_spec(_native_shape(config, _generation(config), read_size(config, "vocab_size")), config)

    @classmethod
    def empty(
        cls, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device
    ) -> tuple[Self, list[Rule], tuple[str, ...]]:
        config = dict(checkpoint.config())
        if config.get("generation") is None:
            config["generation"] = detect_generation({t.name: t.shape for t in checkpoint.tensors.values()})
        number = _generation(config)
        if number == 2 and config.get("final_logit_softcapping") is None:
            logger.warning(CAP_WARNING, checkpoint.folder)
        shape = _native_shape(config, number, _padded_vocab(checkpoint, read_size(config, "vocab_size")))
        rope = BackwardRope(theta=GENERATIONS[number].rope_base)
        model = cls(shape, _native_spec(shape, config), rope, dtype=dtype, device=device)
        return model, _native_rules(shape), ()


def infer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json that a checkpoint in nanochat's own layout would have; {} for any other checkpoint.

    Raises CheckpointError when its meta file is missing, ModelNotSupported when it says too little.
    """
    first = checkpoint.tensors.get("transformer.h.0.attn.c_q.weight")
    if first is None:
        return {}
    meta_name = first.file.name.replace("model", "meta", 1).removesuffix(".pt") + ".json"
    sizes = checkpoint.read_json(meta_name).get("model_config")
    if not isinstance(sizes, dict):
        raise ModelNotSupported(f"{checkpoint.folder}/{meta_name} has no model_config; copy it from the training run")
    config = {**sizes, "architectures": [ARCHITECTURE], "model_type": "nanochat", "dtype": "by device"}
    try:
        return {**config, "generation": detect_generation({t.name: t.shape for t in checkpoint.tensors.values()})}
    except ModelNotSupported:
        return config  # the user may name it; who loads the weights without it says what is wrong


def _hf_shape(config: Mapping[str, Any]) -> NanoChatShape:
    hidden, heads = read_size(config, "hidden_size"), read_size(config, "num_attention_heads")
    for name, served in (("hidden_act", "relu2"), ("attention_bias", False), ("tie_word_embeddings", False)):
        if config.get(name, served) != served:
            raise ModelNotSupported(f"config.json has {name} = {config[name]!r}; nanochat is served with {served!r}")
    vocab = read_size(config, "vocab_size")
    shape = NanoChatShape(
        vocab_size=vocab,
        padded_vocab=vocab,
        hidden_size=hidden,
        intermediate_size=read_size(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=read_size(config, "num_key_value_heads", heads),
        head_dim=read_size(config, "head_dim", hidden // heads),
        windows=(0,) * read_size(config, "num_hidden_layers"),
        eps=read_amount(config, "rms_norm_eps", 1e-6),
        cap=_cap(config),
    )
    return _checked(shape)


def _hf_spec(shape: NanoChatShape, config: Mapping[str, Any]) -> ModelSpec:
    longest = Rope.read(config, GENERATIONS[0].rope_base).max_positions(
        read_size(config, "max_position_embeddings", 2048)
    )
    return shape.spec(max_positions=longest, default_len=longest)


def _generation(config: Mapping[str, Any]) -> int:
    number = config.get("generation")
    if type(number) is not int or not 0 <= number < len(GENERATIONS):
        raise ModelNotSupported(
            f"generation is {number!r}; nanochat's are 0 to {len(GENERATIONS) - 1}: name it in config_overrides"
        )
    return number


def _native_shape(config: Mapping[str, Any], number: int, padded_vocab: int) -> NanoChatShape:
    generation = GENERATIONS[number]
    hidden, heads, layers = (read_size(config, name) for name in ("n_embd", "n_head", "n_layer"))
    shape = NanoChatShape(
        vocab_size=read_size(config, "vocab_size"),
        padded_vocab=padded_vocab,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_heads=heads,
        num_kv_heads=read_size(config, "n_kv_head", heads),
        head_dim=hidden // heads,
        windows=generation.windows(str(config.get("window_pattern") or "L"), read_size(config, "sequence_len"), layers),
        eps=EPS,
        cap=_cap(config),
        qk_scale=generation.qk_scale,
        has_lambdas=generation.has_lambdas,
        gate_width=generation.gate_width,
        gate_scale=generation.gate_scale,
        smear_width=generation.smear_width,
    )
    if max(shape.gate_width, shape.smear_width) > hidden:
        raise ModelNotSupported(f"n_embd is {hidden}, fewer channels than the gates of this generation read")
    return _checked(shape)


def _native_spec(shape: NanoChatShape, config: Mapping[str, Any]) -> ModelSpec:
    trained = read_size(config, "sequence_len")
    return shape.spec(max_positions=ROTARY_REACH * trained, default_len=trained)


def _checked(shape: NanoChatShape) -> NanoChatShape:
    if shape.num_heads % shape.num_kv_heads or shape.head_dim % 2 or not shape.head_dim:
        raise ModelNotSupported(
            f"{shape.num_heads} heads must be a multiple of {shape.num_kv_heads} key heads, and the size of a head, "
            f"{shape.head_dim}, even"
        )
    return shape


def _cap(config: Mapping[str, Any]) -> float | None:
    """Of the logits: what is said, None where it is said to be none."""
    value = config.get("final_logit_softcapping", SOFTCAP)
    if value is not None and not is_kind(value, "positive"):
        raise ModelNotSupported(f"final_logit_softcapping is {value!r}; a positive number or null is needed")
    return None if value is None else float(value)


def _padded_vocab(checkpoint: Checkpoint, vocab_size: int) -> int:
    """Rows of the embedding: the vocabulary, since December 2025 rounded up to a multiple of 64."""
    stored = checkpoint.tensors.get("transformer.wte.weight")
    padded = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return padded if stored is not None and stored.shape[:1] == (padded,) else vocab_size


def _qkv_rules(shape: NanoChatShape, pattern: str) -> list[Rule]:
    q_end = shape.num_heads * shape.head_dim
    k_end = q_end + shape.num_kv_heads * shape.head_dim
    ranges = {"q": (0, q_end), "k": (q_end, k_end), "v": (k_end, shape.qkv_rows)}
    return [Rule(pattern=pattern.format(n), target=r"layers.\1.qkv", rows=rows) for n, rows in ranges.items()]


def _native_rules(shape: NanoChatShape) -> list[Rule]:
    layers = shape.num_layers
    rules = [
        Rule(pattern=r"transformer\.wte\.weight", target="embedding"),
        Rule(pattern=r"lm_head\.weight", target="head"),
        *_qkv_rules(shape, _LAYER + r"attn\.c_{}\.weight"),
        Rule(pattern=_LAYER + r"attn\.c_proj\.weight", target=r"layers.\1.o"),
        Rule(pattern=_LAYER + r"mlp\.c_fc\.weight", target=r"layers.\1.up"),
        Rule(pattern=_LAYER + r"mlp\.c_proj\.weight", target=r"layers.\1.down"),
    ]
    if shape.has_lambdas:
        rules.append(Rule(pattern=r"resid_lambdas", target="lambdas", rows=(0, layers)))
        rules.append(Rule(pattern=r"x0_lambdas", target="lambdas", rows=(layers, 2 * layers)))
    if shape.gate_width:
        rules.append(Rule(pattern=_LAYER + r"attn\.ve_gate\.weight", target=r"layers.\1.value_gate"))
        rules.append(Rule(pattern=r"value_embeds\.(\d+)\.weight", target=r"layers.\1.value_embedding"))
    if shape.smear_width:
        rules.append(Rule(pattern=r"smear_gate\.weight", target="smear_gate"))
        rules += [Rule(pattern=name, target=name) for name in ("smear_lambda", "backout_lambda")]
    return rules
