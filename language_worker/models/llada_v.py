"""The text half of LLaDA-V: LLaDA fed with text and image embeddings.

Positions just count tokens. How many rows an image has depends on its shape in ways that only the vision half knows. An
image is one placeholder in a prompt. The project marks images by no token at all, so one that its tokenizer reserves
and no text has stands for them; what stands there is never read, since rows replace it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from language_worker.errors import ModelNotSupported
from language_worker.models.llada import PUBLISHED_VOCABULARY, Llada
from language_worker.models.text_decoder import TextConfig

PUBLISHED_IMAGE = 126084  # <|reserved_token_0|>
# What the project's own loop never puts in place of a mask; an answer ends with <|eot_id|>.
UNSPOKEN = ("<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>")
SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


class LladaV(Llada):
    """See the module. `image_token_id` of config.json, which the published one does not have, overrules."""

    foreign = (r"model\.vision_tower\..*", r"model\.mm_projector\..*", r"model\.image_newline")

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> TextConfig:
        text = super().read_config(config)
        default = PUBLISHED_IMAGE if text.spec.vocab_size == PUBLISHED_VOCABULARY else None
        image_id = config.get("image_token_id", default)
        if type(image_id) is not int or not 0 <= image_id < text.spec.vocab_size or image_id == text.spec.mask_token_id:
            raise ModelNotSupported(
                f"config.json has image_token_id = {image_id!r}; a LLaDA-V model needs the id of a token that no text "
                f"has, one of its {text.spec.vocab_size}, to stand for images"
            )
        spec = replace(text.spec, media_token_id=image_id, unspoken=UNSPOKEN, system_prompt=SYSTEM_PROMPT)
        return replace(text, spec=spec)

    def media_rows(self, grid: tuple[int, int, int]) -> None:
        return None
