"""The families that `bench_families` measures: a random checkpoint of each, and what its reference is.

Text halves of some 5 million parameters (256 wide, 6 layers), mixtures of more; vision towers of 4 layers. Small, so
that a run is short, and large enough that products outweigh Python on both sides. Weights are random: what is chosen
between two near tokens may differ, and is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import family_references as references
from benchmarks.family_references import Answer
from tests.tiny_fusion_tree import make_fusion_tree
from tests.tiny_minimind import make_minimind
from tests.tiny_minimind_v import IMAGE_ID, make_minimind_v
from tests.tiny_models import make_qwen2_5_vl
from tests.tiny_nanochat import make_hf_nanochat, make_native_nanochat
from tests.tiny_qwen3_vl import make_qwen3_vl
from tests.tiny_text_models import make_text_model
from tests.tiny_tokenizer import NUM_TOKENS, TOKEN_IDS

WIDTH, LAYERS, INNER = 256, 6, 704
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": INNER}
TEXT = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": NUM_TOKENS}
EXPERT = {"moe_intermediate_size": 256}
QWEN_MARKS = tuple(TOKEN_IDS[f"<|{name}|>"] for name in ("vision_start", "image_pad", "vision_end"))
TRANSFORMERS = "transformers"


@dataclass(frozen=True, kw_only=True)
class Family:
    """make: writes the checkpoint, returns what its reference needs besides the folder. marks: what stands for an image
    in a prompt, none where there is no vision half. against: what the reference is, in two words."""

    make: Callable[[Path], Any]
    reference: Callable[[Path, Any], Answer] = references.hugging_face
    marks: Sequence[int] = ()
    against: str = TRANSFORMERS


def _text(family: str, **sizes: Any) -> Family:
    return Family(make=lambda folder: make_text_model(folder, family, **{**TEXT, **sizes}))


def _minimind(variant: str, **sizes: Any) -> Family:
    sizes = {**SIZES, "head_dim": WIDTH // 8, **sizes} if variant.startswith("3") else {**SIZES, **sizes}
    against = "expert loop" if variant == "2-moe" else TRANSFORMERS
    return Family(
        make=lambda folder: (variant, make_minimind(folder, variant, "pth", **sizes)),
        reference=references.minimind,
        against=against,
    )


def _qwen2_5_vl(folder: Path) -> Path:
    return make_qwen2_5_vl(
        folder, **TEXT, vision_depth=4, vision_hidden_size=WIDTH, vision_num_heads=4, vision_intermediate_size=512,
        window_size=112, fullatt_block_indexes=(1, 3),
    )  # fmt: skip


def _qwen3_vl(folder: Path) -> Path:
    rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [12, 10, 10]}
    text = {**TEXT, "head_dim": WIDTH // 4, "rope_scaling": rope}
    vision = {
        "depth": 4,
        "hidden_size": WIDTH,
        "num_heads": 4,
        "intermediate_size": 512,
        "num_position_embeddings": 256,
    }
    return make_qwen3_vl(folder, text=text, vision={**vision, "deepstack_visual_indexes": [0, 2]})


def make_fusion_tree_of(folder: Path, width: int = WIDTH, layers: int = LAYERS) -> Path:
    """A FusionTree of any size, windows of 256, one of its four heads seeing everything."""
    return make_fusion_tree(
        folder, hidden_size=width, num_layers=layers, num_heads=4, window_size=256, global_heads=1,
        gate_rank=width // 4, max_position_embeddings=8192, vocab_size=NUM_TOKENS,
    )  # fmt: skip


FAMILIES: dict[str, Family] = {
    "llama": _text("llama"),
    "mistral": _text("mistral", sliding_window=128),
    "ministral": _text("ministral", sliding_window=128),
    "qwen2": _text("qwen2"),
    "qwen3": _text("qwen3"),
    "mixtral": _text("mixtral", num_local_experts=4),
    "qwen2_moe": _text("qwen2_moe", num_experts=8, **EXPERT, shared_expert_intermediate_size=256),
    "qwen3_moe": _text("qwen3_moe", num_experts=8, **EXPERT),
    "dots1": _text("dots1", **EXPERT),
    "minimind-2": _minimind("2"),
    "minimind-2-moe": _minimind("2-moe"),
    "minimind-3": _minimind("3"),
    "minimind-3-moe": _minimind("3-moe", moe_intermediate_size=INNER),
    "minimind-v": Family(
        make=partial(make_minimind_v, kind="siglip", **SIZES, head_dim=WIDTH // 8),
        reference=references.minimind_v,
        marks=(IMAGE_ID,),
    ),
    "qwen2_5_vl": Family(make=_qwen2_5_vl, reference=references.qwen_vl, marks=QWEN_MARKS),
    "qwen3_vl": Family(make=_qwen3_vl, reference=references.qwen_vl, marks=QWEN_MARKS),
    "nanochat": Family(
        make=lambda folder: make_hf_nanochat(folder, **{**TEXT, "num_key_value_heads": 4, "intermediate_size": 1024})
    ),
    "nanochat-4": Family(
        make=lambda folder: make_native_nanochat(
            folder, 4, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_kv_head=4, sequence_len=2048, window_pattern="SSSL"
        ),
        reference=references.nanochat,
        against="plain torch",
    ),
    "fusion_tree": Family(make=make_fusion_tree_of, reference=references.fusion_tree, against="token loop"),
}
