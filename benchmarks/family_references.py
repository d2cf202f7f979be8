"""What each family is compared with: its reference's own `generate`, every request of a call in one batch of equal
lengths, greedy, ends of sequence ignored.

Where transformers has no such model, it is the plain torch that stands for the project's own code: a loop over experts
or over tokens, keys and values kept.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.fusion_tree_reference import LoopingFusionTree
from benchmarks.nanochat_reference import PlainNanochat
from tests.tiny_minimind import minimind_reference
from tests.tiny_minimind_v import IMAGE_ID, image_rows
from tests.tiny_models import reference as qwen2_5_vl_reference
from tests.tiny_models import reference_processor
from tests.tiny_nanochat import NANO_VOCAB
from tests.tiny_qwen3_vl import qwen3_vl_reference
from tests.tiny_text_models import text_reference
from tests.tiny_tokenizer import NUM_TOKENS, TOKEN_IDS

PAD = TOKEN_IDS["<|image_pad|>"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A prompt, with one placeholder where there is an image, and that image as a client sends it."""

    ids: tuple[int, ...]
    image: bytes | None = None

    def pixels(self) -> Image.Image:
        """Decoded."""
        assert self.image is not None
        return Image.open(io.BytesIO(self.image)).convert("RGB")


Answer = Callable[[Sequence[Request], int], list[list[int]]]  # requests, new tokens of each -> these


def hugging_face(folder: Path, made: Any) -> Answer:
    """transformers' model of a folder that it reads."""
    return _text(text_reference(Path(folder)))


def minimind(folder: Path, made: tuple[str, dict[str, Any]]) -> Answer:
    """The same of MiniMind's own layout."""
    variant, config = made
    return _text(minimind_reference(variant, config, 0))


def _text(model: Any) -> Answer:
    model.generation_config.eos_token_id = None

    def answer(requests: Sequence[Request], num_new: int) -> list[list[int]]:
        ids = torch.tensor([request.ids for request in requests])
        return _generate(model, num_new, input_ids=ids, attention_mask=torch.ones_like(ids))

    return answer


def minimind_v(folder: Path, made: dict[str, Any]) -> Answer:
    """transformers' vision encoder and language model, a plain projector between."""
    model = minimind_reference(made["variant"], made["config"], made["seed"])
    model.generation_config.eos_token_id = None
    table = model.get_input_embeddings().weight

    def answer(requests: Sequence[Request], num_new: int) -> list[list[int]]:
        with torch.inference_mode():
            rows = image_rows(made, [request.pixels() for request in requests])
            embedded = []
            for request, own in zip(requests, rows, strict=True):
                place = request.ids.index(IMAGE_ID)
                before, behind = (table[list(part)] for part in (request.ids[:place], request.ids[place + 1 :]))
                embedded.append(torch.cat((before, own, behind)))
            inputs = torch.stack(embedded)
        mask = torch.ones(inputs.shape[:2], dtype=torch.int64)
        return _generate(model, num_new, inputs_embeds=inputs, attention_mask=mask)

    return answer


def qwen_vl(folder: Path, made: Any) -> Answer:
    """transformers' Qwen2.5-VL or Qwen3-VL with its own image processor."""
    model = (qwen3_vl_reference if "qwen3" in Path(folder).name else qwen2_5_vl_reference)(folder)
    model.generation_config.eos_token_id = None
    processor = reference_processor(folder)

    def answer(requests: Sequence[Request], num_new: int) -> list[list[int]]:
        features = processor(images=[request.pixels() for request in requests], return_tensors="pt")
        counts = (features["image_grid_thw"].prod(-1) // processor.merge_size**2).tolist()
        texts = []
        for request, count in zip(requests, counts, strict=True):
            place = request.ids.index(PAD)
            texts.append([*request.ids[:place], *[PAD] * count, *request.ids[place + 1 :]])
        ids = torch.tensor(texts)
        return _generate(
            model, num_new, input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=features["pixel_values"],
            image_grid_thw=features["image_grid_thw"], mm_token_type_ids=(ids == PAD).to(torch.int32),
        )  # fmt: skip

    return answer


def _generate(model: Any, num_new: int, **inputs: torch.Tensor) -> list[list[int]]:
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=num_new, do_sample=False)
    return [row[-num_new:] for row in out.tolist()]


def fusion_tree(folder: Path, made: Any, *, loops_twice: bool = False) -> Answer:
    """Plain torch whose scan is a Python loop over tokens, or two as in the training repository."""
    state = torch.load(Path(folder) / "checkpoint_step_40.pt", weights_only=True)
    model = LoopingFusionTree(state["config"]["model"], state["model_state_dict"], loops_twice=loops_twice)
    return _stepping(model.step, NUM_TOKENS)


def nanochat(folder: Path, made: Path) -> Answer:
    """Plain torch, as the project's own engine computes it."""
    return _stepping(PlainNanochat.read(made).step, NANO_VOCAB)


def _stepping(step: Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]], num_tokens: int) -> Answer:
    def answer(requests: Sequence[Request], num_new: int) -> list[list[int]]:
        fed, past, chosen = torch.tensor([request.ids for request in requests]), None, []
        for _ in range(num_new):
            logits, past = step(fed, past)
            fed = logits[:, :num_tokens].argmax(1, keepdim=True)
            chosen.append(fed)
        rows: list[list[int]] = torch.cat(chosen, 1).tolist()
        return rows

    return answer
