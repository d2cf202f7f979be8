"""Every family in each of its layouts as one table: a random tiny checkpoint, a prompt, and the reference's answer.

`tests/e2e/test_families.py` runs the same checks over all of it; a new family is a row here. Vocabularies are the
tokenizers', so that every id may be chosen; windows and images are short enough to lie inside the texts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cluster.prompts import image_bytes
from tests import tiny_fusion_tree
from tests.tiny_minimind import LAYOUTS, VARIANTS, make_minimind, minimind_reference
from tests.tiny_minimind_v import MARKS, make_minimind_v, reference_answer
from tests.tiny_models import QWEN2_5_VL_CONFIGS, make_qwen2_5_vl, random_image, reference, reference_inputs
from tests.tiny_nanochat import (
    NANO_VOCAB,
    SIZES,
    make_hf_nanochat,
    make_native_nanochat,
    native_logits,
    native_tensors,
)
from tests.tiny_qwen3_vl import QWEN3_VL_CONFIGS, make_qwen3_vl, qwen3_vl_reference
from tests.tiny_text_models import ARCHITECTURES, make_text_model, text_reference
from tests.tiny_tokenizer import NUM_TOKENS, TOKEN_IDS

PAD = TOKEN_IDS["<|image_pad|>"]
WINDOWED = {"window_pattern": "SL", "sequence_len": 15}  # windows of 7 and 15 positions
MINIMIND_SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"num_hidden_layers": 3},
    {"tie_word_embeddings": False},
    {"num_key_value_heads": 8},
    {"num_key_value_heads": 1, "tie_word_embeddings": False},
)
QWEN2_5_VL_SHAPES = tuple(shape for shape in QWEN2_5_VL_CONFIGS if not {"layout", "vocab_size"} & shape.keys())
FUSION_TREE_SHAPES = tuple(shape for name, shape in tiny_fusion_tree.VARIANTS.items() if name != "pyramid")
Logits = Callable[[Sequence[int]], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One checkpoint. `stem` is a prompt as a client writes it, with one placeholder an image."""

    folder: Path
    stem: list[int]
    logits: Logits  # of every position of the stem (images at their full length) and of what follows it
    images: list[Image.Image] = field(default_factory=list)
    placeholder: int | None = None  # not to be written: in a prompt it would stand for an image

    def prompt(self, behind: Sequence[int] = ()) -> dict[str, Any]:
        """The stem with tokens behind it, as `LLM` takes it."""
        return {"prompt_token_ids": [*self.stem, *behind], "images": [image_bytes(image) for image in self.images]}

    def greedy(self, count: int) -> list[int]:
        """What the reference writes behind the stem, placeholders left out."""
        behind: list[int] = []
        for _ in range(count):
            last = self.logits(behind)[-1].clone()
            last[[*self.banned]] = -torch.inf
            behind.append(int(last.argmax()))
        return behind

    @property
    def banned(self) -> tuple[int, ...]:
        return () if self.placeholder is None else (self.placeholder,)


def _hugging_face(model: Any, stem: Sequence[int]) -> Logits:
    def logits(behind: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(torch.tensor([[*stem, *behind]])).logits[0]
        return found

    return logits


def _start(seed: int, vocabulary: int = NUM_TOKENS) -> list[int]:
    return [random.Random(seed).randrange(vocabulary)]


def _text(family: str, folder: Path, seed: int) -> Subject:
    make_text_model(folder, family, seed=seed, vocab_size=NUM_TOKENS)
    stem = _start(seed)
    return Subject(folder=folder, stem=stem, logits=_hugging_face(text_reference(folder), stem))


def _minimind(variant: str, layout: str, folder: Path, seed: int) -> Subject:
    config = make_minimind(folder, variant, layout, seed=seed, **MINIMIND_SHAPES[seed % len(MINIMIND_SHAPES)])
    stem = _start(seed)
    return Subject(folder=folder, stem=stem, logits=_hugging_face(minimind_reference(variant, config, seed), stem))


def _nanochat(generation: int, folder: Path, seed: int) -> Subject:
    config = {**SIZES, **(WINDOWED if generation else {})}
    made = make_native_nanochat(folder, generation, seed=seed, **config)
    tensors, stem = native_tensors(generation, config, seed=seed, padded=True), _start(seed, NANO_VOCAB - 9)
    return Subject(
        folder=made, stem=stem, logits=lambda behind: native_logits(generation, config, tensors, [*stem, *behind])
    )


def _nanochat_hugging_face(folder: Path, seed: int) -> Subject:
    make_hf_nanochat(folder, seed=seed, vocab_size=NUM_TOKENS)
    stem = _start(seed)
    return Subject(folder=folder, stem=stem, logits=_hugging_face(text_reference(folder), stem))


def _fusion_tree(layout: str, folder: Path, seed: int) -> Subject:
    sizes = {**FUSION_TREE_SHAPES[seed % len(FUSION_TREE_SHAPES)], "vocab_size": NUM_TOKENS}
    made = tiny_fusion_tree.make_fusion_tree(folder, seed=seed, layout=layout, **sizes)
    config, stem = {**tiny_fusion_tree.SIZES, **sizes}, _start(seed)
    tensors = tiny_fusion_tree.tensors_of(config, seed=seed)
    return Subject(
        folder=made,
        stem=stem,
        logits=lambda behind: tiny_fusion_tree.logits_of(config, tensors, [*stem, *behind]),
    )


def _minimind_v(kind: str, variant: str, layout: str, folder: Path, seed: int) -> Subject:
    shape = MINIMIND_SHAPES[seed % len(MINIMIND_SHAPES)]
    made = make_minimind_v(folder, kind, variant=variant, layout=layout, seed=seed, own_encoder=seed % 2 > 0, **shape)
    mark = MARKS[kind]
    images = [random_image(60, 40, seed=seed), random_image(31, 57, seed=seed + 1)]
    stem = [5, mark, mark, 7]  # side by side

    def logits(behind: Sequence[int]) -> torch.Tensor:
        return reference_answer(made, [*stem, *behind], images, mark, 1)[0]

    return Subject(folder=folder, stem=stem, images=images, placeholder=mark, logits=logits)


def _qwen2_5_vl(folder: Path, seed: int, layout: str = "published") -> Subject:
    shape = QWEN2_5_VL_SHAPES[seed % len(QWEN2_5_VL_SHAPES)]
    make_qwen2_5_vl(folder, seed=seed, vocab_size=NUM_TOKENS, layout=layout, **shape)
    return _qwen_vl(folder, reference(folder), seed)


def _qwen3_vl(folder: Path, seed: int) -> Subject:
    make_qwen3_vl(folder, seed=seed, **QWEN3_VL_CONFIGS[seed % len(QWEN3_VL_CONFIGS)])
    return _qwen_vl(folder, qwen3_vl_reference(folder), seed)


def _qwen_vl(folder: Path, model: Any, seed: int) -> Subject:
    images = [random_image(90, 57, seed=seed), random_image(33, 64, seed=seed + 1)]
    inputs = reference_inputs(folder, ["Say: ", images[0], images[1], "?"])
    ids = inputs["input_ids"]
    stem = [token for i, token in enumerate(ids[0].tolist()) if token != PAD or int(ids[0, i - 1]) != PAD]

    def logits(behind: Sequence[int]) -> torch.Tensor:
        whole = torch.cat([ids, torch.tensor([list(behind)], dtype=ids.dtype)], dim=1)
        kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(behind)))
        given = {**inputs, "input_ids": whole, "attention_mask": torch.ones_like(whole), "mm_token_type_ids": kinds}
        with torch.no_grad():
            found: torch.Tensor = model(**given).logits[0]
        return found

    return Subject(folder=folder, stem=stem, images=images, placeholder=PAD, logits=logits)


FAMILIES: dict[str, Callable[[Path, int], Subject]] = {
    **{family: partial(_text, family) for family in ARCHITECTURES},
    **{f"nanochat-{generation}": partial(_nanochat, generation) for generation in range(5)},
    "nanochat-hf": _nanochat_hugging_face,
    **{f"fusion_tree-{layout}": partial(_fusion_tree, layout) for layout in ("training", "bare", "deepspeed")},
    **{
        f"minimind-{variant}-{layout}": partial(_minimind, variant, layout)
        for variant in VARIANTS
        for layout in LAYOUTS
        if (variant, layout) != ("2-moe", "converted")  # there is no such family
    },
    "minimind-v-siglip-pth": partial(_minimind_v, "siglip", "3", "pth"),
    "minimind-v-siglip-moe-bin": partial(_minimind_v, "siglip", "3-moe", "bin"),
    "minimind-v-naflex-pth": partial(_minimind_v, "naflex", "3", "pth"),
    "minimind-v-naflex-moe-bin": partial(_minimind_v, "naflex", "3-moe", "bin"),
    "minimind-v-clip-pth": partial(_minimind_v, "clip", "2", "pth"),
    "minimind-v-clip-moe-bin": partial(_minimind_v, "clip", "2-moe", "bin"),
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_5_vl-nested": partial(_qwen2_5_vl, layout="nested"),
    "qwen3_vl": _qwen3_vl,
}
